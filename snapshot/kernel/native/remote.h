/*
 * System calls made inside another, stopped process. Mechanism without policy.
 *
 * The caller guarantees that the thread is seized with TRACESYSGOOD by the calling OS thread and
 * stands in an event stop; it stands in one (or the like) again afterwards, with its own signal mask
 * and rseq critical section, whether the calls succeeded or not, and with its own registers unless it
 * is `parked`.
 */
#ifndef SNAP_REMOTE_H
#define SNAP_REMOTE_H
#include "arch_x86_64.h"
#include "guard_x86_64.h"
#include "ptrace.h"

typedef struct snap_injection {
    int tid;
    int stop;             /* of the thread, as waitpid(2) reported it; 0: it runs */
    int event_stop;       /* the last event stop it was in: tells a group stop (SIGSTOP) */
    int fault;            /* after -EFAULT: the stop with the signal */
    int use_loop;         /* 0: make each call with system call stops, never with a trap */
    int trapped;          /* it stands in our own trap, the signal taken from it */
    int borrowed;         /* the thread carries our registers and mask: see snap_give_back */
    uint64_t instruction; /* address of a `syscall` instruction in the target */
    uint64_t loop;        /* address of snap_arch_loop's bytes in the target */
    uint64_t array;       /* writable memory of the target for the calls of one batch */
    int64_t timeout_us;
    uint64_t signal_mask; /* what the thread has of its own while it is borrowed */
    uint64_t rseq_address;
    uint64_t critical_section;
    unsigned char registers[216]; /* SNAP_REGISTERS_SIZE */
    /* With a guard the thread goes home by itself if we die (guard_x86_64.h). */
    uint64_t guard;        /* where its code lies in the target; 0: there is none */
    int slot;              /* of the guard, in which the thread's record is */
    uint64_t scratch;      /* mapping that it unmaps then; 0: there is none */
    uint64_t scratch_size;
    uint64_t owed;         /* struct of descriptors in the scratch that it closes then (snap_home), or 0 */
    /* Shared by all who use one scratch: the one whose thread would unmap it. Between two batches
       too it has registers that lead home, and its own are those above. */
    struct snap_injection **parked;
    uint64_t undo;         /* the size of what the one call of the next batch maps, or 0: that is the
                              scratch afterwards */
    uint64_t undo_call;    /* munmap, then */
    uint64_t quiet;        /* … chosen for this batch; 0: none, so calls are made with stops */
    uint64_t caught;       /* signals of the process that have a handler */
    uint64_t ignored;      /* signals that it ignores, and that may be sent for the loop's end */
    /* For tests: the process kills itself (SIGKILL) when it passes the die_at-th point. */
    int die_at;
    int passed;
    /* /proc/PID/mem of the process, to write where it may not itself; open for reading and writing. */
    int mem;
} snap_injection;

/* Before the first call of all with a guard. */
int snap_guard_place(snap_injection *at);
/* After the last one: where it lay there are zeros again. */
int snap_guard_wipe(snap_injection *at);

/* Makes the calls in order and stores their results. Returns 0; -ETIMEDOUT when one of them did not
   return in time (it was interrupted); -EFAULT when the thread got a signal of its own making
   (at->fault tells which); -ESRCH when it ended. */
int snap_inject(snap_injection *at, snap_call *calls, int count);

/* The thread goes home, stopped right after it has unmapped the scratch and closed what is owed, and
   is given back: with a guard, and a scratch. Errors as above. */
int snap_unmap_scratch(snap_injection *at);

/* clone(flags) with CLONE_PTRACE: a thread that has the same tracer stands at its birth, and ends by
   itself if we die before it has registers that say otherwise. At a guard that has not been placed,
   which lies there until snap_guard_wipe. 0: *tid is its number in the target's own pid namespace, or
   -errno of the call. Errors as above. */
int snap_clone_thread(snap_injection *at, uint64_t flags, int64_t *tid);

/* Makes a call that gives a descriptor, and leaves the thread at its end, borrowed. Returns 0 with
   call->result; snap_unmake comes next in any case. With a guard a thread that is left there by our
   death closes the descriptor (not 0) before it goes home. Errors as above. */
int snap_make(snap_injection *at, snap_call *call);

/* Has the target close the descriptor (negative: there is none), and gives the thread back. */
int snap_unmake(snap_injection *at, int64_t descriptor);

/* Tries again to get the thread back after a call that did not return; needed while `borrowed`. */
int snap_give_back(snap_injection *at);

#endif
