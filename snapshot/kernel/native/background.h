/* Threads of this process that work when nobody else wants the processor. */
#pragma once
#include <stdint.h>

typedef struct snap_background snap_background;

/* With `returns` they run after all ordinary threads (SCHED_IDLE), without it (the kernel would not
 * let them back) they only do not take a processor from others when they wake up (SCHED_BATCH).
 *
 * As long as there is one, a thread of C's looks after them every 50 ms: when one waited for a
 * processor for most of that time, all are ordinary threads for four looks, since the lock of the
 * interpreter, which that thread does not need, goes from one to the next. */
int snap_background_new(int returns, snap_background **made);
/* The calling thread is one from here on, until it leaves. Returns 0 or -ENOMEM. What it has made of
 * itself (a realtime policy, say) is not touched. */
int snap_background_enter(snap_background *background);
void snap_background_leave(snap_background *background);
/* 1: all of them are ordinary threads, 0: not any more. From any thread. */
void snap_background_hurry(snap_background *background, int hurried);
/* Bit i: others who matter run on processor i, beside them. SCHED_IDLE is compared within a group of tasks
 * only, and a session is one (sched(7), autogroup): who wakes up in another one waits for the next tick, 4 ms,
 * if his group has had its share. So while there are threads in the background such a processor is woken up
 * every millisecond by a thread that runs before all others, and chooses anew. Does nothing where that
 * is not allowed (SCHED_FIFO). */
void snap_background_nudge(snap_background *background, uint64_t processors);
/* Nobody is in it any more. */
void snap_background_free(snap_background *background);
