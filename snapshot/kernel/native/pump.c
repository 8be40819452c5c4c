/* The life of a pump: set up, T0, the loop that serves faults before it sweeps, letting go. */
#define _GNU_SOURCE
#include "pagemap.h"
#include "pump_internal.h"
#include "uffd.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MESSAGES 32
#define LET_GO UINT64_C(0x1000000)          /* releasing more at once holds mmap_lock too long */
#define PATIENCE_NS UINT64_C(2000000000)    /* for the event that explains why a mark is gone */
#define MOST_TURNS 8                        /* of reading messages, between two looks at the rest */
#define GAP_NS UINT64_C(200000)
#define MOST_LOOKS 20                       /* for the thread that has posted an event */
#define SWEEP_POLL_CHUNKS 4                 /* faults are looked for every 256 KiB of the sweep */

/* ---- set up ---------------------------------------------------------------------------------- */

int snap_pump_new(int pid, int uffd, int uffdinfo, int pagemap, int mem, int spill, void *staging,
                  uint64_t slots, snap_pump **pump)
{
    snap_pump *p = calloc(1, sizeof *p);
    if (!p)
        return -ENOMEM;
    p->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    p->bounce = aligned_alloc(PAGE, CHUNK);
    p->free_slots = calloc(slots ? slots : 1, sizeof *p->free_slots);
    if (p->wake < 0 || !p->bounce || !p->free_slots) {
        int r = p->wake < 0 ? -errno : -ENOMEM;
        if (p->wake >= 0)
            close(p->wake);
        free(p->bounce);
        free(p->free_slots);
        free(p);
        return r;
    }
    p->pid = pid;
    p->uffd = uffd;
    p->uffdinfo = uffdinfo;
    p->pagemap = pagemap;
    p->mem = mem;
    p->spill = spill;
    p->staging = staging;
    p->slots = slots;
    for (uint64_t i = 0; i < slots; i++)
        p->free_slots[i] = (uint32_t)(slots - 1 - i); /* low slots first: they stay warm */
    p->free_count = slots;
    pthread_mutex_init(&p->lock, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&p->ready, &attr);
    pthread_condattr_destroy(&attr);
    *pump = p;
    return 0;
}

void snap_pump_free(snap_pump *p)
{
    if (!p)
        return;
    for (size_t i = 0; i < p->areas.count; i++) {
        free(p->areas.at[i].want);
        free(p->areas.at[i].state);
    }
    free(p->areas.at);
    free(p->windows.at);
    free(p->by_start);
    free(p->tentative.at);
    free(p->faults.at);
    free(p->releases.at);
    free(p->queue.at);
    free(p->free_slots);
    free(p->free_spill.at);
    free(p->bounce);
    close(p->wake);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->ready);
    free(p);
}

int snap_pump_add_area(snap_pump *p, uint32_t space, uint64_t start, uint64_t end)
{
    if (start % CHUNK || end % CHUNK || start >= end)
        return -EINVAL;
    area a = {.space = space, .start = start, .chunks = (end - start) / CHUNK};
    a.want = calloc(a.chunks, sizeof *a.want);
    a.state = calloc(a.chunks, sizeof *a.state);
    area *slot = a.want && a.state ? VECTOR_PUSH(&p->areas) : NULL;
    if (!slot) {
        free(a.want);
        free(a.state);
        return -ENOMEM;
    }
    *slot = a;
    return (int)p->areas.count - 1;
}

int snap_pump_add_window(snap_pump *p, int area_id, uint64_t start, uint64_t end, uint64_t at,
                         int armed, int object, uint64_t unit)
{
    if (area_id < 0 || (size_t)area_id >= p->areas.count || start >= end || (start | end | at) % PAGE)
        return -EINVAL;
    area *a = &p->areas.at[area_id];
    if (at < a->start || at + (end - start) > a->start + a->chunks * CHUNK || unit < PAGE ||
        unit & (unit - 1))
        return -EINVAL;
    window *w = VECTOR_PUSH(&p->windows);
    if (!w)
        return -ENOMEM;
    *w = (window){.start = start, .end = end, .at = at, .unit = unit, .area = (uint32_t)area_id,
                  .object = object, .armed = armed};
    if (!armed)
        a->has_unarmed = true;
    return 0;
}

int snap_pump_ready(snap_pump *p)
{
    return ledger_index(p);
}

/* ---- while the target is stopped --------------------------------------------------------------- */

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

/* ---- release ----------------------------------------------------------------------------------- */

static int release_later(snap_pump *p, uint64_t start, uint64_t end)
{
    range *r = VECTOR_PUSH(&p->releases);
    if (!r)
        return -ENOMEM;
    *r = (range){start, end};
    return 0;
}

/* Lets the target write [start, end) (run-time) again. */
static int release(snap_pump *p, uint64_t start, uint64_t end)
{
    int r = uffd_writeprotect(p->uffd, start, end - start, 0);
    if (r == -EAGAIN)
        return release_later(p, start, end);
    if (r == -ESRCH)
        return r;
    /* Any other answer is the fence of save.c: EAGAIN is looked for before the range is. */
    int e = save_publish(p);
    if (e || !r)
        return e;
    if (r == -ENOENT && end - start > PAGE) {
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
    uint64_t until = now_ns() + GAP_NS;
    int r;
    do {
        r = flush_releases(p);
    } while (!r && (p->releases.count || p->tentative.count) && now_ns() < until);
    return r;
}

/* Releases what is armed of the space addresses [from, to) of an area. */
static int release_space(snap_pump *p, const area *a, uint64_t from, uint64_t to)
{
    for (size_t k = ledger_first(p, a, from); k < a->first_window + a->windows; k++) {
        const window *w = &p->windows.at[k];
        uint64_t w_end = w->at + (w->end - w->start);
        if (w->at >= to)
            break;
        if (!w->armed || w_end <= from)
            continue;
        uint64_t low = w->at > from ? w->at : from, high = w_end < to ? w_end : to;
        int r = release(p, low - w->at + w->start, high - w->at + w->start);
        if (r)
            return r;
    }
    return 0;
}

/* ---- faults and events ------------------------------------------------------------------------- */

static int lost(snap_pump *p, uint64_t bytes, uint64_t address, uint32_t reason)
{
    pthread_mutex_lock(&p->lock);
    p->counters.lost_bytes += bytes;
    p->counters.lost_address = address;
    p->counters.lost_reason = reason;
    pthread_mutex_unlock(&p->lock);
    return -ENODATA;
}

/* Saves the unsaved chunks among the space addresses [from, to). */
static int save_space(snap_pump *p, uint32_t area_id, uint64_t from, uint64_t to)
{
    const area *a = &p->areas.at[area_id];
    uint64_t first = from > a->start ? (from - a->start) / CHUNK : 0;
    for (uint64_t i = first; i < a->chunks && a->start + i * CHUNK < to; i++) {
        if (!a->want[i] || a->state[i] != UNSAVED)
            continue;
        int r = save_chunk(p, area_id, i, true);
        if (r)
            return r;
    }
    return 0;
}

/* One fault: save its chunk, then let the write through. -EAGAIN: an event must be read first. */
static int serve_fault(snap_pump *p, uint64_t address)
{
    if (p->letting_go)
        return release(p, address, address + PAGE);
    const window *w = ledger_find(p, address);
    if (!w)
        return -EAGAIN; /* moved here by a mremap whose event is still to be read */
    uint64_t unit = w->unit > CHUNK ? w->unit : CHUNK;
    uint64_t from = (address - w->start + w->at) & ~(unit - 1);
    uint32_t id = w->area;
    int r = save_space(p, id, from, from + unit);
    return r ? r : release_space(p, &p->areas.at[id], from, from + unit);
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

/* Saves what is unsaved of the run-time range [start, end). */
static int save_range(snap_pump *p, uint64_t start, uint64_t end)
{
    for (size_t k = ledger_above(p, start); k < p->windows.count; k++) {
        const window *w = &p->windows.at[p->by_start[k]];
        if (w->start >= end)
            break;
        uint64_t low = w->start > start ? w->start : start, high = w->end < end ? w->end : end;
        int r = save_space(p, w->area, (low - w->start + w->at) & ~(CHUNK - 1),
                           high - w->start + w->at);
        if (r)
            return r;
    }
    return 0;
}

/* One look at what every thread is doing. *waiting: threads that sleep in a call which posts
 * events; *running: threads that cannot be asked because they do not sleep. */
static int save_ahead_of(snap_pump *p, int tasks, DIR *names, int *waiting, int *running)
{
    char line[256], file[300];
    *waiting = *running = 0;
    for (struct dirent *entry; (entry = readdir(names));) {
        if (entry->d_name[0] == '.')
            continue;
        snprintf(file, sizeof file, "%s/syscall", entry->d_name);
        int fd = openat(tasks, file, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            continue;
        ssize_t n = read(fd, line, sizeof line - 1);
        close(fd);
        if (n <= 0)
            continue;
        line[n] = 0;
        long nr;
        unsigned long long start, length;
        if (sscanf(line, "%ld 0x%llx 0x%llx", &nr, &start, &length) != 3) {
            ++*running;
            continue;
        }
        if (nr == SYS_munmap || nr == SYS_mremap || nr == SYS_brk || nr == SYS_mmap || nr == SYS_shmdt)
            ++*waiting;
        if (nr != SYS_madvise)
            continue;
        ++*waiting;
        int r = save_range(p, start, (start + length + PAGE - 1) & ~(PAGE - 1));
        if (r && r != -EAGAIN) /* not whole any more: reading the event will tell what was lost */
            return r;
    }
    return 0;
}

/* An event comes next and it has not been read, so its caller has not yet done what it announces.
 * If that is to discard memory (madvise), it is saved now: /proc/PID/task/TID/syscall shows the
 * call. The caller may have posted its event and not be asleep yet, so look again when nobody was
 * found, and once more while others run. */
static int save_before_event(snap_pump *p)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/task", p->pid);
    DIR *names = opendir(path);
    if (!names)
        return errno == ENOENT ? 0 : -errno;
    int r = 0;
    for (int look = 0; look < MOST_LOOKS && !r; look++) {
        int waiting, running;
        rewinddir(names);
        r = save_ahead_of(p, dirfd(names), names, &waiting, &running);
        if (waiting && (look || !running))
            break;
        sched_yield();
    }
    closedir(names);
    return r;
}

static int handle(snap_pump *p, const uffd_message *m)
{
    uint64_t where = 0, bytes;
    if (m->event == UFFD_EVENT_PAGEFAULT) {
        uint64_t *address = VECTOR_PUSH(&p->faults);
        if (!address)
            return -ENOMEM;
        *address = m->arg[1] & ~(PAGE - 1);
        pthread_mutex_lock(&p->lock);
        p->counters.faults++;
        pthread_mutex_unlock(&p->lock);
        return 0;
    }
    pthread_mutex_lock(&p->lock);
    p->counters.events++;
    pthread_mutex_unlock(&p->lock);
    switch (m->event) {
    case UFFD_EVENT_REMAP:
        save_forget(p, m->arg[0], m->arg[0] + m->arg[2]);
        save_forget(p, m->arg[1], m->arg[1] + m->arg[2]);
        return ledger_move(p, m->arg[0], m->arg[1], m->arg[2]);
    case UFFD_EVENT_REMOVE:
        bytes = p->letting_go ? 0 : ledger_unsaved(p, m->arg[0], m->arg[1], TENTATIVE, &where);
        return bytes ? lost(p, bytes, where, SNAP_LOST_REMOVE) : 0;
    case UFFD_EVENT_UNMAP:
        bytes = p->letting_go ? 0 : ledger_unsaved(p, m->arg[0], m->arg[1], TENTATIVE, &where);
        if (bytes)
            return lost(p, bytes, where, SNAP_LOST_UNMAP);
        return ledger_unmap(p, m->arg[0], m->arg[1]);
    default:
        return -EPROTO;
    }
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

/* Reads and answers messages that wait. *any: whether there was one. */
static int serve(snap_pump *p, bool *any)
{
    uffd_message messages[MESSAGES];
    *any = false;
    /* Bounded: a target that discards memory in a loop must not keep us from the rest. */
    for (int turn = 0; turn < MOST_TURNS; turn++) {
        int r = uffd_poll(p->uffd, 0);
        if (r <= 0)
            break;
        int n = pending_faults(p);
        if (n < 0)
            return n;
        if (n == 0) {
            if (p->unsaved_chunks && !p->letting_go && (r = save_before_event(p)))
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
    return r ? r : flush_releases(p);
}

/* ---- the sweep --------------------------------------------------------------------------------- */

/* Moves the cursor to the next unsaved chunk, round and round. False when there is none. */
static bool next_unsaved(snap_pump *p)
{
    for (size_t tried = 0; tried <= p->areas.count; tried++) {
        const area *a = &p->areas.at[p->sweep_area];
        for (; p->sweep_chunk < a->chunks; p->sweep_chunk++)
            if (a->want[p->sweep_chunk] && a->state[p->sweep_chunk] == UNSAVED)
                return true;
        p->sweep_chunk = 0;
        p->sweep_area = (p->sweep_area + 1) % (uint32_t)p->areas.count;
    }
    return false;
}

/* Releases chunks [first, last) but for those that an event made unsaved again meanwhile. */
static int release_saved(snap_pump *p, uint32_t id, uint64_t first, uint64_t last)
{
    const area *a = &p->areas.at[id];
    for (uint64_t i = first; i < last;) {
        uint64_t j = i;
        while (j < last && (!a->want[j] || a->state[j] != UNSAVED))
            j++;
        int r = j > i ? release_space(p, a, a->start + i * CHUNK, a->start + j * CHUNK) : 0;
        if (r)
            return r;
        i = j + 1;
    }
    return 0;
}

/* Saves on to the end of the cursor's 2 MiB and releases what it saved there in one go. */
static int sweep(snap_pump *p)
{
    if (!p->unsaved_chunks || !next_unsaved(p))
        return 0;
    uint32_t id = p->sweep_area;
    uint64_t first = p->sweep_chunk, i = first;
    uint64_t start = p->areas.at[id].start;
    uint64_t limit = ((start + first * CHUNK) / STEP + 1) * STEP;
    int r = 0;
    for (; i < p->areas.at[id].chunks && start + i * CHUNK < limit; i++) {
        const area *a = &p->areas.at[id];
        if (a->want[i] && a->state[i] == UNSAVED && (r = save_chunk(p, id, i, false)))
            break;
        if ((i - first) % SWEEP_POLL_CHUNKS == SWEEP_POLL_CHUNKS - 1) {
            bool any;
            if ((r = serve(p, &any)))
                return r;
        }
    }
    p->sweep_chunk = i;
    int e = release_saved(p, id, first, i);
    return e ? e : r;
}

/* ---- the end ----------------------------------------------------------------------------------- */

/* After a failure: releases everything in small steps, answering whoever still faults, so that the
 * close of the uffd finds little to do (closing an armed one holds the target's mmap lock for 40 to
 * 200 ms at 4 GiB). Nothing is unregistered here: that would split a mapping for a moment, and a
 * mremap of the target that spans the split would fail. */
static int let_go(snap_pump *p)
{
    p->letting_go = true;
    for (uint64_t cursor = 0;;) {
        bool any;
        int r = serve(p, &any);
        if (r)
            return r;
        size_t k = ledger_above(p, cursor);
        while (k < p->windows.count && !p->windows.at[p->by_start[k]].armed)
            k++;
        if (k == p->windows.count)
            return 0;
        const window *w = &p->windows.at[p->by_start[k]];
        uint64_t start = w->start > cursor ? w->start : cursor;
        uint64_t end = w->end - start > LET_GO ? start + LET_GO : w->end;
        r = uffd_writeprotect(p->uffd, start, end - start, 0);
        if (r == -ESRCH)
            return r;
        cursor = end; /* what could not be released here, the close releases */
    }
}

/* Faults and releases that still wait are answered by letting go. */
static bool finished(const snap_pump *p)
{
    return !p->unsaved_chunks && !p->tentative.count;
}

/* Waits for a message, and when `slots` also for a free staging slot. */
static void idle(snap_pump *p, bool slots, int timeout_ms)
{
    struct pollfd fds[2] = {{.fd = p->uffd, .events = POLLIN}, {.fd = p->wake, .events = POLLIN}};
    if (poll(fds, slots ? 2 : 1, timeout_ms) > 0 && slots && fds[1].revents) {
        uint64_t count;
        (void)!read(p->wake, &count, sizeof count);
    }
}

static int loop(snap_pump *p)
{
    while (!finished(p)) {
        bool any;
        if (atomic_load(&p->stop))
            return -ECANCELED;
        int r = serve(p, &any);
        if (!r)
            r = sweep(p);
        if (r == -ENOBUFS) {
            p->stuck_since_ns = 0;
            idle(p, true, p->tentative.count ? 1 : 100);
            continue;
        }
        if (r && r != -EAGAIN)
            return r;
        /* Held up: an event has been announced (EAGAIN) but is not yet there to be read. */
        bool held_up = r == -EAGAIN || (!p->unsaved_chunks && !finished(p));
        if (!held_up || any) {
            p->stuck_since_ns = 0;
            continue;
        }
        if (!p->stuck_since_ns)
            p->stuck_since_ns = now_ns();
        else if (now_ns() - p->stuck_since_ns > PATIENCE_NS)
            return lost(p, p->unsaved_chunks * CHUNK,
                        p->areas.at[p->sweep_area].start + p->sweep_chunk * CHUNK, SNAP_LOST_UNARMED);
        idle(p, false, 1);
    }
    return 0;
}

int snap_pump_run(snap_pump *p)
{
    pthread_mutex_lock(&p->lock);
    p->counters.running = 1;
    pthread_mutex_unlock(&p->lock);
    int r = loop(p);
    if (r == -ESRCH)
        r = lost(p, p->unsaved_chunks * CHUNK, 0, SNAP_LOST_GONE);
    if (r && p->counters.lost_reason != SNAP_LOST_GONE)
        (void)let_go(p); /* a courtesy: the close of the uffd does all of it */
    snap_pump_end(p);
    return r;
}

void snap_pump_stop(snap_pump *p)
{
    atomic_store(&p->stop, 1);
    uint64_t one = 1;
    (void)!write(p->wake, &one, sizeof one);
}

/* ---- the consumers' side ----------------------------------------------------------------------- */

int snap_pump_next(snap_pump *p, snap_saved *out, int most, int timeout_ms)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += (timeout_ms % 1000) * 1000000L;
    if (until.tv_nsec >= 1000000000L) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000L;
    }
    int n = 0, waited = 0;
    pthread_mutex_lock(&p->lock);
    while (p->queue_head == p->queue.count && !p->ended && waited != ETIMEDOUT)
        waited = pthread_cond_timedwait(&p->ready, &p->lock, &until);
    while (n < most && p->queue_head < p->queue.count)
        out[n++] = p->queue.at[p->queue_head++];
    if (p->queue_head == p->queue.count)
        p->queue_head = p->queue.count = 0;
    if (!n && p->ended)
        n = -EPIPE;
    pthread_mutex_unlock(&p->lock);
    return n;
}

int snap_pump_done(snap_pump *p, const snap_saved *saved, int count)
{
    int r = 0;
    pthread_mutex_lock(&p->lock);
    for (int i = 0; i < count; i++) {
        if (saved[i].place >= 0) {
            p->free_slots[p->free_count++] = (uint32_t)saved[i].place;
            continue;
        }
        uint32_t *slot = VECTOR_PUSH(&p->free_spill);
        if (slot)
            *slot = (uint32_t)(-saved[i].place - 1);
        else
            r = -ENOMEM; /* the slot is only not used again */
    }
    pthread_mutex_unlock(&p->lock);
    uint64_t one = 1;
    (void)!write(p->wake, &one, sizeof one);
    return r;
}

void snap_pump_end(snap_pump *p)
{
    pthread_mutex_lock(&p->lock);
    p->ended = true;
    p->counters.running = 0;
    pthread_cond_broadcast(&p->ready);
    pthread_mutex_unlock(&p->lock);
}

void snap_pump_stats(snap_pump *p, snap_pump_counters *out)
{
    pthread_mutex_lock(&p->lock);
    *out = p->counters;
    pthread_mutex_unlock(&p->lock);
}
