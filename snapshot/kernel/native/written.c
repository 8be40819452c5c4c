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

#define RANGES 512
#define PART UINT64_C(0x1000000) /* 16 MiB between two looks at who waits for an event to be read */

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

/* A step of written_list, from *cursor on; *done: it was the last. */
static int step(snap_pump *p, bool protect, uint64_t *cursor, bool *done)
{
    for (size_t k = ledger_above(p, *cursor); k < p->windows.count; k++) {
        const snap_window w = p->windows.at[p->by_start[k]].is;
        uint64_t start = w.start > *cursor ? w.start : *cursor, end;
        if (!coverable(p, &w))
            continue;
        int r = survey_first(p, &w, start, w.end, &start); /* a reservation is mostly empty */
        if (r)
            return r;
        end = protect ? (start | (PART - 1)) + 1 : w.end; /* huge pages are protected whole, and stay so */
        end = end < w.end ? end : w.end;
        *cursor = end;
        beat(p);
        return start < end ? written_part(p, &w, start, end, protect) : 0;
    }
    *done = true;
    return 0;
}

int written_list(snap_pump *p, bool protect)
{
    uint64_t cursor = 0;
    bool done = false, any;
    int r = 0;
    while (!r && !done) {
        r = step(p, protect, &cursor, &done);
        if (!r && protect)
            r = serve(p, &any);
    }
    return r;
}
