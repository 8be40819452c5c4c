#define _GNU_SOURCE
#include "interview.h"

#include "descriptors.h"
#include "ptrace.h"

#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>

/* What is owed begins at the fourth argument of the call that makes it: two descriptors, 16 bytes, and
   its result. */
#define OWED offsetof(snap_call, args[3])
_Static_assert(offsetof(snap_call, result) == OWED + 24, "snap_home.owed");

static int map(snap_injection *at, uint64_t near, uint64_t array)
{
    snap_call call = {.nr = SYS_mmap,
                      .args = {near, at->undo, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                               UINT64_MAX, 0}};
    int result = snap_guard_place(at);
    at->use_loop = 0;
    if (result == 0)
        result = snap_inject(at, &call, 1);
    at->loop = at->guard;
    at->array = near + array;
    at->use_loop = 1;
    return result < 0 ? result : (uint64_t)call.result != near;
}

/* The i-th of those that are asked this. */
static int ask(snap_injection *at, uint64_t data, const snap_questions *q, int i)
{
    if (q->count == 0)
        return 0;
    snap_call made[q->count];
    memcpy(made, q->calls, sizeof made);
    int result = snap_inject(at, made, q->count);
    for (int k = 0; k < q->count; k++)
        q->results[i * q->count + k] = made[k].result;
    return result < 0 ? result
                      : snap_read_memory(at->tid, data, q->answers + (uint64_t)i * q->size, q->size);
}

/* The same of `at`, which makes a descriptor first. The memory says that there is none before the way
   home is told to look there. */
static int ask_and_make(snap_injection *at, uint64_t data, const snap_questions *q, snap_making *making)
{
    if (!at->quiet) /* it would make call by call, and leave no result where it looks */
        return 1;
    int result = snap_write_memory(at->tid, at->array, q->calls, sizeof *q->calls);
    if (result < 0)
        return result;
    at->owed = at->array + OWED;
    result = ask(at, data, q, 0);
    if (result < 0)
        return result;
    const int made = (int)q->results[0];
    making->fetched = made < 0 ? made : snap_pidfd_getfd(making->pidfd, made);
    return 0;
}

/* Another thread, with what `like` has, which has made calls before. */
static int ask_another(const snap_injection *like, snap_injection *at, int tid, int stop,
                       unsigned long options, uint64_t data, const snap_questions *q, int i)
{
    *at = *like;
    at->tid = tid;
    at->stop = stop;
    at->borrowed = at->passed = 0;
    at->undo = 0;
    int result = snap_set_options(tid, options);
    return result < 0 ? result : ask(at, data, q, i);
}

/* By the one that has charge of it. */
static int unmap(snap_injection *at, snap_injection *last)
{
    int result = snap_unmap_scratch(last);
    at->scratch = last->scratch;
    return result < 0 ? result : snap_guard_wipe(at);
}

int snap_interview(snap_injection *at, uint64_t near, uint64_t array, uint64_t data,
                   const snap_questions *first, snap_making *making, const snap_questions *others,
                   snap_injection *each, const int *tids, int *stops, int threads,
                   unsigned long options, int *step)
{
    *step = SNAP_STEP_MAP;
    int result = map(at, near, array);
    if (result)
        return result;
    *step = SNAP_STEP_ASK;
    result = making ? ask_and_make(at, data, first, making) : ask(at, data, first, 0);
    snap_injection *last = at;
    for (int i = 0; result == 0 && i < threads; i++) {
        *step = SNAP_STEP_ASK + 1 + i;
        last = &each[i];
        result = ask_another(at, last, tids[i], stops[i], options, data, others, i);
        stops[i] = last->stop;
    }
    if (result)
        return result;
    *step = SNAP_STEP_UNMAP;
    result = unmap(at, last);
    if (threads)
        stops[threads - 1] = last->stop;
    return result;
}
