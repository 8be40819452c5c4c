/* Which pages the image needs, what became of them, and where they are in the target now. */
#define _GNU_SOURCE
#include "pump_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static int by_space(const void *left, const void *right)
{
    const snap_window *l = &((const window *)left)->is, *r = &((const window *)right)->is;
    if (l->space != r->space)
        return l->space < r->space ? -1 : 1;
    return l->at < r->at ? -1 : l->at > r->at;
}

static int by_start(const void *left, const void *right, void *windows)
{
    const window *w = windows;
    uint64_t l = w[*(const uint32_t *)left].is.start, r = w[*(const uint32_t *)right].is.start;
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
        qsort(p->windows.at, n, sizeof *p->windows.at, by_space);
    for (size_t i = 0; i < n; i++)
        order[i] = (uint32_t)i;
    if (n)
        qsort_r(order, n, sizeof *order, by_start, p->windows.at);
    return 0;
}

window *ledger_find(snap_pump *p, uint64_t address)
{
    size_t low = 0, high = p->windows.count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        window *w = &p->windows.at[p->by_start[middle]];
        if (address < w->is.start)
            high = middle;
        else if (address >= w->is.end)
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
        if (p->windows.at[p->by_start[middle]].is.end <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

size_t ledger_first(const snap_pump *p, uint32_t space, uint64_t at)
{
    /* Windows on a shared object may overlap, those of private memory cannot: only there does a
     * binary search by `at` find every window of a chunk. */
    bool object = space >= OBJECT_SPACE;
    size_t low = 0, high = p->windows.count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        const snap_window *w = &p->windows.at[middle].is;
        bool below = w->space < space ||
                     (w->space == space && !object && w->at + (w->end - w->start) <= at);
        if (below)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static size_t block_position(const snap_pump *p, uint32_t space, uint64_t start)
{
    size_t low = 0, high = p->blocks.count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        const block *b = p->blocks.at[middle];
        if (b->space < space || (b->space == space && b->start < start))
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

size_t ledger_objects(const snap_pump *p)
{
    return block_position(p, OBJECT_SPACE, 0);
}

chunk *ledger_chunk(const snap_pump *p, uint32_t space, uint64_t at)
{
    uint64_t start = at & ~(BLOCK - 1);
    size_t i = block_position(p, space, start);
    if (i == p->blocks.count || p->blocks.at[i]->space != space || p->blocks.at[i]->start != start)
        return NULL;
    return &p->blocks.at[i]->chunks[(at - start) / CHUNK];
}

chunk *ledger_make(snap_pump *p, uint32_t space, uint64_t at)
{
    chunk *c = ledger_chunk(p, space, at);
    if (c)
        return c;
    uint64_t start = at & ~(BLOCK - 1);
    block *b = calloc(1, sizeof *b);
    if (!b)
        return NULL;
    b->space = space;
    b->start = start;
    pthread_mutex_lock(&p->lock); /* the consumers look chunks up */
    block **slot = VECTOR_PUSH(&p->blocks);
    if (slot) {
        size_t i = block_position(&(snap_pump){.blocks = {p->blocks.at, p->blocks.count - 1, 0}},
                                  space, start);
        memmove(&p->blocks.at[i + 1], &p->blocks.at[i], (p->blocks.count - 1 - i) * sizeof b);
        p->blocks.at[i] = b;
    }
    pthread_mutex_unlock(&p->lock);
    if (!slot) {
        free(b);
        return NULL;
    }
    return &b->chunks[(at - start) / CHUNK];
}

/* Splits windows so that `address` is no window's inside. */
static int split(snap_pump *p, uint64_t address)
{
    window *w = ledger_find(p, address);
    if (!w || w->is.start == address)
        return 0;
    window upper = *w;
    upper.is.at += address - upper.is.start;
    upper.is.start = address;
    w->is.end = address;
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
        const snap_window *w = &p->windows.at[i].is;
        if (w->start >= start && w->end <= end)
            continue;
        p->windows.at[kept++] = p->windows.at[i];
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
        snap_window *w = &p->windows.at[i].is;
        if (w->start >= from && w->end <= from + length) {
            w->start = w->start - from + to;
            w->end = w->end - from + to;
        }
    }
    return ledger_index(p);
}

void ledger_soil(snap_pump *p, uint32_t space, chunk *c, uint16_t pages)
{
    c->bare = c->state == SAVED ? pages : c->bare | pages;
    c->state = UNSAVED;
    early_drop(p, c, pages);
    account(p, space, c);
}

int ledger_distrust(snap_pump *p, uint64_t start, uint64_t end)
{
    for (size_t k = ledger_above(p, start); k < p->windows.count; k++) {
        const snap_window *w = &p->windows.at[p->by_start[k]].is;
        if (w->start >= end)
            break;
        uint64_t low = (w->start > start ? w->start : start) - w->start + w->at;
        uint64_t high = (w->end < end ? w->end : end) - w->start + w->at;
        for (uint64_t at = low & ~(CHUNK - 1); at < high; at += CHUNK) {
            chunk *c = ledger_chunk(p, w->space, at);
            if (!c) {
                at = (at & ~(BLOCK - 1)) + BLOCK - CHUNK;
                continue;
            }
            ledger_soil(p, w->space, c, UINT16_MAX);
            int r = list_chunk(p, w->space, at, c);
            if (r)
                return r;
        }
    }
    return 0;
}

uint64_t ledger_unsaved(snap_pump *p, uint64_t start, uint64_t end, uint8_t state, uint64_t *where)
{
    uint64_t bytes = 0;
    for (size_t k = ledger_above(p, start); k < p->windows.count; k++) {
        const snap_window *w = &p->windows.at[p->by_start[k]].is;
        if (w->start >= end)
            break;
        uint64_t low = (w->start > start ? w->start : start) - w->start + w->at;
        uint64_t high = (w->end < end ? w->end : end) - w->start + w->at;
        for (uint64_t at = low; at < high; at += PAGE) {
            const chunk *c = ledger_chunk(p, w->space, at);
            if (!c) {
                at = (at & ~(BLOCK - 1)) + BLOCK - PAGE;
                continue;
            }
            if (c->state >= state || !c->want) {
                at = (at & ~(CHUNK - 1)) + CHUNK - PAGE;
                continue;
            }
            if ((c->want & ~c->early) >> (at % CHUNK / PAGE) & 1) {
                if (!bytes)
                    *where = at;
                bytes += PAGE;
            }
        }
    }
    return bytes;
}

void whole_pages(const snap_window *w, uint64_t *low, uint64_t *high)
{
    if (!w->huge)
        return;
    *low &= ~(uint64_t)(w->huge - 1);
    *high = (*high + w->huge - 1) & ~(uint64_t)(w->huge - 1);
}

static bool any_window(const snap_pump *p, uint64_t start, uint64_t end,
                       bool (*is_one)(const snap_pump *, const snap_window *))
{
    for (size_t k = ledger_above(p, start); k < p->windows.count; k++) {
        const snap_window *w = &p->windows.at[p->by_start[k]].is;
        if (w->start >= end)
            break;
        if (is_one(p, w))
            return true;
    }
    return false;
}

static bool is_shared(const snap_pump *p, const snap_window *w)
{
    (void)p;
    return w->object >= 0;
}

static bool is_huge(const snap_pump *p, const snap_window *w)
{
    (void)p;
    return w->huge;
}

bool ledger_shared(const snap_pump *p, uint64_t start, uint64_t end)
{
    return any_window(p, start, end, is_shared);
}

bool ledger_huge(const snap_pump *p, uint64_t start, uint64_t end)
{
    return any_window(p, start, end, is_huge);
}

bool ledger_coverable(const snap_pump *p, uint64_t start, uint64_t end)
{
    return any_window(p, start, end, coverable);
}

uint64_t ledger_unsaved_objects(const snap_pump *p, uint64_t *where)
{
    uint64_t bytes = 0;
    for (size_t k = ledger_objects(p); k < p->blocks.count; k++)
        for (unsigned i = 0; i < BLOCK_CHUNKS; i++) {
            const chunk *c = &p->blocks.at[k]->chunks[i];
            if (!is_unsaved(c))
                continue;
            if (!bytes)
                *where = p->blocks.at[k]->start + i * CHUNK;
            bytes += (uint64_t)__builtin_popcount(c->want) * PAGE;
        }
    return bytes;
}
