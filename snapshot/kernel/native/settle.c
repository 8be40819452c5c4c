/* T0: what is done while the target is stopped. Every page is looked at; a chunk whose copy is of a
 * time since which all its pages were protected is done, and only the others are the remainder. */
#define _GNU_SOURCE
#include "pump_internal.h"
#include "uffd.h"

#include <errno.h>
#include <stdlib.h>

#define GAP STEP /* between two chunks that are armed in one call */

/* Enters what a window holds in [start, end), run-time addresses of one block. */
static int look_at(snap_pump *p, const snap_window *w, uint64_t start, uint64_t end, seen *found)
{
    int r = survey(p, w, start, end, found);
    chunk *c = NULL;
    for (size_t i = 0; !r && i < survey_chunks(w, start, end); i++) {
        if (!found[i].want)
            continue;
        if (!c) {
            c = ledger_make(p, w->space, (start - w->start + w->at) & ~(CHUNK - 1));
            if (!c)
                return -ENOMEM;
        }
        c[i].want |= found[i].want;
        c[i].bare |= w->armed ? found[i].bare : found[i].want;
    }
    return r;
}

static int look(snap_pump *p, const snap_window *w, seen *found)
{
    int r = 0;
    for (uint64_t start = w->start, end; !r && start < w->end; start = end) {
        if (w->armed && w->object < 0) /* a reservation is mostly empty */
            r = survey_first(p, w, start, &start);
        if (r || start == w->end)
            break;
        end = start + BLOCK - (start - w->start + w->at) % BLOCK;
        if (end > w->end)
            end = w->end;
        r = look_at(p, w, start, end, found);
    }
    return r;
}

/* Nothing of the chunk belongs to the image any more. */
static int drop(snap_pump *p, uint32_t space, uint64_t address)
{
    const snap_saved none = {.address = address, .place = NO_PLACE, .space = space};
    pthread_mutex_lock(&p->lock);
    int r = enqueue(p, &none);
    pthread_mutex_unlock(&p->lock);
    return r;
}

/* What of the copies is good: what was copied and has been protected ever since. Counts the
 * remainder. */
static int judge(snap_pump *p)
{
    p->unsaved_chunks = p->unsaved_objects = 0;
    for (size_t k = 0; k < p->blocks.count; k++) {
        block *b = p->blocks.at[k];
        for (unsigned i = 0; i < BLOCK_CHUNKS; i++) {
            chunk *c = &b->chunks[i];
            p->counters.wanted_bytes += (uint64_t)__builtin_popcount(c->want) * PAGE;
            if (!c->want && c->kept) {
                int r = drop(p, b->space, b->start + i * CHUNK);
                if (r)
                    return r;
            }
            if (c->state != SAVED || !(c->kept & c->want))
                c->bare = c->want;
            c->bare |= (uint16_t)(c->want & ~c->kept);
            c->state = c->want && (c->bare || c->kept != c->want) ? UNSAVED : SAVED;
            count_unsaved(p, b->space, c->state == UNSAVED);
            p->counters.remainder_bytes += (uint64_t)__builtin_popcount(c->bare) * PAGE;
        }
    }
    return 0;
}

static int save_now(snap_pump *p, uint32_t space, uint64_t address, chunk *c)
{
    if (c->state != UNSAVED || !c->want)
        return 0;
    int r = save_stopped(p, space, address);
    if (!r)
        count_unsaved(p, space, -1);
    return r;
}

static int save_all(snap_pump *p)
{
    for (size_t k = 0; k < p->blocks.count; k++) {
        block *b = p->blocks.at[k];
        for (unsigned i = 0; i < BLOCK_CHUNKS; i++) {
            int r = save_now(p, b->space, b->start + i * CHUNK, &b->chunks[i]);
            if (r)
                return r;
        }
    }
    return 0;
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
    whole_pages(w, &low, &high);
    return uffd_writeprotect(p->uffd, low, high - low, UFFDIO_WRITEPROTECT_MODE_WP);
}

/* Arms what is unsaved. What lies between two such chunks is saved or empty and may be armed as well:
 * a call costs more than passing over some pages. */
static int arm_unsaved(snap_pump *p)
{
    for (size_t k = 0; k < p->windows.count; k++) {
        const snap_window *w = &p->windows.at[k].is;
        uint64_t end = w->at + (w->end - w->start), run = 0, run_end = 0;
        if (!w->armed)
            continue;
        const chunk *c = NULL;
        for (uint64_t at = w->at & ~(CHUNK - 1); at < end; at += CHUNK) {
            c = c && at % BLOCK ? c + 1 : ledger_chunk(p, w->space, at);
            if (!c) {
                at = (at & ~(BLOCK - 1)) + BLOCK - CHUNK;
                continue;
            }
            if (c->state != UNSAVED)
                continue;
            if (!run_end || at > run_end + GAP) {
                int r = arm(p, w, run, run_end);
                if (r)
                    return r;
                run = at;
            }
            run_end = at + CHUNK;
            p->counters.armed_bytes += (uint64_t)__builtin_popcount(c->want) * PAGE;
        }
        int r = arm(p, w, run, run_end);
        if (r)
            return r;
    }
    return 0;
}

/* Of hugetlbfs a discarded page keeps its mark, and one that is then only read comes with it: when the
 * copy was made between the event and the discarding (its caller is awake, and preempted), nothing
 * would tell that it is none of T0. */
static void distrust_discarded(snap_pump *p)
{
    for (size_t k = 0; p->huge_removed && k < p->windows.count; k++) {
        const snap_window *w = &p->windows.at[k].is;
        if (w->huge)
            ledger_distrust(p, w->start, w->end);
    }
}

int snap_pump_settle(snap_pump *p, uint64_t most, int trust)
{
    if (p->counters.stale)
        return -ESTALE;
    seen *found = malloc(sizeof *found * BLOCK_CHUNKS);
    int r = found ? 0 : -ENOMEM;
    p->counters.wanted_bytes = p->counters.remainder_bytes = p->counters.armed_bytes = 0;
    for (size_t k = 0; k < p->blocks.count; k++)
        for (unsigned i = 0; i < BLOCK_CHUNKS; i++) {
            p->blocks.at[k]->chunks[i].want = p->blocks.at[k]->chunks[i].bare = 0;
            if (!trust || (p->aliased && p->blocks.at[k]->space >= OBJECT_SPACE))
                p->blocks.at[k]->chunks[i].state = UNSAVED;
        }
    for (size_t k = 0; p->forked && k < p->windows.count; k++)
        if (p->windows.at[k].is.object >= 0)
            p->windows.at[k].is.armed = 0;
    distrust_discarded(p);
    for (size_t k = 0; !r && k < p->windows.count; k++)
        r = look(p, &p->windows.at[k].is, found);
    free(found);
    if (!r)
        r = judge(p);
    p->counters.armed_bytes = p->counters.wanted_bytes - p->counters.remainder_bytes;
    if (!r)
        r = p->counters.remainder_bytes <= most ? save_all(p) : save_unarmed(p);
    p->counters.objects_left = p->unsaved_objects;
    if (!r && p->unsaved_chunks)
        r = arm_unsaved(p);
    return r ? r : p->unsaved_chunks > 0;
}
