/* T0: what is done while the target is stopped. What may have changed since the rounds is looked at: the
 * chunks that are listed, and what is not covered (cover.c). A chunk whose copy is of a time since
 * which all its pages were protected is done, and only the others are the remainder. */
#define _GNU_SOURCE
#include "pump_internal.h"
#include "uffd.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Listed chunks of a block: to look at so many and to arm them one by one takes as long as all of them. */
#ifdef SNAP_DENSE_BLOCK /* tests are small */
#define DENSE_BLOCK SNAP_DENSE_BLOCK
#else
#define DENSE_BLOCK (BLOCK_CHUNKS / 8 * 5)
#endif
#define GAP CHUNK /* between two chunks that are armed in one call: to pass over more costs more than a call */

/* ---- what has to be looked at ------------------------------------------------------------------- */

/* Lists what was ever found at the space addresses [from, to). */
static int list_known(snap_pump *p, uint32_t space, uint64_t from, uint64_t to)
{
    chunk *c = NULL;
    for (uint64_t at = from & ~(CHUNK - 1); at < to; at += CHUNK) {
        c = c && at % BLOCK ? c + 1 : ledger_chunk(p, space, at);
        if (!c) {
            at = (at & ~(BLOCK - 1)) + BLOCK - CHUNK;
            continue;
        }
        int r = c->want || c->kept ? list_chunk(p, space, at, c) : 0;
        if (r)
            return r;
    }
    return 0;
}

/* Of a window: where the next part is that is not covered; false: there is none. */
static bool next_gap(const snap_pump *p, const snap_window *w, uint64_t *start, uint64_t *end)
{
    for (; *start < w->end; *start = *end)
        if (!is_covered(p, w, *start, end))
            return true;
    return false;
}

/* All that is known of what is not covered, or but for some pages; objects whole, also where no window
 * shows them. */
static int list_gaps(snap_pump *p)
{
    int r = 0;
    for (size_t i = 0; !r && i < p->spared_chunks.count; i++) {
        const place where = p->spared_chunks.at[i];
        r = list_chunk(p, where.space, where.address, ledger_chunk(p, where.space, where.address));
    }
    for (size_t k = 0; !r && k < p->windows.count; k++) {
        const snap_window *w = &p->windows.at[k].is;
        for (uint64_t start = w->start, end; !r && next_gap(p, w, &start, &end); start = end)
            r = list_known(p, w->space, start - w->start + w->at, end - w->start + w->at);
    }
    for (size_t k = ledger_objects(p); !r && k < p->blocks.count; k++) {
        const block *b = p->blocks.at[k];
        r = list_known(p, b->space, b->start, b->start + BLOCK);
    }
    return r;
}

/* ---- looking ------------------------------------------------------------------------------------ */

/* Enters what a window holds in [start, end), run-time addresses of one block. */
static int look_at(snap_pump *p, const snap_window *w, uint64_t start, uint64_t end)
{
    uint64_t first = (start - w->start + w->at) & ~(CHUNK - 1);
    const seen *found = p->found;
    beat(p);
    int r = survey(p, w, start, end, p->found);
    chunk *c = NULL;
    for (size_t i = 0; !r && i < survey_chunks(w, start, end); i++) {
        p->counters.looked_chunks++;
        if (!found[i].want)
            continue;
        if (!c) {
            c = ledger_make(p, w->space, first);
            if (!c)
                return -ENOMEM;
        }
        uint16_t bare = w->armed ? found[i].bare : found[i].want;
        c[i].want |= found[i].want;
        c[i].bare |= bare;
        early_drop(p, &c[i], bare);
        r = list_chunk(p, w->space, first + i * CHUNK, &c[i]);
    }
    return r;
}

/* What is not covered of w. */
static int look_at_gaps(snap_pump *p, const snap_window *w)
{
    int r = 0;
    for (uint64_t at = w->start, gap; !r && next_gap(p, w, &at, &gap); at = gap)
        for (uint64_t start = at, end; !r && start < gap; start = end) {
            if (w->armed && w->object < 0) /* a reservation is mostly empty */
                r = survey_first(p, w, start, gap, &start);
            if (r || start == gap)
                break;
            end = start + BLOCK - (start - w->start + w->at) % BLOCK;
            end = end < gap ? end : gap;
            r = look_at(p, w, start, end);
        }
    return r;
}

/* Where many chunks are listed, with all others that are known: their block is looked at in one call, and
 * armed in one. */
static int list_dense(snap_pump *p)
{
    size_t count = p->listed.count;
    sort_listed(p);
    for (size_t i = 0, n; i < count; i += n) {
        const place first = p->listed.at[i];
        uint64_t start = first.address & ~(BLOCK - 1);
        n = 1;
        while (i + n < count && p->listed.at[i + n].space == first.space &&
               p->listed.at[i + n].address - start < BLOCK)
            n++;
        int r = n < DENSE_BLOCK || first.space >= OBJECT_SPACE ? 0 : list_known(p, first.space, start, start + BLOCK);
        if (r)
            return r;
    }
    return 0;
}

/* How many listed chunks lie behind one another from the i-th of `count` on, all in one block. */
static size_t run_of_listed(const snap_pump *p, size_t i, size_t count)
{
    const place *first = &p->listed.at[i];
    size_t n = 1;
    while (i + n < count && first[n].space == first->space && first[n].address == first->address + n * CHUNK &&
           first[n].address % BLOCK)
        n++;
    return n;
}

/* What is covered of listed chunks of private memory, the space addresses [start, end) of one block. */
static int look_at_listed(snap_pump *p, uint32_t space, uint64_t start, uint64_t end)
{
    int r = 0;
    for (size_t k = ledger_first(p, space, start); !r && k < p->windows.count; k++) {
        const snap_window *w = &p->windows.at[k].is;
        if (w->space != space || w->at >= end)
            break;
        uint64_t w_end = w->at + (w->end - w->start);
        uint64_t from = w->at > start ? w->at : start;
        uint64_t to = w_end < end ? w_end : end, until;
        from = from - w->at + w->start;
        to = to - w->at + w->start;
        for (; !r && from < to; from = until) {
            bool covered = is_covered(p, w, from, &until);
            until = until < to ? until : to;
            r = covered ? look_at(p, w, from, until) : 0;
        }
    }
    return r;
}

static int look(snap_pump *p)
{
    p->counters.looked_chunks = p->held_ahead = 0;
    int r = p->passes && !p->looked ? written_look(p) : 0;
    if (!r)
        r = list_gaps(p);
    if (!r && !p->passes)
        r = list_dense(p);
    if (r)
        return r;
    sort_listed(p);
    size_t count = p->listed.count; /* what is found beside it is listed behind it */
    for (size_t i = 0; i < count; i++) {
        chunk *c = ledger_chunk(p, p->listed.at[i].space, p->listed.at[i].address);
        c->want = 0;
        if (c->state == SAVED)
            c->bare = 0;
    }
    for (size_t i = 0, n; !r && i < count; i += n) {
        const place where = p->listed.at[i];
        n = run_of_listed(p, i, count);
        if (where.space < OBJECT_SPACE)
            r = look_at_listed(p, where.space, where.address, where.address + n * CHUNK);
    }
    for (size_t k = 0; !r && k < p->windows.count; k++)
        r = look_at_gaps(p, &p->windows.at[k].is);
    return r;
}

/* Once more at what may have been written since, for the caller's sake. */
static int look_at_touched(snap_pump *p)
{
    int r = 0;
    for (size_t i = 0; !r && i < p->touched.count; i++) {
        const window *at = ledger_find(p, p->touched.at[i]);
        if (!at)
            continue;
        const snap_window w = at->is;
        uint64_t where = (p->touched.at[i] - w.start + w.at) & ~(CHUNK - 1);
        uint64_t start = where > w.at ? where - w.at + w.start : w.start, end = where + CHUNK - w.at + w.start;
        const chunk *c = ledger_chunk(p, w.space, where);
        int held = c ? __builtin_popcount(c->early) : 0;
        end = end < w.end ? end : w.end;
        r = look_at(p, &w, start, end);
        if (!r && p->by_list)
            r = ranges_add(&p->looked_at, start, end);
        if (c && p->held_ahead) /* those are copied again */
            p->held_ahead -= (uint64_t)(held - __builtin_popcount(c->early));
    }
    return r;
}

/* A chunk that no look has listed is compared with what is known of it. */
static void compare(snap_pump *p, uint64_t address, const seen *found, const chunk *c)
{
    unsigned other = (found->want ^ (c ? c->want & found->mask : 0u)) | found->bare;
    if (other && !p->counters.missed_pages) {
        p->counters.missed_address = address;
        p->counters.missed_found = (uint64_t)found->want << 32 | (uint64_t)found->bare << 16 | found->mask;
        p->counters.missed_known = c ? (uint64_t)c->want << 48 | (uint64_t)c->kept << 32 |
                                           (uint64_t)c->bare << 16 | c->state << 8 | c->listed
                                     : 0;
    }
    p->counters.missed_pages += (uint64_t)__builtin_popcount(other);
}

/* What is covered and not listed is as it is known. */
static int verify(snap_pump *p)
{
    int r = 0;
    for (size_t k = 0; !r && k < p->windows.count; k++) {
        const snap_window *w = &p->windows.at[k].is;
        for (uint64_t start = w->start, until, end; !r && start < w->end; start = until) {
            bool covered = is_covered(p, w, start, &until);
            end = start + BLOCK - (start - w->start + w->at) % BLOCK;
            until = until < end ? until : end;
            r = covered ? survey(p, w, start, until, p->found) : 0;
            uint64_t at = (start - w->start + w->at) & ~(CHUNK - 1);
            for (size_t i = 0; covered && !r && i < survey_chunks(w, start, until); i++) {
                const chunk *c = ledger_chunk(p, w->space, at + i * CHUNK);
                if (!c || !c->listed || !was_looked_at(p, w->space, at + i * CHUNK))
                    compare(p, at + i * CHUNK, &p->found[i], c);
            }
        }
    }
    return r;
}

/* ---- what is to be saved ------------------------------------------------------------------------ */

/* Nothing of the chunk belongs to the image any more. */
static int drop(snap_pump *p, uint32_t space, uint64_t address)
{
    const snap_saved none = {.address = address, .place = NO_PLACE, .space = space};
    pthread_mutex_lock(&p->lock);
    int r = enqueue(p, &none);
    pthread_mutex_unlock(&p->lock);
    return r;
}

static void judge_chunk(snap_pump *p, chunk *c)
{
    c->bare = missing(c);
    early_drop(p, c, (uint16_t)~c->bare);
    c->state = c->want && (c->bare || c->kept != c->want) ? UNSAVED : SAVED;
}

/* What of the copies is good: what was copied and has been protected ever since. Counts the
 * remainder. */
static int judge(snap_pump *p)
{
    uint64_t remainder = p->held_ahead, lacking = 0;
    for (size_t i = 0; i < p->listed.count; i++) {
        const place where = p->listed.at[i];
        chunk *c = ledger_chunk(p, where.space, where.address);
        if (!c->want && c->kept) {
            int r = drop(p, where.space, where.address);
            if (r)
                return r;
        }
        judge_chunk(p, c);
        account(p, where.space, c);
        remainder += (uint64_t)__builtin_popcount(c->bare & ~c->early);
        lacking += (uint64_t)__builtin_popcount(c->lacking);
    }
    p->counters.wanted_bytes = p->wanted_pages * PAGE;
    /* Of what is not listed and has no copy every page is lacking. */
    p->counters.remainder_bytes = (p->lacking_pages - lacking + remainder) * PAGE;
    p->counters.armed_bytes = p->counters.wanted_bytes - p->counters.remainder_bytes;
    return 0;
}

static int save_all(snap_pump *p)
{
    int r = 0;
    for (size_t i = 0; !r && i < p->listed.count; i++) {
        const place where = p->listed.at[i];
        r = save_now(p, where.space, where.address, ledger_chunk(p, where.space, where.address));
    }
    for (size_t k = 0; !r && p->unsaved_chunks && k < p->blocks.count; k++) {
        block *b = p->blocks.at[k];
        for (unsigned i = 0; !r && i < BLOCK_CHUNKS; i++)
            r = save_now(p, b->space, b->start + i * CHUNK, &b->chunks[i]);
    }
    return r;
}

/* What no look has listed: copies that are not to be trusted. */
static int hold_others(snap_pump *p)
{
    int r = 0;
    for (size_t k = 0; !r && k < p->blocks.count; k++) {
        block *b = p->blocks.at[k];
        for (unsigned i = 0; !r && i < BLOCK_CHUNKS; i++) {
            chunk *c = &b->chunks[i];
            if (is_unsaved(c) && lacking(c)) {
                beat(p);
                r = early_hold(p, b->space, b->start + i * CHUNK, c, lacking(c));
            }
        }
    }
    return r;
}

/* Where writers wait for nobody. */
static int hold_all(snap_pump *p, uint64_t most)
{
    uint64_t bytes = p->counters.remainder_bytes;
    if (bytes > most)
        return -E2BIG;
    int r = early_hold_listed(p);
    for (size_t i = 0; i < p->listed.count; i++) {
        const place where = p->listed.at[i];
        account(p, where.space, ledger_chunk(p, where.space, where.address));
    }
    if (!r && p->lacking_pages)
        r = hold_others(p);
    pthread_mutex_lock(&p->lock);
    p->counters.stopped_bytes += bytes;
    pthread_mutex_unlock(&p->lock);
    return r;
}

/* Chunks with pages in windows that cannot be armed. */
static int save_unarmed(snap_pump *p)
{
    for (size_t k = 0; k < p->windows.count; k++) {
        const snap_window *w = &p->windows.at[k].is;
        if (w->armed)
            continue;
        uint64_t end = w->at + (w->end - w->start);
        for (uint64_t at = w->at & ~(CHUNK - 1); at < end; at += CHUNK) {
            chunk *c = ledger_chunk(p, w->space, at);
            int r = c ? save_now(p, w->space, at, c) : 0;
            if (r)
                return r;
            if (!c)
                at = (at & ~(BLOCK - 1)) + BLOCK - CHUNK;
        }
    }
    return 0;
}

/* Arms the pages of w in [from, to), space addresses. */
static int arm(snap_pump *p, const snap_window *w, uint64_t from, uint64_t to)
{
    uint64_t w_end = w->at + (w->end - w->start);
    uint64_t low = from > w->at ? from : w->at, high = to < w_end ? to : w_end;
    if (low >= high)
        return 0;
    low = low - w->at + w->start;
    high = high - w->at + w->start;
    beat(p);
    return spare_protect(p, w, low, high);
}

static int arm_space(snap_pump *p, uint32_t space, uint64_t from, uint64_t to)
{
    int r = 0;
    for (size_t k = ledger_first(p, space, from); !r && k < p->windows.count; k++) {
        const snap_window *w = &p->windows.at[k].is;
        if (w->space != space || w->at >= to)
            break;
        r = w->armed ? arm(p, w, from, to) : 0;
    }
    return r;
}

/* Arms what is unsaved and listed: the other is. What lies between two such chunks is saved or empty and
 * may be armed as well: a call costs more than passing over some pages. */
static int arm_unsaved(snap_pump *p)
{
    uint64_t from = 0, to = 0;
    uint32_t space = 0;
    for (size_t i = 0; i < p->listed.count; i++) {
        const place where = p->listed.at[i];
        const chunk *c = ledger_chunk(p, where.space, where.address);
        if (c->state != UNSAVED)
            continue;
        if (to && (where.space != space || where.address > to + GAP)) {
            int r = arm_space(p, space, from, to);
            if (r)
                return r;
            to = 0;
        }
        if (!to) {
            space = where.space;
            from = where.address;
        }
        to = where.address + CHUNK;
        p->counters.armed_bytes += (uint64_t)__builtin_popcount(missing(c)) * PAGE;
    }
    return to ? arm_space(p, space, from, to) : 0;
}

/* Of hugetlbfs a discarded page keeps its mark, and one that is then only read comes with it: when the
 * copy was made between the event and the discarding (its caller is awake, and preempted), nothing
 * would tell that it is none of T0. */
static int distrust_discarded(snap_pump *p)
{
    int r = 0;
    for (size_t k = 0; !r && p->huge_removed && k < p->windows.count; k++) {
        const snap_window *w = &p->windows.at[k].is;
        r = w->huge ? ledger_distrust(p, w->start, w->end) : 0;
    }
    return r;
}

static void distrust_copies(snap_pump *p, bool all)
{
    for (size_t k = 0; k < p->blocks.count; k++) {
        block *b = p->blocks.at[k];
        if (!all && (!p->aliased || b->space < OBJECT_SPACE))
            continue;
        for (unsigned i = 0; i < BLOCK_CHUNKS; i++) {
            chunk *c = &b->chunks[i];
            ledger_soil(p, b->space, c, UINT16_MAX);
        }
    }
}

/* What was found to have no good copy is copied, if it is not too much: it has to be in any case, unless there
 * is no T0 at all. What is written since is found by look_at, which drops such a copy. */
static int hold_ahead(snap_pump *p)
{
    uint64_t pages = 0;
    for (size_t i = 0; i < p->listed.count; i++) {
        chunk *c = ledger_chunk(p, p->listed.at[i].space, p->listed.at[i].address);
        judge_chunk(p, c);
        pages += is_unsaved(c) ? (uint64_t)__builtin_popcount(lacking(c)) : 0;
    }
    if (pages * PAGE > p->most_ahead)
        return 0;
    p->held_ahead = pages;
    return early_hold_listed(p);
}

void settle_ahead(snap_pump *p)
{
    if (p->counters.stale)
        return;
    int r = look(p);
    sort_listed(p);
    if (!r && !p->aliased && !p->huge_removed)
        p->surveyed = hold_ahead(p) == 0;
}

int settle(snap_pump *p, uint64_t most, int trust)
{
    if (p->counters.stale)
        return -ESTALE;
    p->counters.missed_pages = 0;
    bool looked = p->passes && p->surveyed && trust == (SNAP_TRUST_COPIES | SNAP_TRUST_COVER);
    distrust_copies(p, !(trust & SNAP_TRUST_COPIES));
    for (size_t k = 0; p->forked && k < p->windows.count; k++)
        if (p->windows.at[k].is.object >= 0)
            p->windows.at[k].is.armed = 0;
    if (!(trust & SNAP_TRUST_COVER))
        p->covered.count = 0;
    int r = distrust_discarded(p);
    if (!r && !looked)
        r = look(p);
    if (!r)
        r = look_at_touched(p);
    sort_listed(p);
    if (!r && p->verify)
        r = verify(p);
    if (!r)
        r = judge(p);
    if (!r && p->passes) {
        r = hold_all(p, most);
        return r ? r : p->by_list;
    }
    if (!r)
        r = p->counters.remainder_bytes <= most ? save_all(p) : save_unarmed(p);
    if (!r)
        r = spare_find(p, true);
    if (!r)
        r = spare_save(p);
    p->counters.objects_left = p->unsaved_objects;
    if (!r && p->unsaved_chunks)
        r = arm_unsaved(p);
    return r ? r : p->unsaved_chunks > 0;
}
