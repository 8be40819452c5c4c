#define _GNU_SOURCE
#include "interview.h"

#include "ptrace.h"

#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>

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

static int ask(snap_injection *at, uint64_t data, const snap_questions *q)
{
    if (q->count == 0)
        return 0;
    snap_call made[q->count];
    memcpy(made, q->calls, sizeof made);
    int result = snap_inject(at, made, q->count);
    for (int k = 0; k < q->count; k++)
        q->results[k] = made[k].result;
    return result < 0 ? result : snap_read_memory(at->tid, data, q->answers, q->size);
}

/* By the one that has charge of it. */
static int unmap(snap_injection *at, snap_injection *last)
{
    int result = snap_unmap_scratch(last);
    at->scratch = last->scratch;
    return result < 0 ? result : snap_guard_wipe(at);
}

int snap_interview(snap_injection *at, uint64_t near, uint64_t array, uint64_t data,
                   const snap_questions *first, const snap_questions *others, snap_injection *each,
                   const int *tids, int *stops, int threads, unsigned long options, int *step)
{
    int error = 0;
    *step = SNAP_STEP_MAP;
    int result = map(at, near, array);
    if (result)
        return result;
    *step = SNAP_STEP_ASK;
    result = ask(at, data, first);
    if (result < 0)
        return result;
    int done = snap_inject_each(at, each, tids, stops, threads, options, others->calls, others->count,
                                data, others->size, others->results, others->answers, &error);
    if (done < threads) {
        *step = SNAP_STEP_ASK + 1 + done;
        return error;
    }
    *step = SNAP_STEP_UNMAP;
    result = unmap(at, threads ? &each[threads - 1] : at);
    if (threads)
        stops[threads - 1] = each[threads - 1].stop;
    return result;
}
