#define _GNU_SOURCE
#include "watchdog.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE_BYTES 4096
#define LOOKS 8 /* in the time that a stall may take */

struct snap_watchdog {
    _Atomic(int64_t) *beat_ms; /* when the last beat was; shared with the other process */
    int pipe;                  /* its writing end: the other process ends when it is closed */
    int pid;
};

static int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* The other process. It has one thread of a process that may have had many: no locks, no malloc. */
static void watch(int target, int stall_ms, const _Atomic(int64_t) *beat_ms, int pipe, int snap)
{
    char text[160];
    int size = snprintf(text, sizeof text,
                        "snap: stood still for %d ms; ended, so that process %d is not kept waiting\n",
                        stall_ms, target);
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
        if (now_ms() - *beat_ms <= stall_ms)
            continue;
        syscall(SYS_pidfd_send_signal, snap, SIGKILL, NULL, 0);
        (void)!write(2, text, (size_t)size);
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
        w->beat_ms = shared;
        *w->beat_ms = now_ms();
        w->pipe = ends[1];
        /* Without an exit signal no wait(2) of the program finds it. */
        w->pid = (int)syscall(SYS_clone, 0, NULL, NULL, NULL, 0);
        if (w->pid == 0)
            watch(target, stall_ms, w->beat_ms, ends[0], own);
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
    *w->beat_ms = now_ms();
}

void snap_watchdog_rest(snap_watchdog *w)
{
    *w->beat_ms = INT64_MAX;
}

void snap_watchdog_stop(snap_watchdog *w)
{
    close(w->pipe);
    while (waitpid(w->pid, NULL, __WCLONE) < 0 && errno == EINTR)
        continue;
    munmap((void *)w->beat_ms, PAGE_BYTES);
    free(w);
}
