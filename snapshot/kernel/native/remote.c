#define _GNU_SOURCE
#include "remote.h"

#include "ptrace_internal.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SIGNAL_BIT(signal) (1ull << ((signal) - 1))

/* Between two steps of which each changes something in the target. */
static void point(snap_injection *at)
{
    if (at->die_at && ++at->passed == at->die_at)
        kill(getpid(), SIGKILL);
}

/* Where the restartable sequence that the thread stands in has it abort; 0: it stands in none. */
static int abort_address(snap_injection *at, uint64_t *address)
{
    struct {
        uint32_t version, flags;
        uint64_t start, length, abort;
    } section;
    *address = 0;
    if (!at->critical_section)
        return 0;
    int result = snap_read_memory(at->tid, at->critical_section, &section, sizeof section);
    if (result == 0 && snap_arch_rip(at->registers) - section.start < section.length)
        *address = section.abort;
    return result == -EFAULT ? 0 : result;
}

static uint64_t record(const snap_injection *at)
{
    return at->guard + snap_guard_record(at->slot);
}

/* The way home of this thread, in one write to one page: whole, or as before. */
static int put_record(snap_injection *at)
{
    unsigned char bytes[SNAP_GUARD_SLOT];
    uint64_t abort_ip;
    int result = abort_address(at, &abort_ip);
    if (result < 0)
        return result;
    snap_home home = {.signal_mask = at->signal_mask,
                      .deliverable = at->caught & ~at->signal_mask,
                      .quiet = at->quiet,
                      .scratch = at->scratch,
                      .scratch_size = at->scratch_size,
                      .undo = at->undo,
                      .undo_call = at->undo_call,
                      .owed = at->owed};
    snap_guard_home(&home, at->registers, abort_ip);
    snap_guard_fill_slot(bytes, &home);
    return snap_write_through(at->mem, record(at), bytes, sizeof bytes);
}

/* From here on it is this thread (0: no thread) that unmaps the scratch on its way. */
static int put_in_charge(snap_injection *at, uint64_t record)
{
    return snap_write_through(at->mem, at->guard + snap_guard_in_charge(), &record, sizeof record);
}

int snap_guard_place(snap_injection *at)
{
    uint64_t size;
    const unsigned char *code = snap_guard_code(&size);
    int result = put_in_charge(at, 0);
    return result < 0 ? result : snap_write_through(at->mem, at->guard, code, size);
}

int snap_guard_wipe(snap_injection *at)
{
    unsigned char zeros[1 << 12] = {0};
    return at->guard ? snap_write_through(at->mem, at->guard, zeros, snap_guard_size()) : 0;
}

static int park(snap_injection *at)
{
    unsigned char parked[SNAP_REGISTERS_SIZE];
    memcpy(parked, at->registers, sizeof parked);
    snap_guard_park(parked, at->guard, record(at));
    return snap_set_registers(at->tid, parked, sizeof parked);
}

/* The thread of `at` has charge of the scratch: its own registers are known. */
static int is_parked(snap_injection *at)
{
    const snap_injection *who = at->parked ? *at->parked : NULL;
    if (!who || who->tid != at->tid)
        return 0;
    if (who != at) {
        memcpy(at->registers, who->registers, sizeof at->registers);
        at->signal_mask = who->signal_mask;
        at->rseq_address = who->rseq_address;
        at->critical_section = who->critical_section;
        at->slot = who->slot;
        *at->parked = at;
    }
    return 1;
}

/* Takes charge of the scratch, and gives the thread that had it its own registers. That it has ended
   is no failure. */
static int take_over(snap_injection *at)
{
    snap_injection *before = at->parked ? *at->parked : NULL;
    int result = at->scratch ? put_in_charge(at, record(at)) : 0;
    point(at);
    if (result < 0 || !before)
        return result;
    *at->parked = NULL;
    result = snap_set_registers(before->tid, before->registers, sizeof before->registers);
    return result == -ESRCH ? 0 : result;
}

static int remember(snap_injection *at)
{
    int result = snap_get_registers(at->tid, at->registers, sizeof at->registers);
    if (result == 0)
        result = snap_get_signal_mask(at->tid, &at->signal_mask);
    snap_rseq rseq;
    at->rseq_address = 0;
    at->critical_section = 0;
    if (result < 0 || snap_get_rseq(at->tid, &rseq) < 0 || !rseq.address)
        return result;
    at->rseq_address = rseq.address;
    return snap_read_memory(at->tid, rseq.address + SNAP_RSEQ_CS, &at->critical_section,
                            sizeof at->critical_section);
}

/* Remembers what the thread has and blocks its signals. With a guard the registers come first: from
   then on the thread would go home by itself, whatever its mask. */
static int borrow(snap_injection *at)
{
    int was_parked = is_parked(at);
    int result = was_parked ? 0 : remember(at);
    if (result < 0)
        return result;
    at->event_stop = at->stop;
    at->trapped = 0;
    at->quiet = 0;
    uint64_t candidates = at->ignored & ~at->signal_mask;
    if (at->guard && candidates)
        at->quiet = 64 - (uint64_t)__builtin_clzll(candidates); /* the higher, the less it is used */
    if (at->guard) {
        if (!was_parked)
            at->slot = at->parked && *at->parked && (*at->parked)->slot == 0;
        result = put_record(at);
        point(at);
        if (result == 0 && !was_parked)
            result = park(at);
        point(at);
        if (result == 0 && !was_parked)
            result = take_over(at);
        if (result < 0)
            return result;
    }
    point(at);
    at->borrowed = 1;
    uint64_t open = at->guard ? at->quiet : at->use_loop ? SIGTRAP : 0;
    result = snap_set_signal_mask(at->tid, open ? ~SIGNAL_BIT(open) : ~0ull);
    point(at);
    return result;
}

/* The registers come last, and carry a guarded thread home until then; and for as long as there is a
   scratch to be unmapped on the way. */
static int put_back(snap_injection *at)
{
    int result = at->guard ? park(at)
                           : snap_set_registers(at->tid, at->registers, sizeof at->registers);
    if (result == 0 && at->critical_section)
        result = snap_write_memory(at->tid, at->rseq_address + SNAP_RSEQ_CS,
                                   &at->critical_section, sizeof at->critical_section);
    point(at);
    if (result == 0)
        result = snap_set_signal_mask(at->tid, at->signal_mask);
    point(at);
    int stays = at->guard && at->scratch && at->parked;
    if (result == 0 && at->guard && !stays)
        result = snap_set_registers(at->tid, at->registers, sizeof at->registers);
    if (result == 0) {
        at->borrowed = 0;
        if (stays)
            *at->parked = at;
        else if (is_parked(at))
            *at->parked = NULL;
    }
    point(at);
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
    int result = snap_wait(at->tid, deadline - snap_now_us(), &at->stop);
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

/* Has the thread told us that its calls are made? */
static int at_the_end(snap_injection *at)
{
    unsigned char registers[SNAP_REGISTERS_SIZE];
    return snap_get_registers(at->tid, registers, sizeof registers) == 0 &&
           snap_arch_rip(registers) == at->guard + snap_guard_told();
}

/* Runs on until the signal `told` of its own, with which it tells that it is done. */
static int run_to_tell(snap_injection *at, int64_t deadline, int told)
{
    int signal = 0;
    for (;;) {
        point(at);
        int result = snap_resume(at->tid, SNAP_RESUME_CONT, signal == SIGSTOP ? SIGSTOP : 0);
        point(at);
        if (result == 0)
            result = wait_until(at, deadline);
        point(at);
        if (result < 0)
            return result;
        /* Group stops, stops left over from an earlier interrupt, SIGSTOP: on we go. The process is
           a stopped one then, and stays so when it is let go. */
        signal = snap_stop_signal(at->stop);
        if (signal && signal != SIGSTOP && !(at->guard && signal == told && !at_the_end(at)))
            break; /* (the quiet signal from outside is ignored, as the target would) */
    }
    if (signal != told)
        return -EFAULT;
    if (!at->guard)
        return 0;
    at->trapped = 1;
    return snap_take_signal(at->tid);
}

/* Runs until the loop's trap. Returns how many calls are complete, their results in `calls`: all,
   or fewer when somebody sent a SIGTRAP, which is put off. */
static int run_loop(snap_injection *at, snap_call *calls, int count, int64_t deadline)
{
    unsigned char registers[SNAP_REGISTERS_SIZE];
    memcpy(registers, at->registers, sizeof registers);
    snap_arch_enter_loop(registers, at->loop, at->array, (uint32_t)count);
    if (at->guard)
        snap_guard_lead(registers, record(at));
    int result = snap_write_memory(at->tid, at->array, calls, (size_t)count * sizeof *calls);
    if (result == 0)
        result = snap_set_registers(at->tid, registers, sizeof registers);
    if (result == 0)
        result = run_to_tell(at, deadline, at->guard ? (int)at->quiet : SIGTRAP);
    if (result == 0 && at->guard)
        result = snap_read_memory(at->tid, at->array, calls, (size_t)count * sizeof *calls);
    if (result < 0 || at->guard)
        return result < 0 ? result : count;

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
    at->trapped = info.si_code == SI_KERNEL && complete == count;
    result = at->trapped ? snap_take_signal(at->tid) : put_off_trap(at);
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

/* `code`: offset into the guard, if there is one. */
static int step_call(snap_injection *at, uint64_t code, snap_call *call, int64_t deadline)
{
    unsigned char registers[SNAP_REGISTERS_SIZE];
    do {
        memcpy(registers, at->registers, sizeof registers);
        uint64_t instruction = at->guard ? at->guard + code : at->instruction;
        snap_arch_enter_syscall(registers, instruction, call);
        if (at->guard)
            snap_guard_lead(registers, record(at));
        int result = snap_set_registers(at->tid, registers, sizeof registers);
        point(at);
        if (result == 0)
            result = step_syscall(at, deadline); /* the entry */
        point(at);
        if (result == 0)
            result = step_syscall(at, deadline); /* the exit */
        point(at);
        if (result == 0)
            result = snap_get_registers(at->tid, registers, sizeof registers);
        if (result < 0)
            return result;
        call->result = snap_arch_result(registers);
    } while (snap_arch_is_restart(call->result)); /* a SIGSTOP came: make it again */
    return 0;
}

/* The same with one stop in place of two: the guard's code tells of the result. */
static int tell_call(snap_injection *at, uint64_t code, snap_call *call, int64_t deadline)
{
    unsigned char registers[SNAP_REGISTERS_SIZE];
    memcpy(registers, at->registers, sizeof registers);
    snap_arch_enter_syscall(registers, at->guard + code, call);
    snap_guard_lead(registers, record(at));
    int result = snap_set_registers(at->tid, registers, sizeof registers);
    if (result == 0)
        result = run_to_tell(at, deadline, (int)at->quiet);
    if (result == 0)
        result = snap_get_registers(at->tid, registers, sizeof registers);
    call->result = snap_guard_result(registers);
    return result;
}

static int make_call_at(snap_injection *at, uint64_t code, snap_call *call, int64_t deadline)
{
    return at->guard && at->quiet ? tell_call(at, code, call, deadline)
                                  : step_call(at, code, call, deadline);
}

static int make_call(snap_injection *at, snap_call *call, int64_t deadline)
{
    return make_call_at(at, snap_guard_call(), call, deadline);
}

static int give_back_now(snap_injection *at)
{
    at->fault = at->stop;
    return at->trapped ? give_back_trapped(at) : snap_give_back(at);
}

/* What the one call of a batch has mapped is the scratch from here on: no longer undone by the call's
   own return, which lies behind the thread when it is parked. */
static int keep_mapped(snap_injection *at, int64_t mapped)
{
    if (!at->guard || !at->undo || mapped <= 0)
        return 0;
    at->scratch = (uint64_t)mapped;
    at->scratch_size = at->undo;
    at->undo = 0;
    int result = put_in_charge(at, record(at)); /* of nothing, as the record says so far */
    point(at);
    return result < 0 ? result : put_record(at);
}

int snap_inject(snap_injection *at, snap_call *calls, int count)
{
    int64_t deadline = snap_now_us() + at->timeout_us;
    int result = borrow(at);
    int complete = 0;
    if (result == 0 && at->use_loop && (!at->guard || at->quiet) && count > 0) {
        result = run_loop(at, calls, count, deadline);
        complete = result < 0 ? count : result;
    }
    for (; result >= 0 && complete < count; complete++)
        result = make_call(at, &calls[complete], deadline);
    if (result >= 0 && count == 1)
        result = keep_mapped(at, calls[0].result);
    if (result == -ESRCH)
        return result;
    int back = give_back_now(at);
    return result < 0 ? result : back;
}

int snap_make(snap_injection *at, snap_call *call)
{
    at->use_loop = 0;
    at->undo = 1;
    at->undo_call = SYS_close;
    int result = borrow(at);
    at->undo = 0;
    if (result == 0)
        result = make_call(at, call, snap_now_us() + at->timeout_us);
    at->fault = at->stop;
    return result;
}

int snap_clone_thread(snap_injection *at, uint64_t flags, int64_t *tid)
{
    snap_call call = {.nr = SYS_clone, .args = {flags}};
    int result = snap_guard_place(at);
    at->use_loop = 0;
    if (result == 0)
        result = borrow(at);
    if (result == 0)
        result = make_call_at(at, snap_guard_clone(), &call, snap_now_us() + at->timeout_us);
    *tid = call.result;
    if (result == -ESRCH)
        return result;
    int back = give_back_now(at);
    return result < 0 ? result : back;
}

/* Up to where the thread has unmapped the scratch on its way home, by system call stops. */
static int step_to_unmapped(snap_injection *at, int64_t deadline)
{
    unsigned char registers[SNAP_REGISTERS_SIZE];
    int result = 0;
    for (int stops = 0; result == 0 && stops < 2;) {
        result = step_syscall(at, deadline);
        if (result == 0)
            result = snap_get_registers(at->tid, registers, sizeof registers);
        stops += result == 0 && snap_arch_call(registers) == SYS_munmap;
        point(at);
    }
    return result;
}

int snap_unmap_scratch(snap_injection *at)
{
    int64_t deadline = snap_now_us() + at->timeout_us;
    at->use_loop = 0;
    int result = borrow(at);
    if (result == 0)
        result = at->quiet ? run_to_tell(at, deadline, (int)at->quiet) : step_to_unmapped(at, deadline);
    if (result == 0) {
        at->scratch = at->owed = 0;
        result = put_in_charge(at, 0);
        point(at);
    }
    if (result == -ESRCH)
        return result;
    int back = give_back_now(at);
    return result < 0 ? result : back;
}

int snap_unmake(snap_injection *at, int64_t descriptor)
{
    /* The guard's record still says close: of what this call returns, that is of nothing. */
    snap_call closing = {.nr = SYS_close, .args = {(uint64_t)descriptor}};
    int result = descriptor < 0 ? 0 : make_call(at, &closing, snap_now_us() + at->timeout_us);
    int back = give_back_now(at);
    return result < 0 ? result : back;
}
