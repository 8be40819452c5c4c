/* A list of faults in place of a look at all memory (written.c). The kernel lists the writes that it lets
 * through, as they fault (fault_list.c): at T0 only those are looked at that fell since a look, so the pause does
 * not follow the size. A fault is listed before it is handled: so those count too that were listed some time before
 * the last look began (IN_FLIGHT_NS). Looks of the same kind ahead of T0 leave little to it.
 *
 * The list alone proves nothing: who writes without a fault is not in it. So all that is covered is looked at
 * after T0, while it is still protected. What is found written then must have been looked at at T0, or be listed;
 * else it may have been written before T0, and there is no T0. Nor is there one if memory goes meanwhile that
 * nobody can look at any more. */
#define _GNU_SOURCE
#include "fault_list_internal.h"
#include "pagemap.h"
#include "pump_internal.h"
#include "uffd.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define RANGES 512
#define IN_FLIGHT_NS UINT64_C(500000) /* from being listed to being let through, at most; mostly 2 us */

void snap_pump_list(snap_pump *p, const snap_fault_ring *ring, uint64_t pages_each, int quiet_ms)
{
    pthread_mutex_lock(&p->lock);
    p->ring = ring;
    p->pages_each = pages_each;
    p->quiet_ns = (uint64_t)quiet_ms * 1000000;
    p->mark_count = 0;
    pthread_mutex_unlock(&p->lock);
}

static uint64_t count_of(const snap_fault_ring *ring)
{
    return atomic_load_explicit(&ring->count, memory_order_acquire);
}

static void push(snap_pump *p, fault_mark one)
{
    if (p->mark_count == MARKS)
        memmove(p->marks, p->marks + 1, --p->mark_count * sizeof one);
    p->marks[p->mark_count++] = one;
}

static fault_mark here(const snap_pump *p)
{
    return (fault_mark){now_ns(), count_of(p->ring)};
}

void faults_mark(snap_pump *p)
{
    if (p->ring)
        push(p, here(p));
}

/* What was listed before a mark had been let through when a later look began, and was found by that, if enough lies
 * between the two. Of which look: the newest; of none: the oldest. */
static bool find_start(snap_pump *p)
{
    size_t i = p->mark_count, last = i - 1;
    if (i < 2)
        return false;
    while (--i && p->marks[i].at_ns + IN_FLIGHT_NS > p->marks[last].at_ns)
        continue;
    p->listed_from = p->marks[i].faults;
    return true;
}

static int by_value(const void *left, const void *right)
{
    uint64_t l = *(const uint64_t *)left, r = *(const uint64_t *)right;
    return l < r ? -1 : l > r;
}

/* The faults that count, as pages in order, each once. False: there were too many. */
static bool read_ring(snap_pump *p)
{
    uint64_t count = count_of(p->ring);
    addresses *to = &p->faulted;
    to->count = 0;
    if (count - p->listed_from > SNAP_RING_SIZE)
        return false;
    for (uint64_t i = p->listed_from; i != count; i++) {
        uint64_t *slot = VECTOR_PUSH(to);
        if (!slot)
            return false;
        *slot = p->ring->at[i % SNAP_RING_SIZE] & ~(PAGE - 1);
    }
    if (to->count)
        qsort(to->at, to->count, sizeof *to->at, by_value);
    size_t kept = 0;
    for (size_t i = 0; i < to->count; i++)
        if (!kept || to->at[kept - 1] != to->at[i])
            to->at[kept++] = to->at[i];
    to->count = kept;
    return true;
}

/* The chunks that it has, each once. False: to look at these takes as long as to look at all. */
static bool choose(snap_pump *p, addresses *chunks)
{
    for (size_t i = 0; i < p->faulted.count; i++) {
        uint64_t start = p->faulted.at[i] & ~(CHUNK - 1);
        if (chunks->count && chunks->at[chunks->count - 1] == start)
            continue;
        uint64_t *slot = chunks->count < p->wanted_pages / p->pages_each ? VECTOR_PUSH(chunks) : NULL;
        if (!slot)
            return false;
        *slot = start;
    }
    return true;
}

/* The chunks of what may have been written since it was looked at, if these are known. */
static bool find_recent(snap_pump *p, addresses *chunks)
{
    bool quiet = !p->event_ns || now_ns() - p->event_ns > p->quiet_ns;
    return p->ring && quiet && find_start(p) && read_ring(p) && choose(p, chunks);
}

static int protect_step(snap_pump *p, uint64_t start)
{
    int r = 0;
    for (size_t k = ledger_above(p, start); !r && k < p->windows.count; k++) {
        const snap_window w = p->windows.at[p->by_start[k]].is;
        if (w.start >= start + STEP)
            break;
        uint64_t from = w.start > start ? w.start : start, end = start + STEP;
        if (coverable(p, &w))
            r = written_part(p, &w, from, w.end < end ? w.end : end, true);
    }
    return r;
}

/* Steps: a huge page that is protected whole stays one. */
int faults_protect(snap_pump *p)
{
    addresses chunks = {0};
    int r = 0;
    uint64_t before = UINT64_MAX;
    const fault_mark begun = p->ring ? here(p) : (fault_mark){0};
    bool known = find_recent(p, &chunks);
    for (size_t i = 0; !r && known && i < chunks.count; i++) {
        uint64_t start = chunks.at[i] & ~(STEP - 1);
        bool any;
        if (start == before)
            continue;
        before = start;
        r = protect_step(p, start);
        if (!r)
            r = serve(p, &any);
    }
    if (known)
        push(p, begun);
    free(chunks.at);
    return r;
}

int faults_list(snap_pump *p)
{
    addresses chunks = {0};
    int r = 0;
    p->by_list = find_recent(p, &chunks);
    p->counters.listed = p->by_list;
    p->forks = p->by_list ? atomic_load(&p->ring->forks) : 0;
    p->looked_at.count = 0;
    for (size_t i = 0; !r && p->by_list && i < chunks.count; i++) {
        r = ranges_add(&p->looked_at, chunks.at[i], chunks.at[i] + CHUNK);
        if (!r)
            r = list_range(p, chunks.at[i], chunks.at[i] + CHUNK);
    }
    free(chunks.at);
    return r ? r : p->by_list;
}

/* ---- after T0 ------------------------------------------------------------------------------------- */

bool faults_unsure(const snap_pump *p, uint64_t start, uint64_t end)
{
    return p->by_list && p->after_t0 && ledger_coverable(p, start, end);
}

/* Of what was found written, [start, end) of w, only what was covered: the rest was looked at at T0. */
static int note(snap_pump *p, const snap_window *w, uint64_t start, uint64_t end, ranges *to)
{
    for (uint64_t at = start, until; at < end; at = until) {
        bool covered = is_covered(p, w, at, &until);
        until = until < end ? until : end;
        int r = covered ? ranges_add(to, at, until) : 0;
        if (r)
            return r;
    }
    return 0;
}

static int look_part(snap_pump *p, const snap_window *w, uint64_t start, uint64_t end, ranges *to)
{
    snap_page_range found[RANGES];
    for (uint64_t next = start; next < end;) {
        int64_t n = snap_pagemap_written(p->pagemap, next, end, false, found, RANGES, &next);
        if (n < 0)
            return (int)n;
        for (int64_t i = 0; i < n; i++) {
            int r = note(p, w, found[i].start, found[i].end, to);
            if (r)
                return r;
        }
    }
    return 0;
}

/* By address: an event may take away windows of what is not covered meanwhile. */
static int look_at_all(snap_pump *p, ranges *to)
{
    for (uint64_t cursor = 0, start;;) {
        bool any;
        snap_window w;
        int r = serve(p, &any);
        if (!r)
            r = written_next(p, &cursor, &w, &start);
        if (r <= 0)
            return r;
        r = look_part(p, &w, start, cursor, to);
        if (r)
            return r;
    }
}

/* Until it is sure that no event is unread of what had begun when all was looked at, and that the address space
 * was still there. */
static int wait_for_events(snap_pump *p)
{
    for (;;) {
        bool any;
        int r = serve(p, &any);
        if (!r)
            r = uffd_writeprotect(p->uffd, PAGE, PAGE, 0);
        if (r != -EAGAIN) /* any other answer: EAGAIN is looked for before the range is */
            return r == -ESRCH || r == -ENODATA ? r : 0;
        if (atomic_load(&p->stop))
            return -ECANCELED;
        if (!any)
            uffd_poll(p->uffd, 1);
    }
}

/* Whether each page of it was looked at at T0, or is listed; *where: the first that is not. After a fork pages
 * fault that had lost their protection before. */
static bool is_explained(const snap_pump *p, const range *found, bool forked, uint64_t *where)
{
    for (uint64_t at = found->start; at < found->end; at += PAGE) {
        if (ranges_meet(&p->looked_at, at, at + PAGE))
            continue;
        if (forked || !p->faulted.count || !bsearch(&at, p->faulted.at, p->faulted.count, sizeof at, by_value)) {
            *where = at;
            return false;
        }
    }
    return true;
}

int faults_prove(snap_pump *p)
{
    ranges found = {0};
    if (!p->by_list)
        return 0;
    be_urgent(p, false);
    int r = look_at_all(p, &found);
    if (!r)
        r = wait_for_events(p);
    if (r == -ESRCH)
        r = lost(p, p->wanted_pages * PAGE, 0, SNAP_LOST_GONE);
    if (!r && found.count && !read_ring(p))
        r = lost(p, 0, 0, SNAP_LOST_UNLISTED);
    uint64_t where;
    bool forked = atomic_load(&p->ring->forks) != p->forks;
    for (size_t i = 0; !r && i < found.count; i++)
        if (!is_explained(p, &found.at[i], forked, &where))
            r = lost(p, PAGE, where, SNAP_LOST_UNLISTED);
    free(found.at);
    p->by_list = false; /* what goes from here on may go */
    return r;
}
