/* Copying a chunk so that it is the chunk of T0, and no other.
 *
 * The address space may change under the copy. Two checks make it exact:
 *  1. After the copy every wanted page still carries its uffd-wp mark. Only arming at T0 sets the
 *     mark, so a page that has it now has not been written, discarded or replaced since T0.
 *  2. A marked page could have been moved (mremap) to where another was, with the event still
 *     unread. While any event is unread UFFDIO_WRITEPROTECT fails with EAGAIN (mm/userfaultfd.c,
 *     mmap_changing), so a release that succeeds *after* the copy is a fence: every change that
 *     had begun before it has been read, and undone in the ledger by save_forget. Until then a
 *     copy is tentative.
 */
#define _GNU_SOURCE
#include "pagemap.h"
#include "pump_internal.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* Pages of a patch. The store has to put it together with the copy before, which costs more than a whole
 * one, but it takes less of staging, and of the time of who waits. */
#define MOST_PATCHED 8
#define BREATH_NS 20000

uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

void breathe(void)
{
    nanosleep(&(struct timespec){.tv_nsec = BREATH_NS}, NULL);
}

void count_unsaved(snap_pump *p, uint32_t space, int more)
{
    p->unsaved_chunks += (uint64_t)(int64_t)more;
    p->unsaved_objects += space >= OBJECT_SPACE ? (uint64_t)(int64_t)more : 0;
}

void beat(snap_pump *p)
{
    if (p->watchdog)
        snap_watchdog_beat(p->watchdog);
}

bool wait_for_place(snap_pump *p)
{
    struct pollfd wake = {.fd = p->wake, .events = POLLIN};
    beat(p);
    if (poll(&wake, 1, 100) > 0) {
        uint64_t count;
        (void)!read(p->wake, &count, sizeof count);
    }
    return !atomic_load(&p->stop);
}

/* A place whatever it takes: waits for the consumers when staging and spill are full. */
static int urgent_place(snap_pump *p, uint16_t pages, bool no_spill, int64_t *place)
{
    uint64_t since = 0;
    while ((*place = take_place(p, pages, true, no_spill)) == NO_PLACE) {
        if (!since) {
            since = now_ns();
            pthread_mutex_lock(&p->lock);
            p->counters.stalls++;
            pthread_cond_broadcast(&p->ready); /* in the pause they have not been woken */
            pthread_mutex_unlock(&p->lock);
        }
        if (now_ns() - since > p->stall_ns)
            return lost(p, 0, 0, SNAP_LOST_STALLED);
        if (!wait_for_place(p))
            return -ECANCELED;
    }
    return 0;
}

/* Reads what process_vm_readv may not (PROT_NONE, a target that became undumpable) through
 * /proc/PID/mem, which was opened before T0 and stays with the old address space after exec. */
static int read_by_mem(const snap_pump *p, const struct iovec *local, const struct iovec *remote, int n)
{
    for (int i = 0; i < n; i++) {
        size_t done = 0;
        while (done < remote[i].iov_len) {
            ssize_t got = pread(p->mem, (char *)local[i].iov_base + done, remote[i].iov_len - done,
                                (off_t)((uintptr_t)remote[i].iov_base + done));
            if (got == 0)
                return -ESRCH;
            if (got < 0)
                return errno == EIO || errno == EFAULT ? -EAGAIN : -errno;
            done += (size_t)got;
        }
    }
    return 0;
}

static int read_runs(const snap_pump *p, const struct iovec *local, const struct iovec *remote, int n)
{
    if (!n)
        return 0;
    size_t total = 0;
    for (int i = 0; i < n; i++)
        total += remote[i].iov_len;
    ssize_t got = process_vm_readv(p->pid, local, (unsigned long)n, remote, (unsigned long)n, 0);
    if (got == (ssize_t)total)
        return 0;
    return read_by_mem(p, local, remote, n);
}

/* A shared object is read through its own descriptor: a hole read through the process would be
 * filled with a page that was not there. */
static int read_object(int object, uint64_t offset, uint8_t *out)
{
    size_t done = 0;
    while (done < CHUNK) {
        ssize_t got = pread(object, out + done, CHUNK - done, (off_t)(offset + done));
        if (got < 0)
            return -errno;
        if (got == 0)
            break;
        done += (size_t)got;
    }
    memset(out + done, 0, CHUNK - done);
    return 0;
}

/* Copies the pages `want` of the chunk at a space address to where they are in the chunk at `out`. With
 * `check` the marks are looked at afterwards (see above). [*low, *high) becomes where it was read
 * from. */
static int copy_chunk(snap_pump *p, uint32_t space, uint64_t base, uint16_t want, uint8_t *out,
                      bool check, uint64_t *low, uint64_t *high)
{
    struct iovec local[CHUNK_PAGES], remote[CHUNK_PAGES];
    struct {
        uint64_t start;
        uint16_t want; /* bit 0 is the page at start */
        unsigned pages;
    } parts[CHUNK_PAGES];
    int runs = 0, part_count = 0, object = -1;
    uint16_t covered = 0;
    *low = UINT64_MAX;
    *high = 0;

    for (size_t k = ledger_first(p, space, base); k < p->windows.count; k++) {
        const snap_window *w = &p->windows.at[k].is;
        uint64_t w_end = w->at + (w->end - w->start);
        if (w->space != space || w->at >= base + CHUNK)
            break;
        if (w_end <= base)
            continue;
        uint64_t from = w->at > base ? w->at : base, to = w_end < base + CHUNK ? w_end : base + CHUNK;
        unsigned first = (unsigned)((from - base) / PAGE), pages = (unsigned)((to - from) / PAGE);
        uint16_t inside = (uint16_t)(((1u << pages) - 1) << first);
        uint64_t start = from - w->at + w->start;
        covered |= inside;
        if (w->object >= 0)
            object = w->object;
        if (!(want & inside))
            continue;
        if (start < *low)
            *low = start;
        if (start + (to - from) > *high)
            *high = start + (to - from);
        if (w->armed && part_count < CHUNK_PAGES) {
            parts[part_count].start = start;
            parts[part_count].pages = pages;
            parts[part_count++].want = (uint16_t)((want & inside) >> first);
        }
        if (w->object >= 0)
            continue;
        for (unsigned i = first; i < first + pages;) {
            if (!(want >> i & 1)) {
                i++;
                continue;
            }
            unsigned j = i;
            while (j < first + pages && want >> j & 1)
                j++;
            local[runs] = (struct iovec){out + i * PAGE, (j - i) * PAGE};
            remote[runs++] = (struct iovec){(void *)(uintptr_t)(start + (i - first) * PAGE), (j - i) * PAGE};
            i = j;
        }
    }
    if (want & ~covered)
        return -EAGAIN;
    int r = object >= 0 ? read_object(object, base, out) : read_runs(p, local, remote, runs);
    if (r)
        return r;
    for (int i = 0; check && i < part_count; i++) {
        uint64_t armed;
        r = snap_pagemap_armed(p->pagemap, parts[i].start, parts[i].pages, &armed);
        if (r)
            return r;
        if (parts[i].want & ~armed)
            return -EAGAIN;
    }
    return 0;
}

int copy_pages(snap_pump *p, uint32_t space, uint64_t address, uint16_t pages, uint8_t *out, uint64_t *low,
               uint64_t *high)
{
    return copy_chunk(p, space, address, pages, out, true, low, high);
}

bool is_patched(const chunk *c)
{
    unsigned pages = (unsigned)__builtin_popcount(missing(c));
    return c->kept && pages && pages <= MOST_PATCHED;
}

uint16_t pages_to_save(uint32_t space, const chunk *c)
{
    return space < OBJECT_SPACE && is_patched(c) ? missing(c) : c->want;
}

int find_pages(const snap_pump *p, uint32_t space, uint64_t address, uint16_t pages, uint64_t *at)
{
    for (size_t k = ledger_first(p, space, address); pages && k < p->windows.count; k++) {
        const snap_window *w = &p->windows.at[k].is;
        if (w->space != space || w->at >= address + CHUNK)
            break;
        for (unsigned i = 0; i < CHUNK_PAGES; i++) {
            uint64_t where = address + i * PAGE;
            if (!(pages >> i & 1) || where < w->at || where - w->at >= w->end - w->start)
                continue;
            at[i] = where - w->at + w->start;
            pages &= w->object < 0 ? (uint16_t)~(1u << i) : UINT16_MAX;
        }
    }
    return pages ? -EAGAIN : 0;
}

int copy_as_is(snap_pump *p, uint32_t space, uint64_t address, uint16_t pages, uint8_t *out)
{
    uint64_t low, high;
    return copy_chunk(p, space, address, pages, out, false, &low, &high);
}

/* Copies the pages `want` into a place of its own, which *t describes. */
static int copy_to_place(snap_pump *p, uint32_t space, uint64_t address, uint16_t want, bool urgent,
                         bool check, tentative *t)
{
    const chunk *c = ledger_chunk(p, space, address);
    bool patch = want != c->want, no_spill = false;
    uint16_t shared = patch && space < OBJECT_SPACE ? want : 0; /* of an object all pages are read */
    for (;;) {
        int64_t place = NO_PLACE;
        int r = 0;
        if (urgent)
            r = urgent_place(p, shared, no_spill, &place);
        else if ((place = take_place(p, shared, false, false)) == NO_PLACE)
            r = -ENOBUFS;
        if (r)
            return r;
        uint8_t *out = place >= 0 ? p->staging + (uint64_t)place * CHUNK : p->bounce;
        r = copy_chunk(p, space, address, want & (uint16_t)~c->early, out, check, &t->low, &t->high);
        if (!r)
            r = early_put(p, c, want, out);
        if (!r && place < 0 &&
            pwrite(p->spill, out, CHUNK, (off_t)((uint64_t)(-place - 1) * CHUNK)) != (ssize_t)CHUNK) {
            give_place(p, place);
            no_spill = true; /* the disk is full: now writers have to wait for a slot */
            continue;
        }
        if (r) {
            give_place(p, place);
            return r;
        }
        t->only = false;
        t->early = 0;
        t->saved = (snap_saved){.address = address, .place = place, .space = space, .pages = want};
        return 0;
    }
}

int save_chunk(snap_pump *p, uint32_t space, uint64_t address, bool urgent)
{
    tentative *t = VECTOR_PUSH(&p->tentative);
    if (!t)
        return -ENOMEM;
    chunk *c = ledger_chunk(p, space, address);
    uint16_t pages = pages_to_save(space, c);
    int r = copy_to_place(p, space, address, pages, urgent, true, t);
    if (r) {
        p->tentative.count--;
        return r;
    }
    t->saved.pages = c->want;
    t->saved.patch = patch_of(c, pages);
    c->state = TENTATIVE;
    count_unsaved(p, space, -1);
    pthread_mutex_lock(&p->lock);
    if (urgent)
        p->counters.fault_chunks++;
    else
        p->counters.sweep_chunks++;
    pthread_mutex_unlock(&p->lock);
    return 0;
}

int save_stopped(snap_pump *p, uint32_t space, uint64_t address)
{
    tentative t;
    chunk *c = ledger_chunk(p, space, address);
    uint16_t pages = missing(c);
    int r = copy_to_place(p, space, address, pages, true, false, &t);
    if (r)
        return r;
    c->state = SAVED;
    t.saved.pages = c->want;
    t.saved.patch = patch_of(c, pages);
    pthread_mutex_lock(&p->lock);
    p->counters.stopped_bytes += (uint64_t)__builtin_popcount(pages) * PAGE;
    r = enqueue(p, &t.saved);
    pthread_mutex_unlock(&p->lock);
    return r;
}

int save_now(snap_pump *p, uint32_t space, uint64_t address, chunk *c)
{
    if (!is_unsaved(c))
        return 0;
    beat(p);
    int r = save_stopped(p, space, address);
    if (!r)
        count_unsaved(p, space, -1);
    return r;
}

int save_publish(snap_pump *p)
{
    int r = 0;
    if (!p->tentative.count)
        return 0;
    pthread_mutex_lock(&p->lock);
    for (size_t i = 0; i < p->tentative.count; i++) {
        const tentative *t = &p->tentative.at[i];
        chunk *c = ledger_chunk(p, t->saved.space, t->saved.address);
        if (t->early) {
            early_publish(p, c, t);
            continue;
        }
        c->state = SAVED;
        early_done(p, c);
        if (!r)
            r = enqueue(p, &t->saved);
    }
    p->tentative.count = 0;
    pthread_mutex_unlock(&p->lock);
    return r;
}

int save_forget(snap_pump *p, uint64_t start, uint64_t end)
{
    size_t kept = 0;
    int r = 0;
    for (size_t i = 0; i < p->tentative.count; i++) {
        tentative t = p->tentative.at[i];
        if (t.low >= end || t.high <= start) {
            p->tentative.at[kept++] = t;
            continue;
        }
        if (t.early) {
            early_forget(p, &t);
        } else {
            ledger_chunk(p, t.saved.space, t.saved.address)->state = UNSAVED;
            count_unsaved(p, t.saved.space, 1);
            give_place(p, t.saved.place);
        }
        if (t.only)
            r = lost(p, t.early ? PAGE : CHUNK, t.saved.address, SNAP_LOST_REMOVE);
    }
    p->tentative.count = kept;
    return r;
}

void save_last(snap_pump *p, uint64_t start, uint64_t end)
{
    for (size_t i = 0; i < p->tentative.count; i++)
        if (p->tentative.at[i].low < end && p->tentative.at[i].high > start)
            p->tentative.at[i].only = true;
}

void save_last_objects(snap_pump *p)
{
    for (size_t i = 0; i < p->tentative.count; i++)
        if (p->tentative.at[i].saved.space >= OBJECT_SPACE)
            p->tentative.at[i].only = true;
}
