/* Which pages the image needs, what became of them, and where they are in the target now. */
#define _GNU_SOURCE
#include "pump_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int snap_grow(void **at, size_t *capacity, size_t count, size_t size)
{
    if (count < *capacity)
        return 0;
    size_t wider = *capacity ? *capacity * 2 : 64;
    void *moved = realloc(*at, wider * size);
    if (!moved)
        return -ENOMEM;
    *at = moved;
    *capacity = wider;
    return 0;
}

static int by_area(const void *left, const void *right)
{
    const window *l = left, *r = right;
    if (l->area != r->area)
        return l->area < r->area ? -1 : 1;
    return l->at < r->at ? -1 : l->at > r->at;
}

static int by_start(const void *left, const void *right, void *windows)
{
    const window *w = windows;
    uint64_t l = w[*(const uint32_t *)left].start, r = w[*(const uint32_t *)right].start;
    return l < r ? -1 : l > r;
}

int ledger_index(snap_pump *p)
{
    size_t n = p->windows.count;
    uint32_t *order = realloc(p->by_start, (n ? n : 1) * sizeof *order);
    if (!order)
        return -ENOMEM;
    p->by_start = order;
    if (n)
        qsort(p->windows.at, n, sizeof *p->windows.at, by_area);
    for (size_t i = 0; i < n; i++)
        order[i] = (uint32_t)i;
    if (n)
        qsort_r(order, n, sizeof *order, by_start, p->windows.at);
    for (size_t i = 0; i < p->areas.count; i++)
        p->areas.at[i].windows = 0;
    for (size_t i = 0; i < n; i++) {
        area *a = &p->areas.at[p->windows.at[i].area];
        if (!a->windows++)
            a->first_window = i;
    }
    return 0;
}

window *ledger_find(snap_pump *p, uint64_t address)
{
    size_t low = 0, high = p->windows.count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        window *w = &p->windows.at[p->by_start[middle]];
        if (address < w->start)
            high = middle;
        else if (address >= w->end)
            low = middle + 1;
        else
            return w;
    }
    return NULL;
}

size_t ledger_above(const snap_pump *p, uint64_t address)
{
    size_t low = 0, high = p->windows.count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (p->windows.at[p->by_start[middle]].end <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

size_t ledger_first(const snap_pump *p, const area *a, uint64_t at)
{
    /* Windows on a shared object may overlap, those of private memory cannot: only there does a
     * binary search by `at` find every window of a chunk. */
    if (a->space >= 1u << 16)
        return a->first_window;
    size_t low = a->first_window, high = low + a->windows;
    while (low < high) {
        size_t middle = (low + high) / 2;
        const window *w = &p->windows.at[middle];
        if (w->at + (w->end - w->start) <= at)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Splits windows so that `address` is no window's inside. */
static int split(snap_pump *p, uint64_t address)
{
    window *w = ledger_find(p, address);
    if (!w || w->start == address)
        return 0;
    window upper = *w;
    upper.at += address - upper.start;
    upper.start = address;
    w->end = address;
    window *slot = VECTOR_PUSH(&p->windows);
    if (!slot)
        return -ENOMEM;
    *slot = upper;
    return ledger_index(p);
}

int ledger_unmap(snap_pump *p, uint64_t start, uint64_t end)
{
    int r = split(p, start);
    if (!r)
        r = split(p, end);
    if (r)
        return r;
    size_t kept = 0;
    for (size_t i = 0; i < p->windows.count; i++) {
        window *w = &p->windows.at[i];
        if (w->start >= start && w->end <= end)
            continue;
        p->windows.at[kept++] = *w;
    }
    p->windows.count = kept;
    return ledger_index(p);
}

int ledger_move(snap_pump *p, uint64_t from, uint64_t to, uint64_t length)
{
    int r = split(p, from);
    if (!r)
        r = split(p, from + length);
    if (r)
        return r;
    for (size_t i = 0; i < p->windows.count; i++) {
        window *w = &p->windows.at[i];
        if (w->start >= from && w->end <= from + length) {
            w->start = w->start - from + to;
            w->end = w->end - from + to;
        }
    }
    return ledger_index(p);
}

uint64_t ledger_unsaved(snap_pump *p, uint64_t start, uint64_t end, uint8_t state, uint64_t *where)
{
    uint64_t bytes = 0;
    for (size_t k = ledger_above(p, start); k < p->windows.count; k++) {
        const window *w = &p->windows.at[p->by_start[k]];
        if (w->start >= end)
            break;
        const area *a = &p->areas.at[w->area];
        uint64_t low = (w->start > start ? w->start : start) - w->start + w->at;
        uint64_t high = (w->end < end ? w->end : end) - w->start + w->at;
        for (uint64_t at = low; at < high; at += PAGE) {
            uint64_t i = (at - a->start) / CHUNK;
            if (a->state[i] >= state || !a->want[i]) {
                at = a->start + (i + 1) * CHUNK - PAGE;
                continue;
            }
            if (a->want[i] >> ((at - a->start) % CHUNK / PAGE) & 1) {
                if (!bytes)
                    *where = at;
                bytes += PAGE;
            }
        }
    }
    return bytes;
}
