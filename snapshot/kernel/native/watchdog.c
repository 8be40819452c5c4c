#define _GNU_SOURCE
#include "watchdog.h"

#include "uffd.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE_BYTES 4096
#define LOOKS 8 /* in the time that a stall may take */
#define END_MS 500
#define LINE_MAX 8192 /* more than a line of /proc/PID/maps: a path of PATH_MAX, escaped */
#define PIDFD_THREAD O_EXCL

/* Shared with the other process. */
struct common {
    _Atomic(int64_t) beat_ms; /* when the last beat was */
    _Atomic(int) uffd;        /* the number of the target's userfaultfd in snap; -1: none */
};

struct snap_watchdog {
    struct common *common;
    int pipe; /* its writing end: the other process ends when it is closed */
    int pid;
};

static int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* A duplicate of the userfaultfd of a process of which at least one thread is still there. */
static int fetch(int snap, int number)
{
    char path[32];
    struct dirent64 *entry;
    char entries[4096];
    long size;
    int found = -1;
    snprintf(path, sizeof path, "/proc/%d/task", snap);
    int tasks = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    while (found < 0 && (size = syscall(SYS_getdents64, tasks, entries, sizeof entries)) > 0)
        for (long at = 0; found < 0 && at < size; at += entry->d_reclen) {
            entry = (struct dirent64 *)(entries + at);
            int thread = (int)syscall(SYS_pidfd_open, atoi(entry->d_name), PIDFD_THREAD);
            if (thread < 0)
                continue;
            found = (int)syscall(SYS_pidfd_getfd, thread, number, 0);
            close(thread);
        }
    close(tasks);
    return found;
}

static void unregister_all(int target, int uffd)
{
    static char text[2 * LINE_MAX];
    char path[32];
    size_t have = 0;
    ssize_t got;
    snprintf(path, sizeof path, "/proc/%d/maps", target);
    int maps = open(path, O_RDONLY | O_CLOEXEC);
    while ((got = read(maps, text + have, sizeof text - 1 - have)) > 0) {
        have += (size_t)got;
        text[have] = 0;
        char *line = text, *end;
        for (; (end = strchr(line, '\n')); line = end + 1) {
            char *dash;
            uint64_t start = strtoull(line, &dash, 16);
            uint64_t length = strtoull(dash + 1, NULL, 16) - start;
            uffd_unregister(uffd, start, length);
            uffd_wake(uffd, start, length); /* userfaultfd_unregister wakes for missing pages alone */
        }
        have = (size_t)(text + have - line);
        memmove(text, line, have);
    }
    close(maps);
}

/* A snap that is stuck in the kernel (a disk that does not answer) has been killed and does not end, so
   its userfaultfd stays open, and nobody serves it. What waits is let go by a duplicate. */
static void let_go(int target, int snap, int number)
{
    uffd_message message;
    int uffd = number < 0 ? -1 : fetch(snap, number);
    if (uffd < 0)
        return;
    do {
        unregister_all(target, uffd); /* who waits at a first write goes on */
        poll(NULL, 0, END_MS / LOOKS);
    } while (read(uffd, &message, sizeof message) > 0); /* … and these, who waits to be heard */
    close(uffd);
}

/* The other process. It has one thread of a process that may have had many: no locks, no malloc. */
static void watch(int target, int stall_ms, const struct common *common, int pipe, int snap)
{
    char text[160];
    int size = snprintf(text, sizeof text,
                        "snap: stood still for %d ms; ended, so that process %d is not kept waiting\n",
                        stall_ms, target);
    int pid = getppid();
    prctl(PR_SET_NAME, "snap-watchdog");
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    setsid(); /* Ctrl-C and Ctrl-Z are not for it */
    unsigned low = (unsigned)(pipe < snap ? pipe : snap), high = (unsigned)(pipe < snap ? snap : pipe);
    if (low > 3)
        syscall(SYS_close_range, 3, low - 1, 0);
    if (high > low + 1)
        syscall(SYS_close_range, low + 1, high - 1, 0);
    syscall(SYS_close_range, high + 1, ~0u, 0);
    struct pollfd ends = {.fd = pipe, .events = 0};
    for (;;) {
        int ready = poll(&ends, 1, stall_ms / LOOKS + 1);
        if (ready > 0)
            _exit(0);
        if (now_ms() - common->beat_ms <= stall_ms)
            continue;
        syscall(SYS_pidfd_send_signal, snap, SIGKILL, NULL, 0);
        (void)!write(2, text, (size_t)size);
        if (poll(&ends, 1, END_MS) == 0)
            let_go(target, pid, common->uffd);
        _exit(0);
    }
}

int snap_watchdog_start(int target, int stall_ms, snap_watchdog **made)
{
    int ends[2] = {-1, -1}, r = 0, own = -1;
    snap_watchdog *w = calloc(1, sizeof *w);
    void *shared = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (!w || shared == MAP_FAILED || pipe2(ends, O_CLOEXEC) < 0 ||
        (own = (int)syscall(SYS_pidfd_open, getpid(), 0)) < 0) {
        r = w ? -errno : -ENOMEM;
    } else {
        w->common = shared;
        w->common->beat_ms = now_ms();
        w->common->uffd = -1;
        w->pipe = ends[1];
        /* Without an exit signal no wait(2) of the program finds it. */
        w->pid = (int)syscall(SYS_clone, 0, NULL, NULL, NULL, 0);
        if (w->pid == 0)
            watch(target, stall_ms, w->common, ends[0], own);
        r = w->pid < 0 ? -errno : 0;
    }
    if (own >= 0)
        close(own);
    if (ends[0] >= 0)
        close(ends[0]);
    if (!r) {
        *made = w;
        return 0;
    }
    if (ends[1] >= 0)
        close(ends[1]);
    if (shared != MAP_FAILED)
        munmap(shared, PAGE_BYTES);
    free(w);
    return r;
}

void snap_watchdog_beat(snap_watchdog *w)
{
    w->common->beat_ms = now_ms();
}

void snap_watchdog_rest(snap_watchdog *w)
{
    w->common->beat_ms = INT64_MAX;
}

void snap_watchdog_know(snap_watchdog *w, int uffd)
{
    w->common->uffd = uffd;
}

void snap_watchdog_stop(snap_watchdog *w)
{
    close(w->pipe);
    while (waitpid(w->pid, NULL, __WCLONE) < 0 && errno == EINTR)
        continue;
    munmap(w->common, PAGE_BYTES);
    free(w);
}
