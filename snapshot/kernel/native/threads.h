/*
 * All threads of a process in one call: 200 of them take a millisecond. Mechanism without policy; the
 * words and the caller's duties are those of ptrace.h.
 */
#ifndef SNAP_THREADS_H
#define SNAP_THREADS_H
#include "ptrace.h"

#define SNAP_AGAIN_CALLS 512

/* While a thread of a process is in execve, PTRACE_SEIZE blocks (cred_guard_mutex) and a zombie leader
   never stops, and execve in turn waits until its siblings are gone, ours among them: a reaper is a
   thread that reaps those of them that end while others are being stopped, all but `leader`, whose
   status belongs to its parent. NULL: it could not be started. */
typedef struct snap_reaper snap_reaper;
snap_reaper *snap_reaper_start(int leader);
void snap_reaper_stop(snap_reaper *reaper);

/* Seizes and interrupts each of `count` threads from tids[known] on, and waits until they are in an
   event stop as with snap_halt, for at most timeout_us: stops[i] becomes the stop, -errno, or 0 for
   one that still runs. Returns how many do. tids[0 .. known) are threads of the process that are
   seized already. reaper: NULL where there is but one thread.
   again: a bit for each system call below SNAP_AGAIN_CALLS that is made again when the stop has made
   it return EINTR, or NULL. As soon as the thread stands: a tracer that dies before has the program
   see EINTR.
   since_us: if it is 0, it becomes the time (CLOCK_MONOTONIC) at which the first one was interrupted:
   until then all run. */
int snap_stop_all(const int *tids, int *stops, int known, int count, snap_reaper *reaper,
                  unsigned long options, int64_t timeout_us, const uint64_t *again,
                  int64_t *since_us);
/* Seizes one more thread, which runs on, when `known` is seized, with a reaper of its own. */
int snap_seize_beside(int tid, int known, int leader, unsigned long options);
/* Has the system call that a stopped thread is in made again if it is one of `again` and would return
   EINTR for no handler. A failure is none: a thread that is gone is found out soon enough. */
void snap_make_again(int tid, const uint64_t *again);
/* Detaches every thread with a positive stop; stops[i] becomes 0 or -errno. */
void snap_detach_all(const int *tids, int *stops, int count);

/* For each thread with a positive stop; registers is count * size bytes. A thread that does not
   answer gets -errno for its stop (-ESRCH: it is gone); returns how many did not. */
int snap_get_registers_all(const int *tids, int *stops, int count, void *registers, size_t size);

/* What is remarkable in `count` registers of SNAP_REGISTERS_SIZE bytes: marks[i] becomes the sum of
   these; returns all that occur. */
#define SNAP_MARK_GUARDED 1 /* it stands in [guard, guard_end) */
#define SNAP_MARK_RESTARTS 2 /* in restart_syscall, about to make it, or sent there by its stop */
#define SNAP_MARK_AGAIN 4   /* its call has been made one of `again` that is made again */
int snap_mark_registers(const unsigned char *registers, int count, uint64_t guard, uint64_t guard_end,
                        const uint64_t *again, unsigned char *marks);

/* addresses[i]: of the rseq area of a stopped thread, 0: it has none, or none that is known. */
void snap_get_rseq_all(const int *tids, int count, uint64_t *addresses);

/* What a thread holds that only its tracer can ask for. */
typedef struct {
    unsigned char registers[216]; /* SNAP_REGISTERS_SIZE */
    uint64_t signal_mask;
    snap_rseq rseq;               /* address 0: none */
    uint64_t critical_section;    /* of it: rseq_cs */
    int64_t xstate;               /* bytes of the XSAVE area */
    int32_t failed;               /* -errno, and `request` failed with it; 0 */
    const char *request;
} snap_thread_state;

/* Of stopped threads: states[i], and the XSAVE area at areas + i * area. `registers`: as snap_get_registers_all
   has read them in this stop, NULL: it has not. -> of how many that failed. */
int snap_get_states(const int *tids, int count, const unsigned char *registers, snap_thread_state *states,
                    unsigned char *areas, uint64_t area);

#endif
