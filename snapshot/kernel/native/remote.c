#define _GNU_SOURCE
#include "remote.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <time.h>

#define SIGNAL_BIT(signal) (1ull << ((signal) - 1))
#define RSEQ_CS_OFFSET 8 /* struct rseq: cpu_id_start, cpu_id, then rseq_cs */

static int64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

/* Remembers what the thread has and blocks its signals. */
static int borrow(snap_injection *at)
{
    int result = snap_get_registers(at->tid, at->registers, sizeof at->registers);
    if (result == 0)
        result = snap_get_signal_mask(at->tid, &at->signal_mask);
    if (result < 0)
        return result;
    snap_rseq rseq;
    at->rseq_address = 0;
    at->critical_section = 0;
    if (snap_get_rseq(at->tid, &rseq) == 0 && rseq.address) {
        at->rseq_address = rseq.address;
        result = snap_read_memory(at->tid, rseq.address + RSEQ_CS_OFFSET, &at->critical_section,
                                  sizeof at->critical_section);
        if (result < 0)
            return result;
    }
    at->event_stop = at->stop;
    at->borrowed = 1;
    return snap_set_signal_mask(at->tid, at->use_loop ? ~SIGNAL_BIT(SIGTRAP) : ~0ull);
}

static int put_back(snap_injection *at)
{
    int result = snap_set_registers(at->tid, at->registers, sizeof at->registers);
    if (result == 0 && at->critical_section)
        result = snap_write_memory(at->tid, at->rseq_address + RSEQ_CS_OFFSET,
                                   &at->critical_section, sizeof at->critical_section);
    if (result == 0)
        result = snap_set_signal_mask(at->tid, at->signal_mask);
    if (result == 0)
        at->borrowed = 0;
    return result;
}

/* From a stop of any kind to an event stop. The interrupt comes first: registers that belong to an
   interrupted system call must never run on without passing the kernel's restart logic. */
static int give_back_stopped(snap_injection *at)
{
    int signal = snap_stop_signal(at->stop) == SIGSTOP ? SIGSTOP : 0;
    int result = snap_interrupt(at->tid);
    if (result == 0)
        result = put_back(at);
    if (result == 0)
        result = snap_resume(at->tid, SNAP_RESUME_CONT, signal);
    return result < 0 ? result : snap_await_event_stop(at->tid, at->timeout_us, &at->stop);
}

/* From the loop's trap: with the signal taken away it is as good as an event stop, inside get_signal
   with no signal in hand. */
static int give_back_trapped(snap_injection *at)
{
    at->stop = at->event_stop;
    return put_back(at);
}

int snap_give_back(snap_injection *at)
{
    if (!at->borrowed)
        return 0;
    if (at->stop == 0) {
        int result = snap_interrupt(at->tid);
        if (result == 0)
            result = snap_wait(at->tid, at->timeout_us, &at->stop);
        if (result < 0)
            return result;
    }
    return give_back_stopped(at);
}

static int wait_until(snap_injection *at, int64_t deadline)
{
    at->stop = 0;
    int result = snap_wait(at->tid, deadline - now_us(), &at->stop);
    if (result == 0 && snap_is_event_stop(at->stop))
        at->event_stop = at->stop;
    return result;
}

/* A SIGTRAP from outside stands in the way of ours: with everything blocked the kernel queues it
   again, siginfo and all, for the time after the calls. */
static int put_off_trap(snap_injection *at)
{
    int result = snap_set_signal_mask(at->tid, ~0ull);
    return result < 0 ? result : snap_halt(at->tid, at->timeout_us, &at->stop);
}

/* Runs until the loop's trap. Returns how many calls are complete, their results in `calls`: all,
   or fewer when somebody sent a SIGTRAP, which is put off. *trapped: the thread stands in our own
   trap, the signal taken from it. */
static int run_loop(snap_injection *at, snap_call *calls, int count, int64_t deadline,
                    int *trapped)
{
    unsigned char registers[SNAP_REGISTERS_SIZE];
    memcpy(registers, at->registers, sizeof registers);
    snap_arch_enter_loop(registers, at->loop, at->array, (uint32_t)count);
    int result = snap_write_memory(at->tid, at->array, calls, (size_t)count * sizeof *calls);
    if (result == 0)
        result = snap_set_registers(at->tid, registers, sizeof registers);
    int signal = 0;
    while (result == 0) {
        result = snap_resume(at->tid, SNAP_RESUME_CONT, signal == SIGSTOP ? SIGSTOP : 0);
        if (result == 0)
            result = wait_until(at, deadline);
        /* Group stops, stops left over from an earlier interrupt, SIGSTOP: on we go. The process is
           a stopped one then, and stays so when it is let go. */
        signal = result == 0 ? snap_stop_signal(at->stop) : 0;
        if (signal && signal != SIGSTOP)
            break;
    }
    if (result < 0)
        return result;
    if (signal != SIGTRAP)
        return -EFAULT;

    int64_t last;
    int stored;
    siginfo_t info;
    result = snap_get_registers(at->tid, registers, sizeof registers);
    if (result == 0)
        result = snap_get_siginfo(at->tid, &info);
    if (result < 0)
        return result;
    int complete = (int)snap_arch_loop_progress(registers, at->loop, at->array, &last, &stored);
    if (complete > count)
        return -EFAULT;
    *trapped = info.si_code == SI_KERNEL && complete == count;
    result = *trapped ? snap_take_signal(at->tid) : put_off_trap(at);
    if (result < 0)
        return result;
    result = snap_read_memory(at->tid, at->array, calls, (size_t)complete * sizeof *calls);
    if (!stored)
        calls[complete - 1].result = last;
    return result < 0 ? result : complete;
}

/* Resumes up to the next system call stop. */
static int step_syscall(snap_injection *at, int64_t deadline)
{
    int signal = 0;
    for (;;) {
        int result = snap_resume(at->tid, SNAP_RESUME_SYSCALL, signal);
        if (result == 0)
            result = wait_until(at, deadline);
        if (result < 0 || snap_is_syscall_stop(at->stop))
            return result;
        signal = snap_stop_signal(at->stop);
        if (signal && signal != SIGSTOP)
            return -EFAULT;
    }
}

static int step_call(snap_injection *at, snap_call *call, int64_t deadline)
{
    unsigned char registers[SNAP_REGISTERS_SIZE];
    do {
        memcpy(registers, at->registers, sizeof registers);
        snap_arch_enter_syscall(registers, at->instruction, call);
        int result = snap_set_registers(at->tid, registers, sizeof registers);
        if (result == 0)
            result = step_syscall(at, deadline); /* the entry */
        if (result == 0)
            result = step_syscall(at, deadline); /* the exit */
        if (result == 0)
            result = snap_get_registers(at->tid, registers, sizeof registers);
        if (result < 0)
            return result;
        call->result = snap_arch_result(registers);
    } while (snap_arch_is_restart(call->result)); /* a SIGSTOP came: make it again */
    return 0;
}

int snap_inject(snap_injection *at, snap_call *calls, int count)
{
    int64_t deadline = now_us() + at->timeout_us;
    int result = borrow(at);
    int complete = 0;
    int trapped = 0;
    if (result == 0 && at->use_loop && count > 0) {
        result = run_loop(at, calls, count, deadline, &trapped);
        complete = result < 0 ? count : result;
    }
    for (; result >= 0 && complete < count; complete++)
        result = step_call(at, &calls[complete], deadline);
    if (result == -ESRCH)
        return result;
    at->fault = at->stop;
    int back = trapped ? give_back_trapped(at) : snap_give_back(at);
    return result < 0 ? result : back;
}
