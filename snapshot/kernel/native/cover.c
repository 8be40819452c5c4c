/* What need not be looked at at T0. Of a *covered* range every page has been protected, the empty ones
 * too (UFFD_FEATURE_WP_UNPOPULATED), so whatever takes protection off any of it is told: a first
 * write by its fault, everything else by an event. Who serves these *lists* the chunk, and at T0 only
 * what is listed, or not covered, is looked at: the pause does not follow the size of the memory.
 *
 * Only private memory in small pages is ever covered. An object can be written, cut off and filled past
 * the mapping. Nor is covered what was discarded once (*fickle*): MADV_FREE leaves pages behind that
 * the kernel takes later, mark and all, without an event. Windows of which the caller knows the
 * like (KSM, MADV_FREE of before) are fickle as a whole. */
#define _GNU_SOURCE
#include "pump_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* ---- sets of ranges: sorted, apart from each other ---------------------------------------------- */

/* The first range that ends above `at`. */
static size_t above(const ranges *set, uint64_t at)
{
    size_t low = 0, high = set->count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (set->at[middle].end <= at)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

bool ranges_meet(const ranges *set, uint64_t start, uint64_t end)
{
    size_t i = above(set, start);
    return i < set->count && set->at[i].start < end;
}

int ranges_add(ranges *set, uint64_t start, uint64_t end)
{
    size_t first = above(set, start ? start - 1 : 0), last = first;
    while (last < set->count && set->at[last].start <= end) {
        start = set->at[last].start < start ? set->at[last].start : start;
        end = set->at[last].end > end ? set->at[last].end : end;
        last++;
    }
    if (first == last) {
        range *slot = VECTOR_PUSH(set);
        if (!slot)
            return -ENOMEM;
        memmove(&set->at[first + 1], &set->at[first], (set->count - 1 - first) * sizeof *set->at);
    } else {
        memmove(&set->at[first + 1], &set->at[last], (set->count - last) * sizeof *set->at);
        set->count -= last - first - 1;
    }
    set->at[first] = (range){start, end};
    return 0;
}

int ranges_remove(ranges *set, uint64_t start, uint64_t end)
{
    size_t i = above(set, start);
    if (i == set->count)
        return 0;
    if (set->at[i].start < start && set->at[i].end > end) {
        range upper = {end, set->at[i].end}, *slot = VECTOR_PUSH(set);
        if (!slot)
            return -ENOMEM;
        memmove(&set->at[i + 2], &set->at[i + 1], (set->count - i - 2) * sizeof *set->at);
        set->at[i].end = start;
        set->at[i + 1] = upper;
        return 0;
    }
    if (set->at[i].start < start) {
        set->at[i].end = start;
        i++;
    }
    size_t last = i;
    while (last < set->count && set->at[last].end <= end)
        last++;
    if (last < set->count && set->at[last].start < end)
        set->at[last].start = end;
    memmove(&set->at[i], &set->at[last], (set->count - last) * sizeof *set->at);
    set->count -= last - i;
    return 0;
}

/* ---- what is covered ---------------------------------------------------------------------------- */

bool coverable(const snap_pump *p, const snap_window *w)
{
    return p->empties && w->armed && !w->fickle && !w->huge && w->object < 0;
}

int cover(snap_pump *p, uint64_t start, uint64_t end)
{
    return ranges_meet(&p->fickle, start, end) ? 0 : ranges_add(&p->covered, start, end);
}

int uncover(snap_pump *p, uint64_t start, uint64_t end, bool for_good)
{
    int r = ranges_remove(&p->covered, start, end);
    return r || !for_good ? r : ranges_add(&p->fickle, start, end);
}

bool is_covered(const snap_pump *p, const snap_window *w, uint64_t at, uint64_t *until)
{
    *until = w->end;
    if (!coverable(p, w))
        return false;
    size_t i = above(&p->covered, at);
    if (i == p->covered.count)
        return false;
    bool inside = p->covered.at[i].start <= at;
    uint64_t edge = inside ? p->covered.at[i].end : p->covered.at[i].start;
    if (edge < *until)
        *until = edge;
    return inside;
}

/* ---- the list ----------------------------------------------------------------------------------- */

int list_chunk(snap_pump *p, uint32_t space, uint64_t address, chunk *c)
{
    if (c->listed)
        return 0;
    place *slot = VECTOR_PUSH(&p->listed);
    if (!slot)
        return -ENOMEM;
    *slot = (place){address, space};
    c->listed = true;
    return 0;
}

int list_range(snap_pump *p, uint64_t start, uint64_t end)
{
    int r = 0;
    for (size_t k = ledger_above(p, start); !r && k < p->windows.count; k++) {
        const snap_window *w = &p->windows.at[p->by_start[k]].is;
        if (w->start >= end)
            break;
        uint64_t from = (w->start > start ? w->start : start) - w->start + w->at;
        uint64_t to = (w->end < end ? w->end : end) - w->start + w->at;
        for (uint64_t at = from & ~(CHUNK - 1); !r && at < to; at += CHUNK) {
            chunk *c = ledger_make(p, w->space, at);
            r = c ? list_chunk(p, w->space, at, c) : -ENOMEM;
        }
    }
    return r;
}

static int by_place(const void *left, const void *right)
{
    const place *l = left, *r = right;
    if (l->space != r->space)
        return l->space < r->space ? -1 : 1;
    return l->address < r->address ? -1 : l->address > r->address;
}

void sort_listed(snap_pump *p)
{
    size_t kept = 0;
    bool sorted = true;
    for (size_t i = 0; i < p->listed.count; i++) {
        place at = p->listed.at[i];
        const chunk *c = ledger_chunk(p, at.space, at.address);
        if (!c || !c->listed)
            continue; /* put in order since */
        sorted = sorted && (!kept || by_place(&p->listed.at[kept - 1], &at) < 0);
        p->listed.at[kept++] = at;
    }
    if (!sorted) {
        qsort(p->listed.at, kept, sizeof *p->listed.at, by_place);
        size_t all = kept;
        kept = 0;
        for (size_t i = 0; i < all; i++)
            if (!i || by_place(&p->listed.at[i - 1], &p->listed.at[i]))
                p->listed.at[kept++] = p->listed.at[i];
    }
    p->listed.count = kept;
}

bool was_looked_at(const snap_pump *p, uint32_t space, uint64_t address)
{
    const place wanted = {address, space};
    return p->listed.count &&
           bsearch(&wanted, p->listed.at, p->listed.count, sizeof *p->listed.at, by_place);
}

void begin_work(snap_pump *p)
{
    sort_listed(p);
    places empty = p->work;
    empty.count = 0;
    p->work = p->listed;
    p->listed = empty;
}

int end_work(snap_pump *p)
{
    for (size_t i = 0; i < p->work.count; i++) {
        place at = p->work.at[i];
        if (!ledger_chunk(p, at.space, at.address)->listed)
            continue;
        place *slot = VECTOR_PUSH(&p->listed);
        if (!slot)
            return -ENOMEM;
        *slot = at;
    }
    p->work.count = 0;
    return 0;
}

const place *work_from(const snap_pump *p, uint32_t space, uint64_t address)
{
    size_t low = 0, high = p->work.count;
    place wanted = {address, space};
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (by_place(&p->work.at[middle], &wanted) < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low < p->work.count && p->work.at[low].space == space ? &p->work.at[low] : NULL;
}

void account(snap_pump *p, uint32_t space, chunk *c)
{
    bool good = c->state == SAVED, due = c->want && (!good || c->kept != c->want);
    uint16_t none = good ? (uint16_t)(c->want & ~c->kept) : lacking(c);
    p->wanted_pages += (uint64_t)(__builtin_popcount(c->want) - __builtin_popcount(c->counted));
    p->lacking_pages += (uint64_t)(__builtin_popcount(none) - __builtin_popcount(c->lacking));
    if (due != c->due)
        count_unsaved(p, space, due ? 1 : -1);
    c->counted = c->want;
    c->lacking = none;
    c->due = due;
}
