/* Which pages of a window hold something, and which of them are not protected: as the page tables
 * have it. They are the only ledger of what was written ahead of T0; the copies are compared with
 * them. */
#define _GNU_SOURCE
#include "pagemap.h"
#include "pump_internal.h"
#include "uffd.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#define RANGES 256

/* Where the bits of [start, end), run-time addresses in w, belong. */
struct marks {
    const snap_window *w;
    uint64_t base; /* space address of the first chunk */
    seen *out;
};

enum { MASK, WANT, BARE, NOT_BARE };

static void mark(const struct marks *m, uint64_t start, uint64_t end, int what)
{
    uint64_t at = start - m->w->start + m->w->at - m->base, stop = end - m->w->start + m->w->at - m->base;
    while (at < stop) {
        uint64_t in_chunk = at % CHUNK, until = at - in_chunk + CHUNK < stop ? CHUNK : stop - (at - in_chunk);
        unsigned first = (unsigned)(in_chunk / PAGE), last = (unsigned)(until / PAGE);
        uint16_t bits = (uint16_t)(((1u << (last - first)) - 1) << first);
        seen *s = &m->out[at / CHUNK];
        if (what == MASK)
            s->mask |= bits;
        else if (what == WANT)
            s->want |= bits;
        else if (what == BARE)
            s->bare |= bits;
        else
            s->bare &= (uint16_t)~bits;
        at = at - in_chunk + until;
    }
}

/* Protected pages that look swapped out: those that are, for an empty one that is protected does too. */
static int mark_swapped(const snap_pump *p, const struct marks *m, uint64_t start, uint64_t end)
{
    for (uint64_t at = start; at < end; at += 64 * PAGE) {
        uint64_t empty, pages = (end - at) / PAGE < 64 ? (end - at) / PAGE : 64;
        int r = snap_pagemap_empty(p->pagemap, at, (unsigned)pages, &empty);
        if (r)
            return r;
        for (uint64_t i = 0; i < pages; i++)
            if (!(empty >> i & 1))
                mark(m, at + i * PAGE, at + (i + 1) * PAGE, WANT);
    }
    return 0;
}

/* Each range of [start, end) with the categories asked for is marked. */
static int scan(const snap_pump *p, const struct marks *m, uint64_t start, uint64_t end,
                uint64_t inverted, uint64_t mask, int what)
{
    snap_page_range found[RANGES];
    for (uint64_t next = start; next < end;) {
        int64_t n = snap_pagemap_scan(p->pagemap, next, end, inverted, mask,
                                      SNAP_PAGE_PRESENT | SNAP_PAGE_SWAPPED, found, RANGES, &next);
        if (n < 0)
            return (int)n;
        for (int64_t i = 0; i < n; i++) {
            bool here = !m->w->huge || found[i].categories & SNAP_PAGE_PRESENT;
            if (what == WANT && p->empties && !m->w->huge &&
                !(found[i].categories & (SNAP_PAGE_PRESENT | SNAP_PAGE_WRITTEN))) {
                int r = mark_swapped(p, m, found[i].start, found[i].end);
                if (r)
                    return r;
                continue;
            }
            mark(m, found[i].start, found[i].end, what);
            if (what == WANT && (found[i].categories & SNAP_PAGE_WRITTEN || !here))
                mark(m, found[i].start, found[i].end, BARE);
        }
    }
    return 0;
}

/* A page of hugetlbfs that was discarded when it was protected leaves its mark behind in an empty
 * entry (mm/hugetlb.c, __unmap_hugepage_range), and so does protecting an empty one. Both look like a
 * page that is swapped out or on the way to another place, and to read it would use a page of the
 * pool: the mark is taken off, and what is then still there is a page. */
static int take_marks_off(const snap_pump *p, const snap_window *w, uint64_t start, uint64_t end)
{
    snap_page_range found[RANGES];
    for (uint64_t next = start; next < end;) {
        int64_t n = snap_pagemap_scan(p->pagemap, next, end, SNAP_PAGE_PRESENT,
                                      SNAP_PAGE_PRESENT | SNAP_PAGE_SWAPPED, 0, found, RANGES, &next);
        if (n < 0)
            return (int)n;
        for (int64_t i = 0; i < n; i++) {
            uint64_t low = found[i].start, high = found[i].end;
            whole_pages(w, &low, &high);
            /* EAGAIN: an event is unread. It stays bare then, for the next round. */
            if (uffd_writeprotect(p->uffd, low, high - low, 0) == -ESRCH)
                return -ESRCH;
        }
    }
    return 0;
}

/* A shared object holds what is data in it, mapped here or not; of that everything is bare that this
 * mapping does not say is protected. */
static int survey_object(const snap_pump *p, const struct marks *m, uint64_t start, uint64_t end)
{
    uint64_t at = start - m->w->start + m->w->at, stop = end - m->w->start + m->w->at;
    while (at < stop) {
        off_t data = lseek(m->w->object, (off_t)at, SEEK_DATA);
        if (data < 0 && errno != ENXIO)
            return -errno;
        if (data < 0 || (uint64_t)data >= stop)
            break;
        off_t hole = lseek(m->w->object, data, SEEK_HOLE);
        if (hole < 0)
            return -errno;
        uint64_t from = (uint64_t)data & ~(PAGE - 1), to = ((uint64_t)hole + PAGE - 1) & ~(PAGE - 1);
        if (to > stop)
            to = stop;
        uint64_t shift = m->w->start - m->w->at;
        mark(m, from + shift, to + shift, WANT);
        mark(m, from + shift, to + shift, BARE);
        at = to;
    }
    if (!m->w->armed)
        return 0;
    return scan(p, m, start, end, SNAP_PAGE_WRITTEN, SNAP_PAGE_WRITTEN, NOT_BARE);
}

size_t survey_chunks(const snap_window *w, uint64_t start, uint64_t end)
{
    uint64_t from = start - w->start + w->at, to = end - w->start + w->at;
    return (size_t)((to + CHUNK - 1) / CHUNK - from / CHUNK);
}

int survey(const snap_pump *p, const snap_window *w, uint64_t start, uint64_t end, seen *out)
{
    struct marks m = {w, (start - w->start + w->at) & ~(CHUNK - 1), out};
    memset(out, 0, survey_chunks(w, start, end) * sizeof *out);
    mark(&m, start, end, MASK);
    if (w->whole) {
        mark(&m, start, end, WANT);
        mark(&m, start, end, BARE);
        return 0;
    }
    if (w->object >= 0)
        return survey_object(p, &m, start, end);
    int r = w->huge ? take_marks_off(p, w, start, end) : 0;
    if (r)
        return r;
    /* A page that maps the shared zero page holds nothing; a page of a private file mapping is the
     * target's only when it is no longer the file's. */
    uint64_t without = w->armed ? SNAP_PAGE_PFNZERO : SNAP_PAGE_FILE;
    return scan(p, &m, start, end, without, without, WANT);
}

int survey_first(const snap_pump *p, const snap_window *w, uint64_t start, uint64_t end, uint64_t *first)
{
    *first = end;
    if (w->object >= 0) {
        off_t data = lseek(w->object, (off_t)(start - w->start + w->at), SEEK_DATA);
        if (data < 0)
            return errno == ENXIO ? 0 : -errno;
        uint64_t at = ((uint64_t)data & ~(PAGE - 1)) - w->at + w->start;
        if (at < end)
            *first = at;
        return 0;
    }
    int64_t n = snap_pagemap_first(p->pagemap, start, end, SNAP_PAGE_PFNZERO, SNAP_PAGE_PFNZERO,
                                   SNAP_PAGE_PRESENT | SNAP_PAGE_SWAPPED, first);
    return n < 0 ? (int)n : 0;
}
