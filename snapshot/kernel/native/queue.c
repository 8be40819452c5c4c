/* The way of saved chunks to the store: places to keep them in, and who gets which when. */
#define _GNU_SOURCE
#include "pump_internal.h"

#include <errno.h>
#include <time.h>
#include <unistd.h>

/* Chunks that are copied and that no consumer has taken yet, when the not urgent wait: to copy more would
 * only take the processor from others, the consumers among them, and places from who is urgent. */
#define MOST_AHEAD 128

/* Slots that only the urgent may take: a quarter, with those that are cells, but some of them in any case. */
static uint64_t reserve(const snap_pump *p)
{
    uint64_t least = least_reserve(p), most = p->slots / 4;
    uint64_t left = most > p->cut_slots ? most - p->cut_slots : 0;
    return p->hurried ? 0 : left > least ? left : least;
}

uint64_t most_places(const snap_pump *p)
{
    uint64_t others = reserve(p) + p->cut_slots;
    return p->slots > others ? p->slots - others : 0;
}

/* Caller holds the lock. */
static int64_t spill(snap_pump *p)
{
    uint64_t slot = p->free_spill.count ? p->free_spill.at[--p->free_spill.count] : p->spill_end++;
    p->counters.spilled_chunks++;
    return -(int64_t)slot - 1;
}

/* Caller holds the lock. */
static int64_t take(snap_pump *p, bool urgent, bool no_spill)
{
    int64_t place = NO_PLACE;
    if (p->free_count > (urgent ? 0 : reserve(p))) {
        place = p->free_slots[--p->free_count];
        p->users[place] = 1;
        uint64_t used = p->slots - p->free_count;
        if (used > p->counters.peak_slots)
            p->counters.peak_slots = used;
    } else if (urgent && !no_spill && p->spill >= 0) {
        place = spill(p);
    }
    return place;
}

/* Caller holds the lock. A slot that is open to other pages too, or a new one. */
static int64_t share(snap_pump *p, uint16_t pages, bool urgent, bool no_spill)
{
    shared_slot *fullest = &p->open[0];
    int64_t place = NO_PLACE;
    for (int i = 0; place == NO_PLACE && i < OPEN_SLOTS; i++) {
        shared_slot *one = &p->open[i];
        if (one->used && !(one->used & pages)) {
            place = one->slot;
            p->users[place]++;
            one->used |= pages;
        } else if (fullest->used && __builtin_popcount(one->used) > __builtin_popcount(fullest->used)) {
            fullest = one;
        } else if (!one->used) {
            fullest = one;
        }
    }
    if (place == NO_PLACE) {
        place = take(p, urgent, no_spill);
        if (place >= 0)
            *fullest = (shared_slot){(uint32_t)place, pages};
    }
    return place;
}

int64_t take_spill(snap_pump *p)
{
    pthread_mutex_lock(&p->lock);
    int64_t place = p->spill >= 0 ? spill(p) : NO_PLACE;
    pthread_mutex_unlock(&p->lock);
    return place;
}

int64_t take_place(snap_pump *p, uint16_t pages, bool urgent, bool no_spill)
{
    pthread_mutex_lock(&p->lock);
    int64_t place = pages ? share(p, pages, urgent, no_spill) : take(p, urgent, no_spill);
    pthread_mutex_unlock(&p->lock);
    return place;
}

uint64_t free_places(snap_pump *p)
{
    pthread_mutex_lock(&p->lock);
    uint64_t count = p->free_count > reserve(p) ? p->free_count - reserve(p) : 0;
    if (!p->hurried && p->queue.count - p->queue_head > MOST_AHEAD)
        count = 0;
    pthread_mutex_unlock(&p->lock);
    return count;
}

/* Caller holds the lock. */
static void put_back(snap_pump *p, int64_t place)
{
    if (place >= 0) {
        if (--p->users[place])
            return;
        for (int i = 0; i < OPEN_SLOTS; i++)
            if (p->open[i].slot == place)
                p->open[i].used = 0;
        p->free_slots[p->free_count++] = (uint32_t)place;
    } else if (place != NO_PLACE) {
        uint32_t *slot = VECTOR_PUSH(&p->free_spill);
        if (slot) /* without memory the slot is only not used again */
            *slot = (uint32_t)(-place - 1);
    }
}

void give_place(snap_pump *p, int64_t place)
{
    pthread_mutex_lock(&p->lock);
    put_back(p, place);
    pthread_mutex_unlock(&p->lock);
}

int enqueue(snap_pump *p, const snap_saved *saved)
{
    chunk *c = ledger_chunk(p, saved->space, saved->address);
    queued *entry = c ? VECTOR_PUSH(&p->queue) : NULL;
    if (!entry)
        return -ENOMEM;
    uint32_t copied = saved->patch ? saved->patch & ~SNAP_PATCH : saved->pages;
    c->kept = (uint16_t)saved->pages;
    /* A patch does not make void what it patches. */
    *entry = (queued){*saved, saved->patch ? c->version : ++c->version};
    p->counters.saved_bytes += (uint64_t)__builtin_popcount(copied) * PAGE;
    if (!p->held) /* in the pause nobody is woken for each */
        pthread_cond_signal(&p->ready);
    return 0;
}

/* Drops an entry that a newer copy has made void. Caller holds the lock. */
static bool void_entry(snap_pump *p, const queued *entry)
{
    if (ledger_chunk(p, entry->saved.space, entry->saved.address)->version == entry->version)
        return false;
    put_back(p, entry->saved.place);
    return true;
}

/* Whether an entry may go to a consumer: not while its elder is with one. Caller holds the lock. */
static bool take_off(snap_pump *p, const queued *entry)
{
    chunk *c = ledger_chunk(p, entry->saved.space, entry->saved.address);
    if (c->flying)
        return false;
    c->flying = true;
    return true;
}

/* Up to `most` entries: of one chunk one at a time, in the order in which they were made. What waits
 * is older than all of the queue, so it goes first. *freed: places came free. Caller holds the lock. */
static int hand_out(snap_pump *p, snap_saved *out, int most, bool *freed)
{
    int n = 0;
    size_t kept = 0;
    for (size_t i = 0; i < p->waiting.count; i++) {
        queued entry = p->waiting.at[i];
        if (void_entry(p, &entry))
            *freed = true;
        else if (n < most && take_off(p, &entry))
            out[n++] = entry.saved;
        else
            p->waiting.at[kept++] = entry;
    }
    p->waiting.count = kept;
    while (n < most && p->queue_head < p->queue.count) {
        queued entry = p->queue.at[p->queue_head];
        if (void_entry(p, &entry)) {
            *freed = true;
        } else if (take_off(p, &entry)) {
            out[n++] = entry.saved;
        } else {
            queued *slot = VECTOR_PUSH(&p->waiting);
            if (!slot)
                break; /* no memory: it stays at the head until its elder is done */
            *slot = entry;
        }
        p->queue_head++;
    }
    if (p->queue_head == p->queue.count)
        p->queue_head = p->queue.count = 0;
    return n;
}

static void wake(snap_pump *p)
{
    uint64_t one = 1;
    (void)!write(p->wake, &one, sizeof one);
}

int snap_pump_next(snap_pump *p, snap_saved *out, int most, int timeout_ms)
{
    struct timespec until;
    deadline(&until, timeout_ms);
    int n = 0, waited = 0;
    bool freed = false;
    pthread_mutex_lock(&p->lock);
    while (!n && waited != ETIMEDOUT) {
        n = hand_out(p, out, most, &freed);
        if (n || (p->ended && !p->waiting.count && !p->queue.count))
            break;
        waited = pthread_cond_timedwait(&p->ready, &p->lock, &until);
    }
    if (!n && p->ended && !p->waiting.count && !p->queue.count)
        n = -EPIPE;
    pthread_mutex_unlock(&p->lock);
    if (freed)
        wake(p);
    return n;
}

void snap_pump_done(snap_pump *p, const snap_saved *saved, int count)
{
    pthread_mutex_lock(&p->lock);
    for (int i = 0; i < count; i++) {
        put_back(p, saved[i].pages ? saved[i].place : NO_PLACE);
        ledger_chunk(p, saved[i].space, saved[i].address)->flying = false;
    }
    pthread_cond_broadcast(&p->ready);
    pthread_mutex_unlock(&p->lock);
    wake(p);
}

void snap_pump_end(snap_pump *p)
{
    pthread_mutex_lock(&p->lock);
    p->ended = true;
    pthread_cond_broadcast(&p->ready);
    pthread_cond_broadcast(&p->told);
    pthread_mutex_unlock(&p->lock);
}

void snap_pump_stats(snap_pump *p, snap_pump_counters *out)
{
    pthread_mutex_lock(&p->lock);
    *out = p->counters;
    pthread_mutex_unlock(&p->lock);
}
