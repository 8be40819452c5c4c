#define _GNU_SOURCE
#include "watchdog.h"

#include "arch_x86_64.h"
#include "uffd.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define STACK_BYTES (64 * 1024)
#define LOOKS 8 /* in the time that a stall may take */
#define END_MS 500
#define LINE_MAX 8192 /* more than a line of /proc/PID/maps: a path of PATH_MAX, escaped */
#define PIDFD_THREAD O_EXCL

struct snap_watchdog {
    _Atomic(uint32_t) beats;
    _Atomic(bool) rests;
    _Atomic(int) uffd;        /* the number of the target's userfaultfd in snap; -1: none */
    int pipe; /* its writing end: the other process ends when it is closed */
    int pid;
    unsigned char *stack;
    /* For the other process. */
    int target, stall_ms;
    int ends; /* the reading end of the pipe */
    int snap; /* pidfd of this process */
    int snap_pid;
    char text[160];
    char tasks[32];
};

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

static void forget(snap_watchdog *w)
{
    if (w->stack != MAP_FAILED)
        munmap(w->stack, STACK_BYTES);
    free(w);
}

/* Up to the first of `end`, or of what ends any of these files. */
static long read_word(const char *folder, const char *task, const char *file, char end, char *out, size_t size)
{
    char path[64];
    char *to = path;
    for (const char *part[] = {folder, "/", task, "/", file}, **p = part; p < part + 5; p++)
        for (const char *c = *p; *c && to < path + sizeof path - 1; c++)
            *to++ = *c;
    *to = 0;
    long fd = snap_arch_raw(SYS_open, (long)path, O_RDONLY | O_CLOEXEC, 0);
    long got = fd < 0 ? 0 : snap_arch_raw(SYS_read, fd, (long)out, (long)size);
    if (fd >= 0)
        snap_arch_raw(SYS_close, fd, 0, 0);
    long length = 0;
    while (length < got && out[length] != end && out[length] != '\n')
        length++;
    return length;
}

static char *put(char *to, const char *from, long length)
{
    for (long i = 0; i < length; i++)
        *to++ = from[i];
    return to;
}

/* On stderr, for each thread of snap: "snap: NAME: CALL in WHERE", its system call and the function of the
 * kernel that it waits in (proc_pid_syscall(5), proc_pid_wchan(5)), or "running". */
static void tell(const snap_watchdog *w)
{
    char line[256], entries[2048], word[64];
    long fd = snap_arch_raw(SYS_open, (long)w->tasks, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0), size;
    snap_arch_raw(SYS_write, 2, (long)w->text, (long)strlen(w->text));
    while (fd >= 0 && (size = snap_arch_raw(SYS_getdents64, fd, (long)entries, sizeof entries)) > 0) {
        struct dirent64 *entry;
        for (long at = 0; at < size; at += entry->d_reclen) {
            entry = (struct dirent64 *)(entries + at);
            if (entry->d_name[0] == '.')
                continue;
            char *to = put(line, "snap: ", 6);
            to = put(to, word, read_word(w->tasks, entry->d_name, "comm", 0, word, sizeof word));
            to = put(to, ": ", 2);
            to = put(to, word, read_word(w->tasks, entry->d_name, "syscall", ' ', word, sizeof word));
            to = put(to, " in ", 4);
            to = put(to, word, read_word(w->tasks, entry->d_name, "wchan", 0, word, sizeof word));
            *to++ = '\n';
            snap_arch_raw(SYS_write, 2, (long)line, to - line);
        }
    }
    if (fd >= 0)
        snap_arch_raw(SYS_close, fd, 0, 0);
}

/* The other process. It has this one's memory: a copy of it would make every first write of snap to a
 * page of its own a fault, hundreds of them while the target stands still. So it has no thread-local
 * memory of its own, and makes its system calls without errno as long as snap lives. */
static int watch(void *argument)
{
    const snap_watchdog *w = argument;
    unsigned low = (unsigned)(w->ends < w->snap ? w->ends : w->snap);
    unsigned high = (unsigned)(w->ends < w->snap ? w->snap : w->ends);
    snap_arch_raw(SYS_prctl, PR_SET_NAME, (long)"snap-watchdog", 0);
    snap_arch_raw(SYS_setsid, 0, 0, 0); /* Ctrl-C and Ctrl-Z are not for it */
    if (low > 3)
        snap_arch_raw(SYS_close_range, 3, low - 1, 0);
    if (high > low + 1)
        snap_arch_raw(SYS_close_range, low + 1, high - 1, 0);
    snap_arch_raw(SYS_close_range, high + 1, ~0u, 0);
    struct pollfd ends = {.fd = w->ends, .events = 0};
    uint32_t seen = w->beats;
    for (int still = 0;;) {
        if (snap_arch_raw(SYS_poll, (long)&ends, 1, w->stall_ms / LOOKS + 1) > 0)
            break;
        /* Not by the clock: where the whole machine stood still (a virtual one that is moved, a laptop that
         * slept) snap has not beaten either, and is not at fault. */
        uint32_t beats = w->beats;
        still = beats == seen && !w->rests ? still + 1 : 0;
        seen = beats;
        if (still < LOOKS)
            continue;
        tell(w); /* before: then there is nothing to be seen any more */
        snap_arch_raw(SYS_pidfd_send_signal, w->snap, SIGKILL, 0);
        if (snap_arch_raw(SYS_poll, (long)&ends, 1, END_MS) == 0)
            let_go(w->target, w->snap_pid, w->uffd);
        break;
    }
    return 0;
}

/* Without an exit signal no wait(2) of the program finds it. */
static int start_other(snap_watchdog *w)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* a handler of ours may never run in it */
    w->pid = clone(watch, w->stack + STACK_BYTES, CLONE_VM, w);
    int result = w->pid < 0 ? -errno : 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return result;
}

int snap_watchdog_start(int target, int stall_ms, snap_watchdog **made)
{
    int ends[2] = {-1, -1}, r = 0;
    snap_watchdog *w = calloc(1, sizeof *w);
    if (!w)
        return -ENOMEM;
    w->stack = mmap(NULL, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    w->snap = (int)syscall(SYS_pidfd_open, getpid(), 0);
    if (w->stack == MAP_FAILED || w->snap < 0 || pipe2(ends, O_CLOEXEC) < 0) {
        r = -errno;
    } else {
        w->uffd = -1;
        w->ends = ends[0];
        w->pipe = ends[1];
        w->target = target;
        w->stall_ms = stall_ms;
        w->snap_pid = getpid();
        snprintf(w->text, sizeof w->text,
                 "snap: stood still for %d ms; ended, so that process %d is not kept waiting\n",
                 stall_ms, target);
        snprintf(w->tasks, sizeof w->tasks, "/proc/%d/task", w->snap_pid);
        r = start_other(w);
    }
    if (w->snap >= 0)
        close(w->snap);
    if (ends[0] >= 0)
        close(ends[0]);
    if (!r) {
        *made = w;
        return 0;
    }
    if (ends[1] >= 0)
        close(ends[1]);
    forget(w);
    return r;
}

void snap_watchdog_beat(snap_watchdog *w)
{
    w->beats++;
    w->rests = false;
}

void snap_watchdog_rest(snap_watchdog *w)
{
    w->rests = true;
}

void snap_watchdog_know(snap_watchdog *w, int uffd)
{
    w->uffd = uffd;
}

void snap_watchdog_stop(snap_watchdog *w)
{
    close(w->pipe);
    while (waitpid(w->pid, NULL, __WCLONE) < 0 && errno == EINTR)
        continue;
    forget(w);
}
