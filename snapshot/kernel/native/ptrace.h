/*
 * Stopping threads and reading or changing what they hold in registers. Mechanism without policy.
 *
 * Every function returns 0 or a positive result, or -errno. The caller guarantees that all calls
 * for a thread come from the OS thread that seized it (the kernel answers -ESRCH to others), and
 * that the thread is in a ptrace stop for everything except seize, interrupt and wait.
 *
 * A "stop" is the status of waitpid(2): 0 while the thread runs; negative: -errno, of which -ESRCH
 * means that it is gone.
 */
#ifndef SNAP_PTRACE_H
#define SNAP_PTRACE_H
#include <stddef.h>
#include <stdint.h>

#define SNAP_PTRACE_O_TRACESYSGOOD 0x1
#define SNAP_PTRACE_O_TRACEEXIT 0x40
#define SNAP_PTRACE_O_EXITKILL 0x100000
#define SNAP_PTRACE_O_SUSPEND_SECCOMP 0x200000
#define SNAP_RESUME_CONT 0
#define SNAP_RESUME_SYSCALL 1

typedef struct {
    uint64_t address;
    uint32_t size;
    uint32_t signature;
    uint32_t flags;
    uint32_t padding;
} snap_rseq;

#define SNAP_RSEQ_CS 8 /* offset in struct rseq: after cpu_id_start and cpu_id */

int snap_seize(int tid, unsigned long options);
int snap_interrupt(int tid);
int snap_set_options(int tid, unsigned long options);
/* Run on, or (SNAP_RESUME_SYSCALL) up to the next entry to or exit from a system call. */
int snap_resume(int tid, int how, int signal);
int snap_detach(int tid, int signal);
/* Lets it go on from an event stop, or one for an event; one that somebody else has stopped (SIGSTOP,
   …) stays so, and tells when that is over. */
int snap_run_on(int tid, int stop);

/* Whether no thread of this process but the one that waits for a stop can take the SIGCHLD that tells
   of it: all have it blocked. */
void snap_hear_stops(int all);

/* Waits for the next stop of the thread, for at most timeout_us: spins, then sleeps. -ETIMEDOUT;
   -ESRCH when it ended (see snap_reap). */
int snap_wait(int tid, int64_t timeout_us, int *stop);
/* Drops the signal of a signal-delivery stop: the thread would not get it even if we died now. Of any
   other stop nobody is told again. */
int snap_take_signal(int tid);
/* Takes note of the end of a thread, which stays a zombie until its tracer does. Waits at most
   timeout_us for it (-ETIMEDOUT). For a child of this process that ends its life as a zombie: the
   caller then has the exit status, and nobody else. */
int snap_reap(int tid, int64_t timeout_us);
/* One look. 1: it had ended and is reaped; 0: not yet; -ECHILD: there is nothing to reap. */
int snap_reap_ended(int tid);

/* Takes a stopped or running seized thread to an event stop (PTRACE_INTERRUPT), in which it has no
   signal in hand: those that arrive are delivered on the way, so that none is ever held back. */
int snap_halt(int tid, int64_t timeout_us, int *stop);

/* The same for a thread that has been interrupted and resumed already. */
int snap_await_event_stop(int tid, int64_t timeout_us, int *stop);
/* The signal of a signal-delivery stop; 0 for a stop of any other kind. */
int snap_stop_signal(int stop);
/* The stop is that of PTRACE_INTERRUPT or a group stop: no signal is in hand. */
int snap_is_event_stop(int stop);
/* The stop is one at the entry to or the exit from a system call. */
int snap_is_syscall_stop(int stop);
/* The stop is that of PTRACE_O_TRACEEXIT: the thread ends, its memory is still there. */
int snap_is_exit_stop(int stop);

/* size must be that of the architecture's registers, else -ENOEXEC: the thread runs other code
   (32 bit). */
int snap_get_registers(int tid, void *registers, size_t size);
int snap_set_registers(int tid, const void *registers, size_t size);
/* The XSAVE area; returns its length. */
long snap_get_xstate(int tid, void *area, size_t size);
int snap_set_xstate(int tid, const void *area, size_t size);

/* The mask that the program has chosen: inside sigsuspend, ppoll, … the one it comes back to. */
int snap_get_signal_mask(int tid, uint64_t *mask);
int snap_set_signal_mask(int tid, uint64_t mask);
/* The siginfo (128 bytes) of the stop. */
int snap_get_siginfo(int tid, void *info);
/* Queued signals from number `from` on, 128 bytes each; returns how many were stored. */
int snap_peek_signals(int tid, int shared, uint64_t from, void *infos, int count);
/* -EOPNOTSUPP without the kernel's PTRACE_GET_RSEQ_CONFIGURATION (5.13); address 0: none. */
int snap_get_rseq(int tid, snap_rseq *out);

/* Exactly length bytes of the process that tid belongs to, or -errno. Reading and writing fall back
   on /proc/TID/mem for memory that the process itself may not read or write. */
int snap_read_memory(int tid, uint64_t address, void *bytes, size_t length);
int snap_write_memory(int tid, uint64_t address, const void *bytes, size_t length);
/* Where it surely may not be written by the process itself: through its /proc/PID/mem. */
int snap_write_through(int mem, uint64_t address, const void *bytes, size_t length);

#endif
