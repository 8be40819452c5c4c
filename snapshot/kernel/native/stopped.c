/* T0: what is done while the target is stopped. */
#define _GNU_SOURCE
#include "pagemap.h"
#include "pump_internal.h"
#include "uffd.h"

#include <errno.h>
#include <unistd.h>

int snap_pump_register(snap_pump *p, uint64_t *address)
{
    for (size_t i = 0; i < p->windows.count; i++) {
        const window *w = &p->windows.at[i];
        if (!w->armed)
            continue;
        *address = w->start;
        int r = uffd_register(p->uffd, w->start, w->end - w->start, UFFDIO_REGISTER_MODE_WP, NULL);
        if (r)
            return r;
    }
    return 0;
}

static void mark(snap_pump *p, const window *w, uint64_t start, uint64_t end)
{
    area *a = &p->areas.at[w->area];
    uint64_t at = start - w->start + w->at - a->start, stop = end - w->start + w->at - a->start;
    for (; at < stop; at += PAGE) {
        uint16_t bit = (uint16_t)(1u << (at % CHUNK / PAGE));
        uint16_t *want = &a->want[at / CHUNK];
        if (*want & bit)
            continue;
        *want |= bit;
        p->counters.wanted_bytes += PAGE;
        if (w->armed)
            p->counters.armed_bytes += PAGE;
    }
}

static int scan_object(snap_pump *p, const window *w)
{
    uint64_t at = w->at, end = w->at + (w->end - w->start);
    while (at < end) {
        off_t data = lseek(w->object, (off_t)at, SEEK_DATA);
        if (data < 0)
            return errno == ENXIO ? 0 : -errno;
        if ((uint64_t)data >= end)
            return 0;
        off_t hole = lseek(w->object, data, SEEK_HOLE);
        if (hole < 0)
            return -errno;
        uint64_t stop = ((uint64_t)hole + PAGE - 1) & ~(PAGE - 1);
        if (stop > end)
            stop = end;
        mark(p, w, ((uint64_t)data & ~(PAGE - 1)) - w->at + w->start, stop - w->at + w->start);
        at = stop;
    }
    return 0;
}

static int scan_window(snap_pump *p, const window *w)
{
    /* An armed page that maps the shared zero page holds nothing; a page of a private file
     * mapping is ours only when it is no longer the file's. */
    uint64_t without = w->armed ? SNAP_PAGE_PFNZERO : SNAP_PAGE_FILE;
    snap_page_range found[512];
    for (uint64_t next = w->start; next < w->end;) {
        int64_t n = snap_pagemap_scan(p->pagemap, next, w->end, without, without,
                                      SNAP_PAGE_PRESENT | SNAP_PAGE_SWAPPED, found, 512, &next);
        if (n < 0)
            return (int)n;
        for (int64_t i = 0; i < n; i++)
            mark(p, w, found[i].start, found[i].end);
    }
    return 0;
}

int snap_pump_scan(snap_pump *p)
{
    for (size_t i = 0; i < p->windows.count; i++) {
        const window *w = &p->windows.at[i];
        int r = w->object >= 0 ? scan_object(p, w) : scan_window(p, w);
        if (r)
            return r;
    }
    return 0;
}

int snap_pump_want(snap_pump *p, uint64_t start, uint64_t end)
{
    const window *w = ledger_find(p, start);
    if (!w || end > w->end || start >= end)
        return -EINVAL;
    mark(p, w, start, end);
    return 0;
}

/* Bits of the chunk that lie in windows which will not be armed. */
static uint16_t unarmed_pages(const snap_pump *p, const area *a, uint64_t index)
{
    uint64_t base = a->start + index * CHUNK;
    uint16_t bits = 0;
    for (size_t k = ledger_first(p, a, base); k < a->first_window + a->windows; k++) {
        const window *w = &p->windows.at[k];
        if (w->at >= base + CHUNK)
            break;
        for (unsigned i = 0; i < CHUNK_PAGES && !w->armed; i++) {
            uint64_t at = base + i * PAGE;
            if (at >= w->at && at < w->at + (w->end - w->start))
                bits |= (uint16_t)(1u << i);
        }
    }
    return bits;
}

int snap_pump_save_stopped(snap_pump *p, int everything)
{
    for (size_t k = 0; k < p->areas.count; k++) {
        area *a = &p->areas.at[k];
        if (!everything && !a->has_unarmed)
            continue;
        for (uint64_t i = 0; i < a->chunks; i++) {
            if (!a->want[i] || a->state[i] != UNSAVED)
                continue;
            if (!everything && !(a->want[i] & unarmed_pages(p, a, i)))
                continue;
            int r = save_stopped(p, (uint32_t)k, i);
            if (r)
                return r;
        }
    }
    return 0;
}

int snap_pump_arm(snap_pump *p)
{
    p->unsaved_chunks = 0;
    for (size_t k = 0; k < p->areas.count; k++) {
        const area *a = &p->areas.at[k];
        for (uint64_t i = 0; i < a->chunks; i++)
            if (a->want[i] && a->state[i] == UNSAVED)
                p->unsaved_chunks++;
    }
    for (size_t i = 0; i < p->windows.count; i++) {
        const window *w = &p->windows.at[i];
        if (!w->armed)
            continue;
        int r = uffd_writeprotect(p->uffd, w->start, w->end - w->start, UFFDIO_WRITEPROTECT_MODE_WP);
        if (r)
            return r;
    }
    return 0;
}
