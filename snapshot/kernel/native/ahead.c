/* Ahead of T0: memory is protected and copied while the target writes to it. Rounds; each protects
 * what is not and copies what has no copy of a time since when it was. Whoever writes meanwhile is let
 * through at once: the next round, and T0 itself, find the page unprotected and take no copy of it for
 * good. So nothing need be noted, and a copy that is kept was never torn. */
#define _GNU_SOURCE
#include "pump_internal.h"
#include "uffd.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define SLICE_CHUNKS (STEP / CHUNK + 1)
#define DENSE_STEP 6 /* chunks of a step: to protect so many one by one takes as long as all of them */
#define MOST_TRIES 50 /* to protect a slice while events keep the kernel from it */

/* ---- rounds ----------------------------------------------------------------------------------- */

typedef struct {
    snap_window w;
    uint64_t start, end; /* run-time */
    uint64_t at;         /* space address of the first chunk */
    size_t chunks;
    bool covers;         /* all of it is protected, so that it is covered (cover.c) */
    seen seen[SLICE_CHUNKS];
    int64_t place[SLICE_CHUNKS]; /* of the copy made, or NO_PLACE */
    uint16_t spared[SLICE_CHUNKS]; /* pages that are not to be protected (spare.c) */
    uint16_t copied[SLICE_CHUNKS]; /* its pages: a patch, if they are not all that the chunk wants */
    bool dirty[SLICE_CHUNKS];
    bool loose[SLICE_CHUNKS]; /* to be protected: the dirty, and what is listed, though it be empty */
    bool any_loose;
    uint64_t places;  /* that the copies need, about */
} slice;

/* Behind the last of the chunks that this round has to do in the step of `first`, if they are many; else
 * `end`. */
static uint64_t dense_end(const snap_pump *p, const place *first, uint64_t end)
{
    const place *next = first, *stop = p->work.at + p->work.count;
    uint64_t step = (first->address & ~(STEP - 1)) + STEP;
    while (next < stop && next->space == first->space && next->address < step)
        next++;
    return next - first >= DENSE_STEP ? next[-1].address + CHUNK : end;
}

/* Where the next slice of w in [at, w->end) is; *end is w->end when there is none. What is covered is
 * passed over, but for the work of this round, with what lies between when nothing is to be copied: of
 * that only what is unsaved is protected once more. */
static int next_part(const snap_pump *p, const snap_window *w, uint64_t at, bool copies, uint64_t *start,
                     uint64_t *end)
{
    for (uint64_t until; at < w->end; at = until) {
        if (is_covered(p, w, at, &until)) {
            const place *first = work_from(p, w->space, at & ~(CHUNK - 1)), *listed = first;
            if (!listed || listed->address >= until)
                continue;
            *start = listed->address > at ? listed->address : at;
            *end = listed->address;
            do
                *end += CHUNK;
            while (++listed < p->work.at + p->work.count && listed->space == w->space &&
                   listed->address == *end && *end % STEP);
            if (!copies)
                *end = dense_end(p, first, *end);
            *end = *end < until ? *end : until;
            return 0;
        }
        int r = survey_first(p, w, at, until, start);
        if (r)
            return r;
        if (*start < until) {
            *end = (*start & ~(STEP - 1)) + STEP;
            *end = *end < w->end ? *end : w->end;
            return 0;
        }
    }
    *start = *end = w->end;
    return 0;
}

/* The next slice that has to be looked at; *found: false at the end of the round. */
static int next_slice(snap_pump *p, slice *s, bool copies, bool *found)
{
    *found = false;
    for (;;) {
        size_t k = ledger_above(p, p->cursor);
        while (k < p->windows.count && !p->windows.at[p->by_start[k]].registered)
            k++;
        if (k == p->windows.count)
            return 0;
        s->w = p->windows.at[p->by_start[k]].is;
        s->start = s->w.start > p->cursor ? s->w.start : p->cursor;
        int r = next_part(p, &s->w, s->start, copies, &s->start, &s->end);
        if (r)
            return r;
        if (s->start == s->w.end) {
            p->cursor = s->w.end;
            continue;
        }
        uint64_t until;
        s->covers = coverable(p, &s->w) && !is_covered(p, &s->w, s->start, &until) &&
                    !ranges_meet(&p->fickle, s->start & ~(STEP - 1), s->end);
        if (s->covers) { /* with what is empty before it */
            uint64_t step = s->start & ~(STEP - 1);
            s->start = step > s->w.start ? step : s->w.start;
        }
        s->at = (s->start - s->w.start + s->w.at) & ~(CHUNK - 1);
        s->chunks = survey_chunks(&s->w, s->start, s->end);
        *found = true;
        return 0;
    }
}

/* The copy of a chunk is not good any more: not for the pages `bare` or, of what can be written past its
 * mapping, for all. */
static void soil(snap_pump *p, const slice *s, chunk *c, uint16_t bare)
{
    bool all = s->w.object >= 0 || s->w.huge;
    ledger_soil(p, s->w.space, c, all ? UINT16_MAX : bare);
}

static bool is_part(const slice *s, const chunk *c)
{
    return s->w.object < 0 && !s->w.huge && is_patched(c);
}

/* `survey`, in which spared pages pass for protected: T0 looks at their chunks again (note_spared). */
static int look(const snap_pump *p, const slice *s, seen *out)
{
    int r = survey(p, &s->w, s->start, s->end, out);
    for (size_t i = 0; !r && i < s->chunks; i++)
        out[i].bare &= (uint16_t)~s->spared[i];
    return r;
}

static int find_spared(snap_pump *p, slice *s)
{
    int r = spare_find(p, false);
    for (size_t i = 0; !r && i < s->chunks; i++)
        s->spared[i] = spare_pages(p, &s->w, s->at + i * CHUNK);
    return r;
}

/* Which chunks have no good copy. */
static int find_dirty(snap_pump *p, slice *s)
{
    int r = look(p, s, s->seen);
    if (r)
        return r;
    s->any_loose = s->covers;
    uint64_t patches = 0;
    s->places = 0;
    for (size_t i = 0; i < s->chunks; i++) {
        const seen *now = &s->seen[i];
        chunk *c = now->want ? ledger_make(p, s->w.space, s->at + i * CHUNK)
                             : ledger_chunk(p, s->w.space, s->at + i * CHUNK);
        if (!c && now->want)
            return -ENOMEM;
        s->place[i] = NO_PLACE;
        s->dirty[i] = s->loose[i] = false;
        if (!c)
            continue;
        c->want = (uint16_t)((c->want & ~now->mask) | now->want);
        s->dirty[i] = c->want && (now->bare || c->state != SAVED || c->kept != c->want);
        if (s->dirty[i])
            soil(p, s, c, now->bare);
        account(p, s->w.space, c);
        s->loose[i] = s->dirty[i] || c->listed;
        s->any_loose = s->any_loose || s->loose[i];
        if (s->dirty[i] && is_part(s, c))
            patches += (uint64_t)__builtin_popcount(missing(c));
        else
            s->places += s->dirty[i];
    }
    s->places += (patches + CHUNK_PAGES / 2 - 1) / (CHUNK_PAGES / 2); /* a shared slot gets half full */
    return 0;
}

/* Before it is protected: from here on a chunk need only be looked at for what happens to it, or where
 * not all goes well, which lists it again. Not struck off is one that reaches into another window, and
 * one that has lost all its pages: at T0 its copy is dropped. */
static void strike_off(const snap_pump *p, const slice *s)
{
    for (size_t i = 0; i < s->chunks; i++) {
        chunk *c = s->loose[i] ? ledger_chunk(p, s->w.space, s->at + i * CHUNK) : NULL;
        if (c && s->seen[i].mask == UINT16_MAX && (c->want || !c->kept))
            c->listed = false;
    }
}

static int list_again(snap_pump *p, const slice *s, size_t i)
{
    chunk *c = ledger_chunk(p, s->w.space, s->at + i * CHUNK);
    return list_chunk(p, s->w.space, s->at + i * CHUNK, c);
}

static int protect_loose(const snap_pump *p, const slice *s)
{
    if (s->covers)
        return spare_protect(p, &s->w, s->start, s->end);
    /* And nothing between them: what is not looked at again must not be protected, for where pages lose
     * their protection without an event it may have been written since. */
    uint64_t shift = s->w.start - s->w.at;
    for (size_t i = 0; i < s->chunks;) {
        size_t j = i;
        while (j < s->chunks && s->loose[j])
            j++;
        uint64_t from = s->at + i * CHUNK + shift, to = s->at + j * CHUNK + shift;
        from = from > s->start ? from : s->start;
        to = to < s->end ? to : s->end;
        int r = j > i ? spare_protect(p, &s->w, from, to) : 0;
        if (r)
            return r;
        i = j + 1;
    }
    return 0;
}

static int list_loose(snap_pump *p, const slice *s)
{
    int r = 0;
    for (size_t i = 0; !r && i < s->chunks; i++)
        r = s->loose[i] ? list_again(p, s, i) : 0;
    return r;
}

static bool is_window(snap_pump *p, const snap_window *w)
{
    const window *now = ledger_find(p, w->start);
    return now && now->is.start == w->start && now->is.end == w->end && now->is.space == w->space;
}

/* For the copies; with little staging there need only be what there can be at most. */
static bool has_room(snap_pump *p, const slice *s)
{
    uint64_t most = most_places(p), places = s->places < most ? s->places : most;
    return !places || free_places(p) >= places;
}

/* Finds what is to be protected, and protects it: with no fault served in between, for who has written
 * to what was found protected would be forgotten. The kernel protects nothing while an event is unread.
 * After one was read its caller goes on, and until its next such call we may: a target that makes such
 * calls in a loop leaves only that moment. */
static int protect(snap_pump *p, slice *s, bool copies)
{
    for (int tries = 0;; tries++) {
        bool any;
        int r = find_spared(p, s);
        if (!r)
            r = find_dirty(p, s);
        if (r)
            return r;
        if (copies && !has_room(p, s))
            return -ENOBUFS;
        if (!s->any_loose)
            return 0;
        strike_off(p, s);
        r = protect_loose(p, s);
        if (r != -EAGAIN || tries == MOST_TRIES)
            return r;
        r = list_loose(p, s);
        if (!r)
            r = serve(p, &any);
        if (r)
            return r;
        if (!any)
            uffd_poll(p->uffd, 1);
        if (!is_window(p, &s->w))
            return -ENOENT;
    }
}

/* The same where writers wait for nobody: what is covered was protected when it was found written. */
static int protect_passing(snap_pump *p, slice *s, bool copies)
{
    uint64_t until;
    bool covered = is_covered(p, &s->w, s->start, &until);
    memset(s->spared, 0, sizeof s->spared);
    int r = covered ? 0 : written_part(p, &s->w, s->start, s->end, true);
    if (!r)
        r = find_dirty(p, s);
    if (!r && copies && !has_room(p, s))
        r = -ENOBUFS;
    if (!r)
        strike_off(p, s);
    return r;
}

/* Those that were protected but for some pages: for T0, as copies of these are worth nothing. */
static int note_spared(snap_pump *p, const slice *s)
{
    for (size_t i = 0; i < s->chunks; i++) {
        if (!s->spared[i] || !(s->covers || s->loose[i]))
            continue;
        uint64_t address = s->at + i * CHUNK;
        place *slot = ledger_make(p, s->w.space, address) ? VECTOR_PUSH(&p->spared_chunks) : NULL;
        if (!slot)
            return -ENOMEM;
        *slot = (place){address, s->w.space};
    }
    return 0;
}

/* Caller holds the lock. */
static void count_ahead(snap_pump *p, uint16_t pages)
{
    uint64_t bytes = (uint64_t)__builtin_popcount(pages) * PAGE;
    p->round.copied_chunks++;
    p->round.copied_bytes += bytes;
    p->counters.ahead_bytes += bytes;
}

static int copy_dirty(snap_pump *p, slice *s)
{
    int r = look(p, s, s->seen); /* as it is now that it is protected */
    for (size_t i = 0; !r && i < s->chunks; i++) {
        uint64_t address = s->at + i * CHUNK;
        chunk *c = s->dirty[i] ? ledger_chunk(p, s->w.space, address) : NULL;
        if (!c || s->seen[i].bare)
            continue;
        c->want = (uint16_t)((c->want & ~s->seen[i].mask) | s->seen[i].want);
        account(p, s->w.space, c);
        if (!c->want)
            continue;
        s->copied[i] = is_part(s, c) ? missing(c) : c->want;
        s->place[i] = take_place(p, s->copied[i] == c->want ? 0 : s->copied[i], false, false);
        if (s->place[i] == NO_PLACE)
            continue;
        r = copy_as_is(p, s->w.space, address, s->copied[i],
                       p->staging + (uint64_t)s->place[i] * CHUNK);
        if (r) {
            give_place(p, s->place[i]);
            s->place[i] = NO_PLACE;
            r = r == -EAGAIN ? 0 : r; /* unmapped meanwhile */
        }
        bool any;
        if (!r)
            r = serve(p, &any); /* a writer waits for one chunk at most */
    }
    return r;
}

/* Keeps the pages of which there is no good copy, for after T0. Who writes to one meanwhile is found by the
 * next look. */
static int hold_dirty(snap_pump *p, slice *s)
{
    int r = 0;
    for (size_t i = 0; !r && i < s->chunks; i++) {
        uint64_t address = s->at + i * CHUNK;
        chunk *c = s->dirty[i] ? ledger_chunk(p, s->w.space, address) : NULL;
        uint16_t pages = c ? lacking(c) & (uint16_t)~s->seen[i].bare : 0;
        bool any;
        if (!pages)
            continue;
        r = early_hold(p, s->w.space, address, c, pages);
        account(p, s->w.space, c);
        if (r == -EAGAIN) { /* unmapped meanwhile */
            r = list_again(p, s, i);
        } else if (!r) {
            pthread_mutex_lock(&p->lock);
            count_ahead(p, pages);
            pthread_mutex_unlock(&p->lock);
        }
        if (!r)
            r = serve(p, &any);
    }
    return r;
}

static bool is_disturbed(const snap_pump *p, uint64_t start, uint64_t end)
{
    for (size_t i = 0; i < p->disturbed.count; i++)
        if (p->disturbed.at[i].start < end && p->disturbed.at[i].end > start)
            return true;
    return false;
}

/* A copy is kept when its pages were protected before it and still are after it; those that are not are
 * missing again. */
static int keep_copies(snap_pump *p, slice *s)
{
    seen after[SLICE_CHUNKS];
    uint64_t shift = s->w.start - s->w.at;
    int r = look(p, s, after);
    for (size_t i = 0; i < s->chunks; i++) {
        uint64_t address = s->at + i * CHUNK;
        if (!s->dirty[i])
            continue;
        chunk *c = ledger_chunk(p, s->w.space, address);
        bool good = s->place[i] != NO_PLACE && !r && after[i].want == s->seen[i].want &&
                    (s->copied[i] & ~after[i].bare) &&
                    !is_disturbed(p, address + shift, address + shift + CHUNK);
        if (!good) {
            give_place(p, s->place[i]);
            int e = list_again(p, s, i);
            if (e)
                return e;
            continue;
        }
        const snap_saved saved = {.address = address, .place = s->place[i], .space = s->w.space,
                                  .pages = c->want,
                                  .patch = patch_of(c, s->copied[i])};
        pthread_mutex_lock(&p->lock);
        int e = enqueue(p, &saved);
        count_ahead(p, s->copied[i]);
        p->counters.sweep_chunks++;
        pthread_mutex_unlock(&p->lock);
        if (e)
            return e;
        c->state = SAVED;
        if (after[i].bare) {
            soil(p, s, c, after[i].bare);
            if ((e = list_again(p, s, i)))
                return e;
        }
        account(p, s->w.space, c);
    }
    return r;
}

/* Protected is enough: they are saved after T0, as they are then. */
static int keep_protected(snap_pump *p, slice *s)
{
    int r = look(p, s, s->seen);
    for (size_t i = 0; !r && i < s->chunks; i++) {
        chunk *c = s->dirty[i] ? ledger_chunk(p, s->w.space, s->at + i * CHUNK) : NULL;
        if (!c)
            continue;
        c->want = (uint16_t)((c->want & ~s->seen[i].mask) | s->seen[i].want);
        account(p, s->w.space, c);
        if (s->seen[i].bare)
            r = list_again(p, s, i);
    }
    return r;
}

static int process(snap_pump *p, slice *s, bool copies)
{
    int r = p->passes ? protect_passing(p, s, copies && !gains(p)) : protect(p, s, copies);
    if (r == -ENOENT || r == -EAGAIN) /* unmapped meanwhile; for the next round */
        return list_loose(p, s);
    if (r || !s->any_loose)
        return r;
    r = note_spared(p, s);
    if (!r && s->covers)
        r = cover(p, s->start, s->end);
    if (r)
        return r;
    if (!copies)
        return keep_protected(p, s);
    if (gains(p))
        return (r = hold_dirty(p, s)) == -ENOBUFS ? list_loose(p, s) : r;
    p->disturbed.count = 0;
    p->watching = true;
    r = copy_dirty(p, s);
    p->watching = false;
    int e = keep_copies(p, s);
    return r ? r : e;
}

int ahead_slice(snap_pump *p, bool copies)
{
    slice s;
    bool found;
    int r = next_slice(p, &s, copies, &found);
    if (r)
        return r;
    if (!found)
        return 1;
    r = process(p, &s, copies);
    if (r != -ENOBUFS)
        p->cursor = s.end;
    return r;
}
