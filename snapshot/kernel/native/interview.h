/*
 * All injected calls of one pause in one go: scratch memory is mapped, the threads are asked one after
 * the other, and it is unmapped again. Mechanism without policy.
 *
 * What remote.h demands of the threads holds here, and there is room for a guard.
 */
#ifndef SNAP_INTERVIEW_H
#define SNAP_INTERVIEW_H
#include "remote.h"

/* What each of some threads is asked. */
typedef struct {
    const snap_call *calls;
    int count;
    uint64_t size;          /* bytes from `data` on that the calls write */
    int64_t *results;       /* count for each thread */
    unsigned char *answers; /* size bytes for each thread */
} snap_questions;

/* A descriptor that the first of the calls in `first` makes, with three arguments at most. It is
 * fetched, and closed by the thread on its way home, also if we die meanwhile. That its fourth argument
 * is all ones and its result -1 says that there is none to be closed (snap_home.owed). */
typedef struct {
    int pidfd;
    int fetched; /* our duplicate, or -errno: also of a call that failed, and of an interview */
} snap_making;

#define SNAP_STEP_MAP 0
#define SNAP_STEP_ASK 1 /* `at`; + 1 + i: thread i of the others */
#define SNAP_STEP_UNMAP (-1)

/* `at` is prepared, with a guard that has not been placed, and at->undo bytes of scratch, which are to
 * lie at `near`: the calls have been made up for an array at near + array and answers at `data`.
 * making: of `at`, or NULL.
 * Thread i of the others: its stop is stops[i], before and after; options: PTRACE_O_*, set in each;
 * each[i] lives as long as `at`.
 * 0: all have answered, and nothing of ours is left. 1: there was no room at `near`, or no signal by
 * which the thread can tell that it is done, and something was to be made; else -errno, as snap_inject
 * has it, of *step. Then `at` is to be closed like one that was opened by hand. */
int snap_interview(snap_injection *at, uint64_t near, uint64_t array, uint64_t data,
                   const snap_questions *first, snap_making *making, const snap_questions *others,
                   snap_injection *each, const int *tids, int *stops, int threads,
                   unsigned long options, int *step);

#endif
