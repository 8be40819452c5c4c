#define _GNU_SOURCE
#include "answers.h"

#include <asm/prctl.h>
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MOST_TRIES 100
#define ASK_PERSONALITY 0xFFFFFFFFu
#define STACK_AUTODISARM (1u << 31)
#define IOPRIO_OF_PROCESS 1
#define DEFAULT_PRIORITY 120 /* of nice 0 (include/linux/sched/prio.h) */

typedef struct {
    const snap_task *task;
    snap_task_bits bits;
    uint64_t data, size;
    unsigned char *answers;
} thread;

/* Where the call would write `length` bytes; NULL: not where answers go. */
static void *room_at(const thread *t, uint64_t address, uint64_t length)
{
    const uint64_t at = address - t->data;
    return at <= t->size && length <= t->size - at ? t->answers + at : NULL;
}

static int64_t write_to(const thread *t, uint64_t address, const void *bytes, size_t length)
{
    void *room = room_at(t, address, length);
    if (room)
        memcpy(room, bytes, length);
    return room ? 0 : -EFAULT;
}

/* Of a call that the thread itself may be allowed to make. */
static int64_t result_of(long returned)
{
    if (returned < 0)
        return errno == EPERM || errno == EACCES ? -ENOSYS : -errno;
    return returned;
}

static int64_t alternate_stack(const thread *t, uint64_t address)
{
    const snap_task *task = t->task;
    stack_t stack;
    memset(&stack, 0, sizeof stack);
    stack.ss_sp = (void *)(uintptr_t)task->alternate_stack;
    stack.ss_size = task->alternate_size;
    stack.ss_flags = (int)(task->alternate_flags & STACK_AUTODISARM);
    if (!task->alternate_size)
        stack.ss_flags |= SS_DISABLE;
    return write_to(t, address, &stack, sizeof stack);
}

static int64_t robust_list(const thread *t, uint64_t head, uint64_t length)
{
    const uint64_t size = sizeof(struct robust_list_head);
    const int64_t result = write_to(t, length, &size, sizeof size);
    return result < 0 ? result : write_to(t, head, &t->task->robust_list, sizeof t->task->robust_list);
}

static int64_t timer_slack(const thread *t)
{
    const uint32_t policy = t->task->policy;
    if (policy == SCHED_FIFO || policy == SCHED_RR || policy == 6 /* SCHED_DEADLINE */)
        return 0; /* they have none, whatever the field says */
    return t->task->timer_slack_ns > INT_MAX ? INT_MAX : (int64_t)t->task->timer_slack_ns;
}

static int64_t control(const thread *t, const uint64_t *args)
{
    const snap_task *task = t->task;
    const int tsc = task->flags & t->bits.no_tsc ? PR_TSC_SIGSEGV : PR_TSC_ENABLE;
    switch (args[0]) {
    case PR_GET_TID_ADDRESS:
        return write_to(t, args[1], &task->clear_child_tid, sizeof task->clear_child_tid);
    case PR_GET_NAME:
        return write_to(t, args[1], task->comm, sizeof task->comm);
    case PR_GET_PDEATHSIG:
        return write_to(t, args[1], &task->death_signal, sizeof task->death_signal);
    case PR_GET_TSC:
        return write_to(t, args[1], &tsc, sizeof tsc);
    case PR_GET_SECUREBITS:
        return task->securebits;
    case PR_GET_TIMERSLACK:
        return timer_slack(t);
    }
    return -ENOSYS;
}

/* -ENOSYS: only the thread itself can answer that. */
static int64_t answer(const thread *t, const snap_call *call)
{
    const uint64_t *args = call->args;
    const int tid = t->task->tid;
    void *room;
    switch (call->nr) {
    case SYS_sigaltstack:
        return args[0] ? -ENOSYS : alternate_stack(t, args[1]);
    case SYS_get_robust_list:
        return args[0] ? -ENOSYS : robust_list(t, args[1], args[2]);
    case SYS_prctl:
        return control(t, args);
    case SYS_personality:
        return args[0] == ASK_PERSONALITY ? (int64_t)t->task->personality : -ENOSYS;
    case SYS_arch_prctl:
        return args[0] == ARCH_GET_CPUID ? !(t->task->flags & t->bits.no_cpuid) : -ENOSYS;
    case SYS_getpriority:
        if (args[0] != PRIO_PROCESS || args[1])
            return -ENOSYS;
        return DEFAULT_PRIORITY + 20 - t->task->static_priority; /* 20 - nice: 1 to 40 */
    case SYS_ioprio_get:
        if (args[0] != IOPRIO_OF_PROCESS || args[1])
            return -ENOSYS;
        return result_of(syscall(SYS_ioprio_get, IOPRIO_OF_PROCESS, tid));
    case SYS_sched_getattr:
        if (args[0] || !(room = room_at(t, args[1], args[2])))
            return -ENOSYS;
        return result_of(syscall(SYS_sched_getattr, tid, room, args[2], args[3]));
    case SYS_sched_getaffinity:
        if (args[0] || !(room = room_at(t, args[2], args[1])))
            return -ENOSYS;
        return result_of(syscall(SYS_sched_getaffinity, tid, args[1], room));
    }
    return -ENOSYS;
}

int snap_answer(const snap_task *tasks, int count, snap_task_bits bits, uint64_t data,
                const snap_questions *q)
{
    for (int i = 0; i < count; i++) {
        const thread t = {.task = &tasks[i], .bits = bits, .data = data, .size = q->size,
                          .answers = q->answers + (uint64_t)i * q->size};
        for (int k = 0; k < q->count; k++) {
            const int64_t result = answer(&t, &q->calls[k]);
            if (result == -ENOSYS)
                return -ENOSYS;
            q->results[i * q->count + k] = result;
        }
    }
    return 0;
}

static int own_flags(const snap_task_program *program, uint64_t *flags)
{
    snap_task own;
    int fd = snap_task_iterator(program, gettid(), SNAP_OF_THREAD);
    if (fd < 0)
        return fd;
    int64_t n = snap_task_read(fd, &own, sizeof own);
    close(fd);
    if (n != sizeof own || own.tid != gettid())
        return n < 0 ? (int)n : -EPROTO;
    *flags = own.flags;
    return 0;
}

static int set_tsc(int off)
{
    return prctl(PR_SET_TSC, off ? PR_TSC_SIGSEGV : PR_TSC_ENABLE, 0, 0, 0) < 0 ? -errno : 0;
}

static int set_cpuid(int off)
{
    return syscall(SYS_arch_prctl, ARCH_SET_CPUID, !off) < 0 ? -errno : 0;
}

/* The one bit that is set when and only when the switch is off. Others come and go (TIF_NEED_RESCHED).
   A few system calls without either instruction: nothing notices, for no handler can run. */
static int find_bit(const snap_task_program *program, int (*turn)(int off), uint64_t *bit)
{
    uint64_t candidates = ~0ull, off, on;
    for (int i = 0; i < MOST_TRIES && (i == 0 || candidates & (candidates - 1)); i++) {
        int result = turn(1);
        if (result < 0)
            return result;
        result = own_flags(program, &off);
        turn(0);
        if (result == 0)
            result = own_flags(program, &on);
        if (result < 0)
            return result;
        candidates &= off & ~on;
    }
    *bit = candidates;
    return candidates && !(candidates & (candidates - 1)) ? 0 : -EAGAIN;
}

int snap_task_find_bits(const snap_task_program *program, snap_task_bits *bits)
{
    sigset_t all, before;
    *bits = (snap_task_bits){0};
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int result = find_bit(program, set_tsc, &bits->no_tsc);
    if (result == 0) {
        result = find_bit(program, set_cpuid, &bits->no_cpuid);
        result = result == -ENODEV ? 0 : result;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return result;
}
