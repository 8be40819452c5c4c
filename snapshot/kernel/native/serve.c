/* Answering the target: releases, faults, and events of its address space. */
#define _GNU_SOURCE
#include "pump_internal.h"
#include "uffd.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MESSAGES 32
#define MOST_TURNS 8            /* of reading messages, between two looks at the rest */
#define GAP_NS UINT64_C(200000) /* see flush_in_the_gap */
#define SPIN_NS UINT64_C(20000)
#define SINGLE_NS UINT64_C(100000) /* see lets_one_page: 10,000 a second */
#define SINGLES 500                /* … of which so many may come at once */

static int release_later(snap_pump *p, uint64_t start, uint64_t end)
{
    range *r = VECTOR_PUSH(&p->releases);
    if (!r)
        return -ENOMEM;
    *r = (range){start, end};
    return 0;
}

/* Lets the target write [start, end) (run-time) again. Ahead of T0 its chunks are listed each time, also when
 * it was put off: a round may have protected them meanwhile, and struck them off. */
static int release(snap_pump *p, uint64_t start, uint64_t end)
{
    int r = p->after_t0 ? 0 : list_range(p, start, end);
    if (r)
        return r;
    r = uffd_writeprotect(p->uffd, start, end - start, 0);
    bool huge = r == -EINVAL && end - start == PAGE;
    if (huge) {
        /* A page of hugetlbfs that no window tells of, moved by a mremap: only all of it. */
        start &= ~(STEP - 1);
        end = start + STEP;
        r = uffd_writeprotect(p->uffd, start, end - start, 0);
    }
    if (r == -EAGAIN)
        return release_later(p, start, end);
    if (r == -ESRCH)
        return r;
    /* Any other answer is the fence of save.c: EAGAIN is looked for before the range is. */
    int e = save_publish(p);
    if (e || !r)
        return e;
    if (r == -ENOENT && end - start > PAGE && !huge) {
        /* Something else was mapped into the range: release what is still ours, page by page. */
        for (uint64_t page = start; page < end && !e; page += PAGE)
            e = release(p, page, page + PAGE);
        return e;
    }
    /* Not registered any more: nothing to release, but somebody may still wait there. */
    uffd_wake(p->uffd, start, end - start);
    return 0;
}

/* Publishes what is tentative if no event is unread: a release of no memory is a fence too. */
static int fence(snap_pump *p)
{
    if (!p->tentative.count)
        return 0;
    int r = uffd_writeprotect(p->uffd, PAGE, PAGE, 0);
    return r == -EAGAIN ? 0 : r == -ESRCH ? r : save_publish(p);
}

static int flush_releases(snap_pump *p)
{
    size_t n = p->releases.count;
    for (size_t i = 0; i < n; i++) {
        range r = p->releases.at[0];
        memmove(p->releases.at, p->releases.at + 1, --p->releases.count * sizeof r);
        int e = release(p, r.start, r.end); /* puts it back at the end while EAGAIN */
        if (e)
            return e;
    }
    return fence(p);
}

/* After an event was read its caller goes on, and until its next such call releases succeed. One
 * that makes such calls in a loop would starve every writer if this moment were missed. */
static int flush_in_the_gap(snap_pump *p)
{
    uint64_t since = now_ns(), until = since + GAP_NS;
    for (;;) {
        int r = flush_releases(p);
        uint64_t now = now_ns();
        if (r || (!p->releases.count && !p->tentative.count) || now >= until)
            return r;
        if (now > since + SPIN_NS) { /* or it is on this processor, and cannot go on */
            breathe();
            since = now_ns();
        }
    }
}

/* The same of [start, end) in w, of hugetlbfs: whole pages, but for those of which a part is unsaved. */
static int release_huge(snap_pump *p, const snap_window *w, uint64_t start, uint64_t end)
{
    whole_pages(w, &start, &end);
    for (uint64_t page = start; page < end; page += w->huge) {
        uint64_t where;
        bool saved = !p->after_t0 || !ledger_unsaved(p, page, page + w->huge, TENTATIVE, &where);
        int r = saved ? release(p, page, page + w->huge) : 0;
        if (r)
            return r;
    }
    return 0;
}

int release_space(snap_pump *p, uint32_t space, uint64_t from, uint64_t to)
{
    for (size_t k = ledger_first(p, space, from); k < p->windows.count; k++) {
        const snap_window *w = &p->windows.at[k].is;
        uint64_t w_end = w->at + (w->end - w->start);
        if (w->space != space || w->at >= to)
            break;
        if ((!w->armed && !p->windows.at[k].registered) || w_end <= from)
            continue;
        uint64_t low = w->at > from ? w->at : from, high = w_end < to ? w_end : to;
        low = low - w->at + w->start;
        high = high - w->at + w->start;
        int r = w->huge ? release_huge(p, w, low, high) : release(p, low, high);
        if (r)
            return r;
    }
    return 0;
}

int lost(snap_pump *p, uint64_t bytes, uint64_t address, uint32_t reason)
{
    pthread_mutex_lock(&p->lock);
    p->counters.lost_bytes += bytes;
    p->counters.lost_address = address;
    p->counters.lost_reason = reason;
    pthread_mutex_unlock(&p->lock);
    return -ENODATA;
}

int save_space(snap_pump *p, uint32_t space, uint64_t from, uint64_t to)
{
    int later = 0;
    for (uint64_t at = from & ~(CHUNK - 1); at < to; at += CHUNK) {
        const chunk *c = ledger_chunk(p, space, at);
        if (!c) {
            at = (at & ~(BLOCK - 1)) + BLOCK - CHUNK;
            continue;
        }
        int r = is_unsaved(c) ? save_chunk(p, space, at, true) : 0;
        if (r && r != -EAGAIN)
            return r;
        later = r ? r : later;
    }
    return later;
}

/* Ahead of T0: whether only the page of a fault is let through, so that no more of its chunk counts as
 * written. Beyond what an answering machine writes to, whoever writes more is let through a chunk at a
 * time, or would do nothing but wait. */
static bool lets_one_page(snap_pump *p)
{
    uint64_t now = now_ns();
    if (p->singles_ns + SINGLES * SINGLE_NS < now)
        p->singles_ns = now - SINGLES * SINGLE_NS;
    if (p->singles_ns + SINGLE_NS > now)
        return false;
    p->singles_ns += SINGLE_NS;
    return true;
}

static int serve_fault_ahead(snap_pump *p, const snap_window *w, uint64_t at)
{
    uint64_t unit = w->huge ? w->huge : CHUNK, from = at & ~(unit - 1);
    if (!w->huge && lets_one_page(p)) {
        from = at;
        unit = PAGE;
    }
    p->next_pages += unit / PAGE;
    return release_space(p, w->space, from, from + unit);
}

int open_page(snap_pump *p, uint64_t address)
{
    const window *w = ledger_find(p, address);
    if (!w || !w->registered || w->is.huge)
        return 0;
    uint64_t at = (address - w->is.start + w->is.at) & ~(PAGE - 1);
    p->next_pages++;
    return release_space(p, w->is.space, at, at + PAGE);
}

/* Nothing of the chunk is to be saved any more, once what is tentative is published: by a release. */
static bool is_done(const snap_pump *p, uint32_t space, uint64_t at)
{
    const chunk *c = ledger_chunk(p, space, at);
    return c && !is_unsaved(c);
}

/* After T0: grows [*from, *to) by what is saved around it, within the 2 MiB of a huge page. */
static void widen(const snap_pump *p, uint32_t space, uint64_t *from, uint64_t *to)
{
    uint64_t low = *from & ~(STEP - 1), high = low + STEP;
    while (*from > low && is_done(p, space, *from - CHUNK))
        *from -= CHUNK;
    while (*to < high && is_done(p, space, *to))
        *to += CHUNK;
}

/* One fault: save its chunk, then let the write through. -EAGAIN: an event must be read first.
 * Ahead of T0 nothing is saved for it: the next round will find it written. */
static int serve_fault(snap_pump *p, uint64_t address)
{
    if (p->letting_go)
        return release(p, address, address + PAGE);
    const window *w = ledger_find(p, address);
    if (!w) /* after T0: moved here by a mremap whose event is still to be read */
        return p->after_t0 ? -EAGAIN : release(p, address, address + PAGE);
    uint32_t space = w->is.space;
    uint64_t unit = w->is.huge ? w->is.huge : CHUNK, at = address - w->is.start + w->is.at;
    if (!p->after_t0)
        return serve_fault_ahead(p, &w->is, at);
    if (may_be_early(&w->is, ledger_chunk(p, space, at)) && lets_one_page(p)) {
        int r = save_early(p, space, at);
        if (r != -ENOBUFS)
            return r ? r : release_space(p, space, at, at + PAGE);
    }
    uint64_t from = at & ~(unit - 1), to = from + unit;
    int r = save_space(p, space, from, to);
    if (!r && unit == CHUNK && space < OBJECT_SPACE)
        widen(p, space, &from, &to);
    return r ? r : release_space(p, space, from, to);
}

static int serve_faults(snap_pump *p)
{
    size_t kept = 0;
    int failed = 0;
    for (size_t i = 0; i < p->faults.count; i++) {
        int r = failed ? -EAGAIN : serve_fault(p, p->faults.at[i]);
        if (r)
            p->faults.at[kept++] = p->faults.at[i];
        if (r && r != -EAGAIN)
            failed = r;
    }
    p->faults.count = kept;
    return failed;
}

static int fault(snap_pump *p, uint64_t where)
{
    uint64_t *address = VECTOR_PUSH(&p->faults);
    if (!address)
        return -ENOMEM;
    *address = where & ~(PAGE - 1);
    pthread_mutex_lock(&p->lock);
    p->counters.faults++;
    p->counters.ahead_faults += !p->after_t0;
    pthread_mutex_unlock(&p->lock);
    return 0;
}

/* Ahead of T0: what is kept of [start, end) is worth nothing. Whether memory is still there decides
 * the next plan. */
static int disturb(snap_pump *p, uint64_t start, uint64_t end, bool gone)
{
    int r = ledger_distrust(p, start, end);
    if (!r)
        r = uncover(p, start, end, !gone);
    if (r)
        return r;
    range *slot = p->watching ? VECTOR_PUSH(&p->disturbed) : NULL;
    if (slot)
        *slot = (range){start, end};
    else if (p->watching)
        return -ENOMEM;
    if (!gone)
        return 0;
    p->counters.stale = 1;
    return ledger_unmap(p, start, end);
}

static int event_ahead(snap_pump *p, const uffd_message *m)
{
    if (m->event == UFFD_EVENT_REMOVE) {
        p->huge_removed = p->huge_removed || ledger_huge(p, m->arg[0], m->arg[1]);
        return disturb(p, m->arg[0], m->arg[1], false);
    }
    if (m->event == UFFD_EVENT_UNMAP) {
        p->aliased = p->aliased || had_grown(p, m->arg[0], m->arg[1]);
        return disturb(p, m->arg[0], m->arg[1], true);
    }
    if (m->event != UFFD_EVENT_REMAP)
        return -EPROTO;
    p->aliased = p->aliased || makes_alias(p, m->arg[0], m->arg[2]) ||
                 had_grown(p, m->arg[0], m->arg[0] + m->arg[2]);
    int r = disturb(p, m->arg[0], m->arg[0] + m->arg[2], true);
    return r ? r : disturb(p, m->arg[1], m->arg[1] + m->arg[2], true);
}

static int event(snap_pump *p, const uffd_message *m)
{
    uint64_t where = 0, bytes, from = m->arg[0], to = m->arg[1];
    bool unmap = m->event == UFFD_EVENT_UNMAP, remap = m->event == UFFD_EVENT_REMAP;
    uint64_t end = remap ? from + m->arg[2] : to;
    if (p->counters.objects_left && !p->letting_go && (unmap || remap) && had_grown(p, from, end))
        return lost(p, ledger_unsaved_objects(p, &where), from, SNAP_LOST_GROWN);
    if (faults_unsure(p, from, end))
        return lost(p, end - from, from, unmap || remap ? SNAP_LOST_UNMAP : SNAP_LOST_REMOVE);
    if (remap) {
        int r = save_forget(p, from, end);
        int e = save_forget(p, to, to + m->arg[2]);
        r = r ? r : e;
        if (!r && makes_alias(p, from, m->arg[2])) {
            bytes = p->letting_go ? 0 : ledger_unsaved_objects(p, &where);
            if (bytes)
                return lost(p, bytes, where, SNAP_LOST_SHARED);
            save_last_objects(p);
            range *alias = VECTOR_PUSH(&p->aliases);
            if (!alias)
                return -ENOMEM;
            *alias = m->arg[2] ? (range){from, from + m->arg[2]} : (range){to, to};
        }
        return r && !p->letting_go ? r : ledger_move(p, from, to, m->arg[2]);
    }
    if (!unmap && m->event != UFFD_EVENT_REMOVE)
        return -EPROTO;
    bytes = p->letting_go ? 0 : ledger_unsaved(p, from, to, TENTATIVE, &where);
    if (bytes)
        return lost(p, bytes, where, unmap ? SNAP_LOST_UNMAP : SNAP_LOST_REMOVE);
    save_last(p, from, to);
    return unmap ? ledger_unmap(p, from, to) : 0;
}

static int handle(snap_pump *p, const uffd_message *m)
{
    if (m->event == UFFD_EVENT_PAGEFAULT)
        return fault(p, m->arg[1]);
    pthread_mutex_lock(&p->lock);
    p->counters.events++;
    p->counters.changes += m->event == UFFD_EVENT_UNMAP || m->event == UFFD_EVENT_REMAP;
    pthread_mutex_unlock(&p->lock);
    p->surveyed = false;
    p->event_ns = now_ns();
    int r = m->event == UFFD_EVENT_FORK         ? child_born(p, (int)m->arg[0])
            : p->after_t0 || p->letting_go ? event(p, m)
                                           : event_ahead(p, m);
    p->plain_moves.count = 0;
    return r;
}

/* Fault messages waiting, from "pending:" of /proc/self/fdinfo (fs/userfaultfd.c): read(2) hands
 * out faults before events, so with none pending the next message is an event. */
static int pending_faults(const snap_pump *p)
{
    char text[512];
    ssize_t n = pread(p->uffdinfo, text, sizeof text - 1, 0);
    if (n < 0)
        return -errno;
    text[n] = 0;
    const char *at = strstr(text, "pending:");
    return at ? atoi(at + 8) : -EPROTO;
}

int serve(snap_pump *p, bool *any)
{
    uffd_message messages[MESSAGES];
    *any = false;
    beat(p);
    /* Bounded: a target that discards memory in a loop must not keep us from the rest. */
    for (int turn = 0; turn < MOST_TURNS; turn++) {
        int r = uffd_poll(p->uffd, 0);
        if (r <= 0)
            break;
        int n = pending_faults(p);
        if (n < 0)
            return n;
        if (n == 0) {
            bool any_left = p->unsaved_chunks || p->tentative.count;
            if (p->after_t0 && any_left && !p->letting_go && (r = save_before_event(p)))
                return r;
            n = 1;
        }
        n = uffd_read_msgs(p->uffd, messages, n < MESSAGES ? n : MESSAGES);
        if (n < 0)
            return n;
        bool event = false;
        for (int i = 0; i < n; i++) {
            *any = true;
            event = event || messages[i].event != UFFD_EVENT_PAGEFAULT;
            if ((r = handle(p, &messages[i])))
                return r;
        }
        if ((r = serve_faults(p)) || (r = event ? flush_in_the_gap(p) : flush_releases(p)))
            return r;
    }
    int r = serve_faults(p);
    if (!r)
        r = flush_releases(p);
    children_go(p, false);
    return r;
}
