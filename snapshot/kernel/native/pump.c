/* The life of a pump: set up, the loop that serves faults before it sweeps, the way to the store. */
#define _GNU_SOURCE
#include "pump_internal.h"
#include "uffd.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define LET_GO UINT64_C(0x1000000)       /* releasing more at once holds mmap_lock too long */
#define PATIENCE_NS UINT64_C(10000000000) /* for the event that explains why a mark is gone */
#define SWEEP_POLL_CHUNKS 4              /* faults are looked for every 256 KiB of the sweep */

/* ---- set up -------------------------------------------------------------------------------- */

int snap_pump_new(int pid, int uffd, int uffdinfo, int pagemap, int mem, int spill, void *staging,
                  uint64_t slots, snap_pump **pump)
{
    snap_pump *p = calloc(1, sizeof *p);
    if (!p)
        return -ENOMEM;
    p->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    p->bounce = aligned_alloc(PAGE, CHUNK);
    p->free_slots = calloc(slots ? slots : 1, sizeof *p->free_slots);
    if (p->wake < 0 || !p->bounce || !p->free_slots) {
        int r = p->wake < 0 ? -errno : -ENOMEM;
        if (p->wake >= 0)
            close(p->wake);
        free(p->bounce);
        free(p->free_slots);
        free(p);
        return r;
    }
    p->pid = pid;
    p->uffd = uffd;
    p->uffdinfo = uffdinfo;
    p->pagemap = pagemap;
    p->mem = mem;
    p->spill = spill;
    p->staging = staging;
    p->slots = slots;
    for (uint64_t i = 0; i < slots; i++)
        p->free_slots[i] = (uint32_t)(slots - 1 - i); /* low slots first: they stay warm */
    p->free_count = slots;
    pthread_mutex_init(&p->lock, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&p->ready, &attr);
    pthread_condattr_destroy(&attr);
    *pump = p;
    return 0;
}

void snap_pump_free(snap_pump *p)
{
    if (!p)
        return;
    for (size_t i = 0; i < p->areas.count; i++) {
        free(p->areas.at[i].want);
        free(p->areas.at[i].state);
    }
    free(p->areas.at);
    free(p->windows.at);
    free(p->by_start);
    free(p->tentative.at);
    free(p->faults.at);
    free(p->releases.at);
    free(p->queue.at);
    free(p->free_slots);
    free(p->free_spill.at);
    free(p->bounce);
    close(p->wake);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->ready);
    free(p);
}

int snap_pump_add_area(snap_pump *p, uint32_t space, uint64_t start, uint64_t end)
{
    if (start % CHUNK || end % CHUNK || start >= end)
        return -EINVAL;
    area a = {.space = space, .start = start, .chunks = (end - start) / CHUNK};
    a.want = calloc(a.chunks, sizeof *a.want);
    a.state = calloc(a.chunks, sizeof *a.state);
    area *slot = a.want && a.state ? VECTOR_PUSH(&p->areas) : NULL;
    if (!slot) {
        free(a.want);
        free(a.state);
        return -ENOMEM;
    }
    *slot = a;
    return (int)p->areas.count - 1;
}

int snap_pump_add_window(snap_pump *p, int area_id, uint64_t start, uint64_t end, uint64_t at,
                         int armed, int object, uint64_t unit)
{
    if (area_id < 0 || (size_t)area_id >= p->areas.count || start >= end || (start | end | at) % PAGE)
        return -EINVAL;
    area *a = &p->areas.at[area_id];
    if (at < a->start || at + (end - start) > a->start + a->chunks * CHUNK || unit < PAGE ||
        unit & (unit - 1))
        return -EINVAL;
    window *w = VECTOR_PUSH(&p->windows);
    if (!w)
        return -ENOMEM;
    *w = (window){.start = start, .end = end, .at = at, .unit = unit, .area = (uint32_t)area_id,
                  .object = object, .armed = armed};
    if (!armed)
        a->has_unarmed = true;
    return 0;
}

int snap_pump_ready(snap_pump *p)
{
    return ledger_index(p);
}


/* ---- the sweep ----------------------------------------------------------------------------- */

/* Moves the cursor to the next unsaved chunk, round and round. False when there is none. */
static bool next_unsaved(snap_pump *p)
{
    for (size_t tried = 0; tried <= p->areas.count; tried++) {
        const area *a = &p->areas.at[p->sweep_area];
        for (; p->sweep_chunk < a->chunks; p->sweep_chunk++)
            if (a->want[p->sweep_chunk] && a->state[p->sweep_chunk] == UNSAVED)
                return true;
        p->sweep_chunk = 0;
        p->sweep_area = (p->sweep_area + 1) % (uint32_t)p->areas.count;
    }
    return false;
}

/* Releases chunks [first, last) but for those that an event made unsaved again meanwhile. */
static int release_saved(snap_pump *p, uint32_t id, uint64_t first, uint64_t last)
{
    const area *a = &p->areas.at[id];
    for (uint64_t i = first; i < last;) {
        uint64_t j = i;
        while (j < last && (!a->want[j] || a->state[j] != UNSAVED))
            j++;
        int r = j > i ? release_space(p, a, a->start + i * CHUNK, a->start + j * CHUNK) : 0;
        if (r)
            return r;
        i = j + 1;
    }
    return 0;
}

/* Whether staging has room for the unsaved chunks among [first, last): a step that broke off half
 * way would release half a huge page and split it. Always true when staging is too small for that
 * ever to be so. */
static bool room_for(snap_pump *p, const area *a, uint64_t first, uint64_t last)
{
    uint64_t needed = 0, reserve = p->slots / 4;
    for (uint64_t i = first; i < last; i++)
        needed += a->want[i] && a->state[i] == UNSAVED;
    pthread_mutex_lock(&p->lock);
    bool room = p->free_count >= needed + reserve || needed + reserve > p->slots;
    pthread_mutex_unlock(&p->lock);
    return room;
}

/* Saves on to the end of the cursor's 2 MiB and releases what it saved there in one go. */
static int sweep(snap_pump *p)
{
    if (!p->unsaved_chunks || !next_unsaved(p))
        return 0;
    uint32_t id = p->sweep_area;
    uint64_t first = p->sweep_chunk, i = first;
    uint64_t start = p->areas.at[id].start;
    uint64_t limit = (((start + first * CHUNK) / STEP + 1) * STEP - start) / CHUNK;
    if (limit > p->areas.at[id].chunks)
        limit = p->areas.at[id].chunks;
    if (!room_for(p, &p->areas.at[id], first, limit))
        return -ENOBUFS;
    int r = 0;
    for (; i < limit; i++) {
        const area *a = &p->areas.at[id];
        if (a->want[i] && a->state[i] == UNSAVED && (r = save_chunk(p, id, i, false)))
            break;
        if ((i - first) % SWEEP_POLL_CHUNKS == SWEEP_POLL_CHUNKS - 1) {
            bool any;
            if ((r = serve(p, &any)))
                return r;
        }
    }
    p->sweep_chunk = i;
    int e = release_saved(p, id, first, i);
    return e ? e : r;
}


/* ---- the end ------------------------------------------------------------------------------- */

/* After a failure: releases everything in small steps, answering whoever still faults, so that the
 * close of the uffd finds little to do (closing an armed one holds the target's mmap lock for 40 to
 * 200 ms at 4 GiB). Nothing is unregistered here: that would split a mapping for a moment, and a
 * mremap of the target that spans the split would fail. */
static int let_go(snap_pump *p)
{
    p->letting_go = true;
    for (uint64_t cursor = 0;;) {
        bool any;
        int r = serve(p, &any);
        if (r)
            return r;
        size_t k = ledger_above(p, cursor);
        while (k < p->windows.count && !p->windows.at[p->by_start[k]].armed)
            k++;
        if (k == p->windows.count)
            return 0;
        const window *w = &p->windows.at[p->by_start[k]];
        uint64_t start = w->start > cursor ? w->start : cursor;
        uint64_t end = w->end - start > LET_GO ? start + LET_GO : w->end;
        r = uffd_writeprotect(p->uffd, start, end - start, 0);
        if (r == -ESRCH)
            return r;
        cursor = end; /* what could not be released here, the close releases */
    }
}

/* Faults and releases that still wait are answered by letting go. */
static bool finished(const snap_pump *p)
{
    return !p->unsaved_chunks && !p->tentative.count;
}

/* Waits for a message, and when `slots` also for a free staging slot. */
static void idle(snap_pump *p, bool slots, int timeout_ms)
{
    struct pollfd fds[2] = {{.fd = p->uffd, .events = POLLIN}, {.fd = p->wake, .events = POLLIN}};
    if (poll(fds, slots ? 2 : 1, timeout_ms) > 0 && slots && fds[1].revents) {
        uint64_t count;
        (void)!read(p->wake, &count, sizeof count);
    }
}

static int loop(snap_pump *p)
{
    while (!finished(p)) {
        bool any;
        if (atomic_load(&p->stop))
            return -ECANCELED;
        int r = serve(p, &any);
        if (!r)
            r = sweep(p);
        if (r == -ENOBUFS) {
            p->stuck_since_ns = 0;
            idle(p, true, p->tentative.count ? 1 : 100);
            continue;
        }
        if (r && r != -EAGAIN)
            return r;
        /* Held up: an event has been announced (EAGAIN) but is not yet there to be read. */
        bool held_up = r == -EAGAIN || (!p->unsaved_chunks && !finished(p));
        if (!held_up || any) {
            p->stuck_since_ns = 0;
            continue;
        }
        if (!p->stuck_since_ns)
            p->stuck_since_ns = now_ns();
        else if (now_ns() - p->stuck_since_ns > PATIENCE_NS)
            return lost(p, p->unsaved_chunks * CHUNK,
                        p->areas.at[p->sweep_area].start + p->sweep_chunk * CHUNK, SNAP_LOST_UNARMED);
        idle(p, false, 1);
    }
    return 0;
}

int snap_pump_run(snap_pump *p)
{
    pthread_mutex_lock(&p->lock);
    p->counters.running = 1;
    pthread_mutex_unlock(&p->lock);
    int r = loop(p);
    if (r == -ESRCH)
        r = lost(p, p->unsaved_chunks * CHUNK, 0, SNAP_LOST_GONE);
    if (r && p->counters.lost_reason != SNAP_LOST_GONE)
        (void)let_go(p); /* a courtesy: the close of the uffd does all of it */
    snap_pump_end(p);
    return r;
}

void snap_pump_stop(snap_pump *p)
{
    atomic_store(&p->stop, 1);
    uint64_t one = 1;
    (void)!write(p->wake, &one, sizeof one);
}


/* ---- the consumers' side ------------------------------------------------------------------- */

int snap_pump_next(snap_pump *p, snap_saved *out, int most, int timeout_ms)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += (timeout_ms % 1000) * 1000000L;
    if (until.tv_nsec >= 1000000000L) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000L;
    }
    int n = 0, waited = 0;
    pthread_mutex_lock(&p->lock);
    while (p->queue_head == p->queue.count && !p->ended && waited != ETIMEDOUT)
        waited = pthread_cond_timedwait(&p->ready, &p->lock, &until);
    while (n < most && p->queue_head < p->queue.count)
        out[n++] = p->queue.at[p->queue_head++];
    if (p->queue_head == p->queue.count)
        p->queue_head = p->queue.count = 0;
    if (!n && p->ended)
        n = -EPIPE;
    pthread_mutex_unlock(&p->lock);
    return n;
}

int snap_pump_done(snap_pump *p, const snap_saved *saved, int count)
{
    int r = 0;
    pthread_mutex_lock(&p->lock);
    for (int i = 0; i < count; i++) {
        if (saved[i].place >= 0) {
            p->free_slots[p->free_count++] = (uint32_t)saved[i].place;
            continue;
        }
        uint32_t *slot = VECTOR_PUSH(&p->free_spill);
        if (slot)
            *slot = (uint32_t)(-saved[i].place - 1);
        else
            r = -ENOMEM; /* the slot is only not used again */
    }
    pthread_mutex_unlock(&p->lock);
    uint64_t one = 1;
    (void)!write(p->wake, &one, sizeof one);
    return r;
}

void snap_pump_end(snap_pump *p)
{
    pthread_mutex_lock(&p->lock);
    p->ended = true;
    p->counters.running = 0;
    pthread_cond_broadcast(&p->ready);
    pthread_mutex_unlock(&p->lock);
}

void snap_pump_stats(snap_pump *p, snap_pump_counters *out)
{
    pthread_mutex_lock(&p->lock);
    *out = p->counters;
    pthread_mutex_unlock(&p->lock);
}
