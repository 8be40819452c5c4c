#define _GNU_SOURCE
#include "ptrace_internal.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef NT_X86_XSTATE
#define NT_X86_XSTATE 0x202
#endif
#define GET_RSEQ_CONFIGURATION 0x420f
#define EVENT_STOP 128 /* PTRACE_EVENT_STOP */
#define SIGSET_BYTES 8
/* SIGCHLD tells of stops; where the program has turned that off, or another thread may be told in our
   place, we look this often. */
#define LOOK_US 500
/* Where neither can be: later than the next tick. A timer that is sooner has to be programmed, which
   takes a virtual processor 5 to 10 us, and as much again when it is not needed any more. */
#define LOOK_RARELY_US 12000
#define LOOK_ONCE_MORE_US 2
#define REAP_NS 50000

static int done(long result)
{
    return result < 0 ? -errno : 0;
}

int64_t snap_now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

int snap_is_event_stop(int stop)
{
    return (unsigned)stop >> 16 == EVENT_STOP;
}

int snap_stop_signal(int stop)
{
    int signal = WSTOPSIG(stop);
    return (unsigned)stop >> 16 == 0 && !(signal & 0x80) ? signal : 0;
}

int snap_is_syscall_stop(int stop)
{
    return (unsigned)stop >> 16 == 0 && WSTOPSIG(stop) == (SIGTRAP | 0x80);
}

int snap_is_exit_stop(int stop)
{
    return (unsigned)stop >> 16 == PTRACE_EVENT_EXIT;
}

int snap_seize(int tid, unsigned long options)
{
    return done(ptrace(PTRACE_SEIZE, tid, NULL, (void *)options));
}

int snap_interrupt(int tid)
{
    return done(ptrace(PTRACE_INTERRUPT, tid, NULL, NULL));
}

int snap_set_options(int tid, unsigned long options)
{
    return done(ptrace(PTRACE_SETOPTIONS, tid, NULL, (void *)options));
}

int snap_resume(int tid, int how, int signal)
{
    return done(ptrace(how == SNAP_RESUME_SYSCALL ? PTRACE_SYSCALL : PTRACE_CONT, tid, NULL,
                       (void *)(long)signal));
}

int snap_detach(int tid, int signal)
{
    return done(ptrace(PTRACE_DETACH, tid, NULL, (void *)(long)signal));
}

int snap_run_on(int tid, int stop)
{
    int stopped = snap_is_event_stop(stop) && WSTOPSIG(stop) != SIGTRAP;
    return done(ptrace(stopped ? PTRACE_LISTEN : PTRACE_CONT, tid, NULL, NULL));
}

static int take_stop(int tid)
{
    siginfo_t info;
    int result = waitid(P_PID, (id_t)tid, &info, WSTOPPED | WNOHANG | __WALL);
    return result < 0 ? -errno : 1;
}

/* One look. 1: *stop is a stop; 0: it runs; -ESRCH: it ended or is not ours.
   It is a look only (WNOWAIT): the kernel clears the signal of a stop that was waited for, so that a
   tracer that died just then would take a signal of the target along. Other stops are taken: seen
   by a waitpid(2) of the target's parent, when that is this process, they would look like its end. */
static int poll_stop(int tid, int *stop)
{
    siginfo_t info = {.si_pid = 0};
    if (waitid(P_PID, (id_t)tid, &info, WSTOPPED | WEXITED | WNOHANG | WNOWAIT | __WALL) < 0)
        return errno == ECHILD ? -ESRCH : -errno;
    if (info.si_pid == 0)
        return 0;
    if (info.si_code != CLD_TRAPPED)
        return -ESRCH;
    *stop = info.si_status << 8 | 0x7f;
    return snap_stop_signal(*stop) ? 1 : take_stop(tid);
}

int snap_take_signal(int tid)
{
    int result = take_stop(tid);
    return result < 0 ? result : 0;
}

/* Looks first: for a tracer waitid reports stops whatever its flags, and would take one away. */
int snap_reap_ended(int tid)
{
    siginfo_t info = {.si_pid = 0};
    if (waitid(P_PID, (id_t)tid, &info, WEXITED | WNOHANG | WNOWAIT | __WALL) < 0)
        return -errno;
    if (info.si_pid == 0 || info.si_code == CLD_TRAPPED)
        return 0;
    return waitid(P_PID, (id_t)tid, &info, WEXITED | WNOHANG | __WALL) < 0 ? -errno : 1;
}

int snap_reap(int tid, int64_t timeout_us)
{
    int64_t deadline = snap_now_us() + timeout_us;
    for (;;) {
        int reaped = snap_reap_ended(tid);
        if (reaped != 0)
            return reaped == 1 || reaped == -ECHILD ? 0 : reaped;
        if (snap_now_us() >= deadline)
            return -ETIMEDOUT;
        nanosleep(&(struct timespec){.tv_nsec = REAP_NS}, NULL); /* it needs a processor for that */
    }
}

static void child_signal(sigset_t *set)
{
    sigemptyset(set);
    sigaddset(set, SIGCHLD);
}

static atomic_int all_hear;

void snap_hear_stops(int all)
{
    atomic_store(&all_hear, all);
}

void snap_doze_begin(snap_doze *doze)
{
    sigset_t child;
    child_signal(&child);
    doze->swallowed = 0;
    pthread_sigmask(SIG_BLOCK, &child, &doze->before);
}

void snap_doze_until(snap_doze *doze, int64_t deadline)
{
    int64_t left = deadline - snap_now_us();
    int64_t most = atomic_load(&all_hear) ? LOOK_RARELY_US : LOOK_US;
    if (left <= 0)
        return;
    sigset_t child;
    child_signal(&child);
    siginfo_t info;
    struct timespec limit = {0, (left < most ? left : most) * 1000};
    int number = sigtimedwait(&child, &info, &limit);
    if (number == SIGCHLD && info.si_code != CLD_TRAPPED && info.si_code != CLD_STOPPED &&
        info.si_code != SI_TKILL)
        doze->swallowed = 1;
}

void snap_doze_end(snap_doze *doze)
{
    if (doze->swallowed)
        kill(getpid(), SIGCHLD);
    pthread_sigmask(SIG_SETMASK, &doze->before, NULL);
}

int snap_stat(int tid, char *state, unsigned *flags)
{
    char path[32], text[512];
    snprintf(path, sizeof path, "/proc/%d/stat", tid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    ssize_t got = read(fd, text, sizeof text - 1);
    close(fd);
    if (got < 0)
        return -errno;
    text[got] = 0;
    const char *fields = strrchr(text, ')'); /* the name before it may hold anything */
    return fields && sscanf(fields, ") %c %*d %*d %*d %*d %*d %u", state, flags) == 2 ? 0 : -EPROTO;
}

/* The end of a leader is told when all others are reaped, which may be ours too: not in the time of a
   wait for it. */
static int is_zombie(int tid)
{
    char state;
    unsigned flags;
    int result = snap_stat(tid, &state, &flags);
    return result == -ENOENT || result == -ESRCH || (result == 0 && (state == 'Z' || state == 'X'));
}

static int sleep_until_stop(int tid, int64_t deadline, int *stop)
{
    snap_doze doze;
    int64_t ask_at = snap_now_us() + SNAP_ASK_AFTER_US;
    int found;
    snap_doze_begin(&doze);
    while ((found = poll_stop(tid, stop)) == 0 && snap_now_us() < deadline) {
        snap_doze_until(&doze, deadline);
        if (snap_now_us() < ask_at)
            continue;
        ask_at = snap_now_us() + SNAP_ASK_AFTER_US;
        if (is_zombie(tid)) {
            found = -ESRCH;
            break;
        }
    }
    snap_doze_end(&doze);
    return found == 0 ? -ETIMEDOUT : found;
}

int snap_wait(int tid, int64_t timeout_us, int *stop)
{
    static _Thread_local int slept_for; /* it runs on this processor, as soon as we sleep */
    int64_t begin = snap_now_us();
    int64_t spin_us = tid == slept_for ? LOOK_ONCE_MORE_US : SNAP_SPIN_US;
    int found;
    do
        found = poll_stop(tid, stop);
    while (found == 0 && snap_now_us() - begin < spin_us);
    slept_for = found == 0 ? tid : 0;
    if (found == 0)
        found = sleep_until_stop(tid, begin + timeout_us, stop);
    return found < 0 ? found : 0;
}

/* Sends a thread that stopped elsewhere on to its event stop. A trap of any kind clears a pending
   PTRACE_INTERRUPT (task_clear_jobctl_pending in ptrace_stop), so it is asked for again. */
static int toward_event_stop(int tid, int stop)
{
    int result = snap_interrupt(tid);
    return result < 0 ? result : snap_resume(tid, SNAP_RESUME_CONT, snap_stop_signal(stop));
}

/* 0 and the stop it is in; -EAGAIN: it runs; -ESRCH: it is not ours. */
static int ask(int tid, int *stop)
{
    siginfo_t info;
    if (ptrace(PTRACE_GETSIGINFO, tid, NULL, &info) < 0) {
        int result = snap_interrupt(tid);
        return result < 0 ? result : -EAGAIN;
    }
    int told_by_code = info.si_code >> 8 == EVENT_STOP || info.si_code == (SIGTRAP | 0x80);
    *stop = (told_by_code ? info.si_code : info.si_signo) << 8 | 0x7f;
    return 0;
}

int snap_await_event_stop(int tid, int64_t timeout_us, int *stop)
{
    int64_t deadline = snap_now_us() + timeout_us;
    for (;;) {
        int64_t left = deadline - snap_now_us();
        *stop = 0;
        int result = snap_wait(tid, left < SNAP_ASK_AFTER_US ? left : SNAP_ASK_AFTER_US, stop);
        if (result == -ETIMEDOUT && left > SNAP_ASK_AFTER_US)
            result = ask(tid, stop);
        if (result == 0 && snap_is_event_stop(*stop))
            return 0;
        if (result == 0)
            result = toward_event_stop(tid, *stop);
        if (result < 0 && result != -EAGAIN)
            return result;
    }
}

int snap_look_for_event_stop(int tid, int asking, int *stop)
{
    int found = poll_stop(tid, stop);
    if (found == 0 && asking) {
        found = ask(tid, stop);
        found = found == -EAGAIN ? 0 : found == 0 ? 1 : found;
    }
    if (found <= 0 || snap_is_event_stop(*stop))
        return found;
    return toward_event_stop(tid, *stop);
}

int snap_halt(int tid, int64_t timeout_us, int *stop)
{
    int result = *stop > 0 ? toward_event_stop(tid, *stop) : snap_interrupt(tid);
    return result < 0 ? result : snap_await_event_stop(tid, timeout_us, stop);
}

int snap_get_registers(int tid, void *registers, size_t size)
{
    struct iovec iov = {registers, size};
    int result = done(ptrace(PTRACE_GETREGSET, tid, (void *)NT_PRSTATUS, &iov));
    return result == 0 && iov.iov_len != size ? -ENOEXEC : result;
}

int snap_set_registers(int tid, const void *registers, size_t size)
{
    struct iovec iov = {(void *)registers, size};
    return done(ptrace(PTRACE_SETREGSET, tid, (void *)NT_PRSTATUS, &iov));
}

long snap_get_xstate(int tid, void *area, size_t size)
{
    struct iovec iov = {area, size};
    if (ptrace(PTRACE_GETREGSET, tid, (void *)NT_X86_XSTATE, &iov) < 0)
        return -errno;
    return (long)iov.iov_len;
}

int snap_set_xstate(int tid, const void *area, size_t size)
{
    struct iovec iov = {(void *)area, size};
    return done(ptrace(PTRACE_SETREGSET, tid, (void *)NT_X86_XSTATE, &iov));
}

int snap_get_signal_mask(int tid, uint64_t *mask)
{
    return done(ptrace(PTRACE_GETSIGMASK, tid, (void *)SIGSET_BYTES, mask));
}

int snap_set_signal_mask(int tid, uint64_t mask)
{
    return done(ptrace(PTRACE_SETSIGMASK, tid, (void *)SIGSET_BYTES, &mask));
}

int snap_get_siginfo(int tid, void *info)
{
    return done(ptrace(PTRACE_GETSIGINFO, tid, NULL, info));
}

int snap_peek_signals(int tid, int shared, uint64_t from, void *infos, int count)
{
    struct {
        uint64_t from;
        uint32_t flags;
        int32_t count;
    } which = {from, shared ? 1 : 0, count};
    long found = ptrace(PTRACE_PEEKSIGINFO, tid, &which, infos);
    return found < 0 ? -errno : (int)found;
}

int snap_get_rseq(int tid, snap_rseq *out)
{
    long got = ptrace(GET_RSEQ_CONFIGURATION, tid, (void *)sizeof *out, out);
    if (got < 0)
        return errno == EIO ? -EOPNOTSUPP : -errno;
    return 0;
}

static int through(int mem, uint64_t address, void *bytes, size_t length, int writing)
{
    for (size_t moved = 0; moved < length;) {
        ssize_t got = writing ? pwrite(mem, (char *)bytes + moved, length - moved, address + moved)
                              : pread(mem, (char *)bytes + moved, length - moved, address + moved);
        if (got <= 0)
            return got < 0 ? -errno : -ESRCH; /* the address space is gone */
        moved += (size_t)got;
    }
    return 0;
}

static int through_proc_mem(int tid, uint64_t address, void *bytes, size_t length, int writing)
{
    char path[32];
    snprintf(path, sizeof path, "/proc/%d/mem", tid);
    int mem = open(path, (writing ? O_RDWR : O_RDONLY) | O_CLOEXEC);
    if (mem < 0)
        return -errno;
    int result = through(mem, address, bytes, length, writing);
    close(mem);
    return result;
}

int snap_read_memory(int tid, uint64_t address, void *bytes, size_t length)
{
    struct iovec local = {bytes, length};
    struct iovec remote = {(void *)address, length};
    ssize_t got = process_vm_readv(tid, &local, 1, &remote, 1, 0);
    if (got == (ssize_t)length)
        return 0;
    if (got < 0 && errno != EFAULT)
        return -errno;
    return through_proc_mem(tid, address, bytes, length, 0);
}

int snap_write_memory(int tid, uint64_t address, const void *bytes, size_t length)
{
    struct iovec local = {(void *)bytes, length};
    struct iovec remote = {(void *)address, length};
    ssize_t got = process_vm_writev(tid, &local, 1, &remote, 1, 0);
    if (got == (ssize_t)length)
        return 0;
    if (got < 0 && errno != EFAULT)
        return -errno;
    return through_proc_mem(tid, address, (void *)bytes, length, 1);
}

int snap_write_through(int mem, uint64_t address, const void *bytes, size_t length)
{
    return through(mem, address, (void *)bytes, length, 1);
}
