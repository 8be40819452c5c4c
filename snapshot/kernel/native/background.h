/* Threads of this process that work when nobody else wants the processor. */
#pragma once

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
/* Nobody is in it any more. */
void snap_background_free(snap_background *background);
