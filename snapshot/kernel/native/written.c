/* Where writers wait for nobody (UFFD_FEATURE_WP_ASYNC): who writes takes the protection off in his own
 * fault, nothing is told of it, and the page tables are asked. A copy that was made of a page while it was
 * protected is good for as long as it is. So every look at what is covered (cover.c) lists the chunks of
 * which pages have lost their protection; one that protects them again does both in one call of the kernel:
 * looking first and protecting then would lose who writes in between. And as nothing waits after T0 either,
 * what has no good copy then is copied while the target stands still: settle.c. */
#define _GNU_SOURCE
#include "pagemap.h"
#include "pump_internal.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>

#define RANGES 512
#define PART UINT64_C(0x1000000) /* 16 MiB between two looks at who waits for an event to be read */
#define PIECE UINT64_C(0x2000000) /* at T0 */
#define MOST_PIECES 1024
#define FEW 8
#define SHARE (UINT64_C(512) << 20) /* bytes of a thread at T0: less is not worth its start, 50 us */
#define MOST_THREADS 8

/* The pages [start, end) of w, run-time addresses, were found written, or to hold nothing. */
static int enter(snap_pump *p, const snap_window *w, uint64_t start, uint64_t end)
{
    p->round.written_bytes += end - start;
    for (uint64_t at = start, next; at < end; at = next) {
        uint64_t where = at - w->start + w->at, base = where & ~(CHUNK - 1), covered_to;
        next = at + (base + CHUNK - where) < end ? at + (base + CHUNK - where) : end;
        chunk *c = ledger_chunk(p, w->space, base);
        if (!c && !is_covered(p, w, at, &covered_to)) { /* the round will come to it, or T0 */
            uint64_t block = at + ((base & ~(BLOCK - 1)) + BLOCK - where);
            next = covered_to < block ? covered_to : block;
            continue;
        }
        if (!c && !(c = ledger_make(p, w->space, base)))
            return -ENOMEM;
        unsigned first = (unsigned)((where - base) / PAGE), pages = (unsigned)((next - at) / PAGE);
        /* Also what was not there when it was last looked at: it may be back. */
        uint16_t lost = (uint16_t)(((1u << pages) - 1) << first) & (c->want | c->kept | c->early);
        if (lost)
            ledger_soil(p, w->space, c, lost);
        int r = list_chunk(p, w->space, base, c);
        if (r)
            return r;
    }
    return 0;
}

int written_part(snap_pump *p, const snap_window *w, uint64_t start, uint64_t end, bool protect)
{
    snap_page_range found[RANGES];
    for (uint64_t next = start; next < end;) {
        uint64_t from = next;
        int64_t n = snap_pagemap_written(p->pagemap, next, end, protect, found, RANGES, &next);
        if (n == -EPERM) /* it was unmapped, and something else is there: what was protected before it is lost */
            return ledger_distrust(p, from, end);
        if (n < 0)
            return (int)n;
        for (int64_t i = 0; i < n; i++) {
            int r = enter(p, w, found[i].start, found[i].end);
            if (r)
                return r;
        }
    }
    return 0;
}

/* Of w in [*start, w->end), run-time addresses: where the first thing to look at is; w->end: nowhere. */
static int first_of(const snap_pump *p, const snap_window *w, uint64_t *start)
{
    if (!coverable(p, w)) {
        *start = w->end;
        return 0;
    }
    return survey_first(p, w, *start, w->end, start); /* a reservation is mostly empty */
}

int written_next(const snap_pump *p, uint64_t *cursor, snap_window *w, uint64_t *start)
{
    for (size_t k = ledger_above(p, *cursor); k < p->windows.count; k++) {
        *w = p->windows.at[p->by_start[k]].is;
        *start = w->start > *cursor ? w->start : *cursor;
        int r = first_of(p, w, start);
        if (r)
            return r;
        if (*start == w->end)
            continue;
        uint64_t end = (*start | (PART - 1)) + 1; /* huge pages are protected whole, and stay so */
        *cursor = end < w->end ? end : w->end;
        return 1;
    }
    return 0;
}

/* A step of written_list, from *cursor on; *done: it was the last. */
static int step(snap_pump *p, uint64_t *cursor, bool *done)
{
    snap_window w;
    uint64_t start;
    int r = written_next(p, cursor, &w, &start);
    *done = r == 0;
    if (r <= 0)
        return r;
    beat(p);
    return written_part(p, &w, start, *cursor, true);
}

int written_list(snap_pump *p)
{
    faults_mark(p);
    uint64_t cursor = 0;
    bool done = false, any;
    int r = 0;
    while (!r && !done) {
        r = step(p, &cursor, &done);
        if (!r)
            r = serve(p, &any);
    }
    return r;
}

/* ---- T0 ------------------------------------------------------------------------------------------- */

/* One PAGEMAP_SCAN takes 0.4 ms or more of a GiB, and the target stands still: so several threads look, each
 * at the next piece that nobody has looked at. It begins while the caller has the target asked for what is
 * no memory (snap_pump_order_look), for which one processor is left; when he waits for us he looks too: a
 * thread made then would not come to run on the processor that he leaves (0.5 ms of a GiB, as with one).
 * The ledger is this thread's alone: the others write down what they find. */

typedef struct {
    snap_window w;       /* as it was */
    uint64_t start, end; /* run-time addresses */
} piece;

typedef struct {
    const piece *in;
    uint64_t start, end;
} hit;

typedef struct {
    looking *all;
    pthread_t thread;
    VECTOR(hit) hits;
    int error;
} helper;

/* What all threads share. */
struct looking {
    int pagemap;
    atomic_bool awaited;
    VECTOR(piece) pieces;
    atomic_size_t next;
    helper helpers[MOST_THREADS];
    size_t started;
    helper waiting; /* who waits for it */
    bool helped;    /* by him, at this moment; under the lock of the pump */
};

static const piece *next_piece(looking *all)
{
    size_t i = atomic_fetch_add(&all->next, 1);
    return i < all->pieces.count ? &all->pieces.at[i] : NULL;
}

static int note(helper *h, const piece *in)
{
    snap_page_range found[RANGES];
    for (uint64_t next = in->start; next < in->end;) {
        int64_t n = snap_pagemap_written(h->all->pagemap, next, in->end, false, found, RANGES, &next);
        if (n < 0)
            return (int)n;
        for (int64_t i = 0; i < n; i++) {
            hit *slot = VECTOR_PUSH(&h->hits);
            if (!slot)
                return -ENOMEM;
            *slot = (hit){in, found[i].start, found[i].end};
        }
    }
    return 0;
}

static void *help(void *argument)
{
    helper *h = argument;
    for (const piece *in; !h->error && (in = next_piece(h->all));) {
        h->error = note(h, in);
        if (!atomic_load(&h->all->awaited))
            sched_yield();
    }
    return NULL;
}

/* All that is to be looked at. A piece takes some 20 us. */
static int cut(const snap_pump *p, looking *all)
{
    for (size_t k = 0; k < p->windows.count; k++) {
        const snap_window *w = &p->windows.at[k].is;
        uint64_t start = w->start;
        int r = first_of(p, w, &start);
        if (r)
            return r;
        uint64_t most = ((w->end - start) / MOST_PIECES | (PIECE - 1)) + 1;
        for (uint64_t end; start < w->end; start = end) {
            end = w->end - start > most ? (start & ~(PIECE - 1)) + most : w->end;
            piece *slot = VECTOR_PUSH(&all->pieces);
            if (!slot)
                return -ENOMEM;
            *slot = (piece){*w, start, end};
        }
    }
    return 0;
}

/* As many as are worth their start. */
static void start_helpers(const snap_pump *p, looking *all)
{
    uint64_t wanted = p->wanted_pages * PAGE / SHARE;
    cpu_set_t ours;
    int cpus = sched_getaffinity(0, sizeof ours, &ours) ? 1 : CPU_COUNT(&ours);
    uint64_t most = (uint64_t)cpus - 1;
#ifdef SNAP_LOOK_THREADS /* tests are small */
    wanted = most = SNAP_LOOK_THREADS;
#endif
    wanted = wanted < most ? wanted : most;
    for (; all->started < MOST_THREADS && all->started + 1 < wanted; all->started++) {
        helper *h = &all->helpers[all->started];
        *h = (helper){.all = all};
        if (pthread_create(&h->thread, NULL, help, h))
            break;
    }
}

/* The caller makes calls in the target. Its threads may want this very processor, or wait for their events to
 * be read. Who waits for us makes us urgent himself, for we may not run (give_order). */
static int give_way(snap_pump *p, looking *all)
{
    bool any;
    int r = serve(p, &any);
    pthread_mutex_lock(&p->lock);
    bool awaited = p->order == ORDER_HOLD;
    be_urgent(p, awaited);
    pthread_mutex_unlock(&p->lock);
    if (awaited)
        atomic_store(&all->awaited, true);
    else
        sched_yield();
    return r;
}

static int look_too(snap_pump *p, looking *all)
{
    int r = 0;
    uint64_t since = 0; /* we gave way; after PIECE of it, or FEW small pieces, we do so again */
    for (const piece *in; !r && (in = next_piece(all));) {
        if (!since && !atomic_load(&all->awaited))
            r = give_way(p, all);
        if (!r)
            r = written_part(p, &in->w, in->start, in->end, false);
        since += PIECE / FEW + in->end - in->start;
        since = since < PIECE ? since : 0;
    }
    return r;
}

bool written_assist(snap_pump *p)
{
    looking *all = p->looking;
    if (!all)
        return false;
    all->helped = true;
    pthread_mutex_unlock(&p->lock);
    help(&all->waiting);
    pthread_mutex_lock(&p->lock);
    p->looking = NULL; /* nothing is left to be looked at */
    all->helped = false;
    pthread_cond_broadcast(&p->told);
    return true;
}

static void let_help(snap_pump *p, looking *all)
{
    pthread_mutex_lock(&p->lock);
    p->looking = all;
    pthread_cond_broadcast(&p->told);
    pthread_mutex_unlock(&p->lock);
    start_helpers(p, all);
}

static void end_help(snap_pump *p, looking *all)
{
    pthread_mutex_lock(&p->lock);
    p->looking = NULL;
    while (all->helped)
        pthread_cond_wait(&p->told, &p->lock);
    pthread_mutex_unlock(&p->lock);
    for (size_t i = 0; i < all->started; i++)
        pthread_join(all->helpers[i].thread, NULL);
}

static int gather(snap_pump *p, helper *h)
{
    int r = h->error;
    for (size_t i = 0; !r && i < h->hits.count; i++)
        r = enter(p, &h->hits.at[i].in->w, h->hits.at[i].start, h->hits.at[i].end);
    free(h->hits.at);
    return r;
}

/* At all. */
static int look_everywhere(snap_pump *p)
{
    looking all = {.pagemap = p->pagemap, .awaited = p->held};
    all.waiting.all = &all;
    int r = cut(p, &all);
    if (!r) {
        let_help(p, &all);
        r = look_too(p, &all);
        end_help(p, &all);
    }
    for (size_t i = 0; i <= all.started; i++) {
        int e = gather(p, i < all.started ? &all.helpers[i] : &all.waiting);
        r = r ? r : e;
    }
    free(all.pieces.at);
    return r;
}

int written_look(snap_pump *p)
{
    int r = faults_list(p);
    if (!r)
        r = look_everywhere(p);
    p->looked = r >= 0;
    return r < 0 ? r : 0;
}
