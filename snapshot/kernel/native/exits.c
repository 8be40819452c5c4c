#define _GNU_SOURCE
#include "exits.h"

#include "arch_x86_64.h"
#include "ptrace_internal.h"

#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define GONE_NS 20000
#define PART_US 5000
#define PF_EXITING 4 /* linux/sched.h; in field 9 of /proc/PID/stat */

struct snap_exits {
    int pid;
    int64_t stall_us;
    int held;                       /* who; 0: nobody */
    _Atomic(int64_t) held_since_us; /* 0: nobody is */
    uint64_t again[SNAP_AGAIN_CALLS / 64];
    pthread_mutex_t lock; /* guards both below */
    int tid;              /* who serves; 0: nobody */
    int ended;
};

int snap_exits_new(int pid, int stall_ms, const uint64_t *again, snap_exits **made)
{
    snap_exits *e = calloc(1, sizeof *e);
    if (!e)
        return -ENOMEM;
    e->pid = pid;
    e->stall_us = (int64_t)stall_ms * 1000;
    memcpy(e->again, again, sizeof e->again);
    pthread_mutex_init(&e->lock, NULL);
    *made = e;
    return 0;
}

void snap_exits_free(snap_exits *e)
{
    pthread_mutex_destroy(&e->lock);
    free(e);
}

int snap_exits_holds(snap_exits *e)
{
    return e->held_since_us != 0;
}

void snap_exits_end(snap_exits *e)
{
    pthread_mutex_lock(&e->lock);
    e->ended = 1;
    if (e->tid) /* which has it blocked, and waits for it */
        syscall(SYS_tgkill, getpid(), e->tid, SIGCHLD);
    pthread_mutex_unlock(&e->lock);
}

/* Whether to go on. */
static int serves(snap_exits *e, int tid)
{
    pthread_mutex_lock(&e->lock);
    int ended = e->ended;
    e->tid = ended ? 0 : tid;
    pthread_mutex_unlock(&e->lock);
    return !ended;
}

/* Whether a thread that was seized just now has begun to end before: it will not stop any more. */
static int is_ending(int tid)
{
    char state;
    unsigned flags;
    return snap_stat(tid, &state, &flags) < 0 || flags & PF_EXITING;
}

static int takes_over(const snap_exits *e, int tid, int ending)
{
    return tid != ending && tid > 0 &&
           snap_seize_beside(tid, ending, e->pid, SNAP_PTRACE_O_TRACEEXIT) == 0 &&
           !is_ending(tid);
}

/* Seizes another thread in place of one that ends alone; the leader if there is nobody else, as
   freeze.py says. Whether there was one. */
static int another(const snap_exits *e, int ending)
{
    char path[32];
    int found = 0;
    snprintf(path, sizeof path, "/proc/%d/task", e->pid);
    DIR *tasks = opendir(path);
    if (!tasks)
        return 0;
    for (struct dirent *entry; !found && (entry = readdir(tasks));) {
        int tid = atoi(entry->d_name);
        found = tid != e->pid && takes_over(e, tid, ending);
    }
    closedir(tasks);
    return found || takes_over(e, e->pid, ending);
}

/* Whether the memory would go with the thread. */
static int to_be_held(const snap_exits *e, int tid)
{
    unsigned long status = 0;
    unsigned char registers[SNAP_REGISTERS_SIZE];
    ptrace(PTRACE_GETEVENTMSG, tid, NULL, &status);
    if (WTERMSIG((int)status))
        return WTERMSIG((int)status) != SIGKILL;
    return snap_get_registers(tid, registers, sizeof registers) < 0 ||
           snap_arch_call(registers) != SYS_exit || !another(e, tid);
}

/* A thread is stopped. A signal is passed on without being waited for first: see poll_stop in
   ptrace.c. It may have interrupted a call although nobody handles it, for it is ignored: a tracer is
   told of those too. Errors: it was killed. */
static void pass_on(snap_exits *e, int tid, int stop)
{
    if (snap_stop_signal(stop)) {
        snap_make_again(tid, e->again);
        snap_resume(tid, SNAP_RESUME_CONT, snap_stop_signal(stop));
        return;
    }
    snap_take_signal(tid); /* or it would be found again and again */
    if (!snap_is_exit_stop(stop)) {
        snap_run_on(tid, stop);
    } else if (to_be_held(e, tid)) {
        e->held = tid;
        e->held_since_us = snap_now_us();
    } else {
        snap_resume(tid, SNAP_RESUME_CONT, 0);
    }
}

/* What there is to be known of any of our tracees; -1: we have none. */
static int look(siginfo_t *info)
{
    info->si_pid = 0;
    return waitid(P_ALL, 0, info, WSTOPPED | WEXITED | WNOHANG | WNOWAIT | __WALL | __WNOTHREAD);
}

/* The end of a tracer can come between a signal that nobody handles, which has woken the thread, and
   its stop, in which the call would be made again. So a thread that has just stopped is let go there,
   and one that runs may do so for a moment: it does where signals are frequent. */
static void part(snap_exits *e)
{
    if (e->held) {
        snap_detach(e->held, 0);
        return;
    }
    siginfo_t info;
    struct timespec moment = {0, GONE_NS};
    for (int64_t until = snap_now_us() + PART_US; snap_now_us() < until; nanosleep(&moment, NULL)) {
        if (look(&info) < 0)
            return;
        if (info.si_pid == 0 || info.si_code != CLD_TRAPPED)
            continue;
        int signal = snap_stop_signal(info.si_status << 8 | 0x7f);
        if (signal)
            snap_make_again(info.si_pid, e->again);
        snap_detach(info.si_pid, signal);
    }
}

static int serve(snap_exits *e, int self, snap_doze *doze)
{
    siginfo_t info;
    while (serves(e, self)) {
        if (look(&info) < 0)
            break;
        int tid = info.si_pid;
        if (tid && info.si_code == CLD_TRAPPED) {
            pass_on(e, tid, info.si_status << 8 | 0x7f);
        } else if (tid == e->pid) {
            break; /* all of it has ended: its parent hears of that when we do */
        } else if (tid) {
            snap_reap_ended(tid);
        } else if (e->held_since_us && snap_now_us() - e->held_since_us > e->stall_us) {
            return -ETIMEDOUT;
        } else {
            snap_doze_until(doze, INT64_MAX);
        }
    }
    return 0;
}

int snap_exits_serve(snap_exits *e)
{
    snap_doze doze;
    snap_doze_begin(&doze);
    int result = serve(e, (int)syscall(SYS_gettid), &doze);
    part(e);
    pthread_mutex_lock(&e->lock);
    e->tid = 0;
    pthread_mutex_unlock(&e->lock);
    snap_doze_end(&doze);
    return result;
}

void snap_exits_await_thread(int tid)
{
    struct timespec moment = {0, GONE_NS};
    while (syscall(SYS_tgkill, getpid(), tid, 0) == 0)
        nanosleep(&moment, NULL);
}
