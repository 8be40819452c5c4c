/* The life of a pump: set up, the loop that serves faults before it sweeps, the way to the store. */
#define _GNU_SOURCE
#include "pump_internal.h"
#include "uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LET_GO UINT64_C(0x400000)        /* releasing more at once holds mmap_lock too long */
#define PATIENCE_NS UINT64_C(10000000000) /* for the event that explains why a mark is gone */
#define MOST_UNEXPLAINED 3               /* times that a mark is gone and no event was unread */
#define CATCH_UP_NS UINT64_C(100000000)  /* at most */
#define LOOK_NS UINT64_C(2000000)
#define CATCH_UP_FAULTS 30               /* in that time; fewer: it is done */
#define OUTRUN_CHUNKS 512                /* 32 MiB */
#define THROTTLED_NS UINT64_C(1000000)
#define BEAT_MS 100                      /* the watchdog hears of us at least so often */

/* ---- set up -------------------------------------------------------------------------------- */

int snap_pump_new(int pid, int pagemap, int mem, int spill, void *staging, uint64_t slots,
                  snap_pump **pump)
{
    snap_pump *p = aligned_alloc(_Alignof(snap_pump), sizeof *p);
    if (!p)
        return -ENOMEM;
    memset(p, 0, sizeof *p); /* touched: what of it is for the pause costs no faults there */
    p->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    p->bounce = aligned_alloc(PAGE, CHUNK);
    p->free_slots = calloc(slots ? slots : 1, sizeof *p->free_slots);
    p->users = calloc(slots ? slots : 1, sizeof *p->users);
    if (p->wake < 0 || !p->bounce || !p->free_slots || !p->users) {
        int r = p->wake < 0 ? -errno : -ENOMEM;
        if (p->wake >= 0)
            close(p->wake);
        free(p->bounce);
        free(p->free_slots);
        free(p->users);
        free(p);
        return r;
    }
    p->pid = pid;
    p->uffd = p->uffdinfo = p->loadavg = -1;
    p->held = true;
    p->pagemap = pagemap;
    p->mem = mem;
    p->spill = spill;
    p->staging = staging;
    p->slots = slots;
    for (uint64_t i = 0; i < slots; i++)
        p->free_slots[i] = (uint32_t)(slots - 1 - i); /* low slots first: they stay warm */
    p->free_count = slots;
    p->counters.stale = 1; /* nothing is planned */
    p->stall_ns = UINT64_MAX;
    pthread_mutexattr_t kind;
    pthread_mutexattr_init(&kind);
    /* Who holds it may be a thread that runs after all others. */
    pthread_mutexattr_setprotocol(&kind, PTHREAD_PRIO_INHERIT);
    pthread_mutex_init(&p->lock, &kind);
    pthread_mutexattr_destroy(&kind);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&p->ready, &attr);
    pthread_cond_init(&p->told, &attr);
    pthread_cond_init(&p->leave, &attr);
    pthread_condattr_destroy(&attr);
    *pump = p;
    return 0;
}

void snap_pump_watch(snap_pump *p, snap_watchdog *watchdog, snap_exits *exits, int stall_ms)
{
    p->watchdog = watchdog;
    p->exits = exits;
    p->stall_ns = (uint64_t)stall_ms * 1000000;
}

void snap_pump_attach(snap_pump *p, int uffd, int uffdinfo)
{
    pthread_mutex_lock(&p->lock);
    p->uffd = uffd;
    p->uffdinfo = uffdinfo;
    pthread_mutex_unlock(&p->lock);
}

void snap_pump_cover(snap_pump *p, int verify)
{
    p->empties = true;
    p->verify = verify;
}

void snap_pump_pass(snap_pump *p)
{
    p->passes = true;
}

void snap_pump_free(snap_pump *p)
{
    if (!p)
        return;
    children_end(p);
    for (size_t i = 0; i < p->blocks.count; i++)
        free(p->blocks.at[i]);
    if (p->loadavg >= 0)
        close(p->loadavg);
    free(p->heads.at);
    free(p->spared.at);
    free(p->spared_chunks.at);
    free(p->blocks.at);
    free(p->windows.at);
    free(p->by_start);
    free(p->tentative.at);
    free(p->early.at);
    free(p->early_chunks.at);
    free(p->faults.at);
    free(p->releases.at);
    free(p->plain_moves.at);
    free(p->disturbed.at);
    free(p->covered.at);
    free(p->fickle.at);
    free(p->listed.at);
    free(p->work.at);
    free(p->aliases.at);
    free(p->children.at);
    free(p->closing.at);
    free(p->to_open.at);
    free(p->touched.at);
    free(p->faulted.at);
    free(p->looked_at.at);
    free(p->queue.at);
    free(p->waiting.at);
    free(p->free_slots);
    free(p->users);
    free(p->free_spill.at);
    free(p->bounce);
    close(p->wake);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->ready);
    pthread_cond_destroy(&p->told);
    pthread_cond_destroy(&p->leave);
    free(p);
}

static bool is_registered(snap_pump *p, const snap_window *w)
{
    const window *old = ledger_find(p, w->start);
    if (!old || !old->registered)
        return false;
    /* What shall not be armed any more may still be protected, and its writers wait. */
    return !w->armed || (old->is.start == w->start && old->is.end == w->end);
}

int snap_pump_plan(snap_pump *p, const snap_window *windows, size_t count, int registered, uint64_t *address)
{
    window *made = calloc(count ? count : 1, sizeof *made);
    if (!made)
        return -ENOMEM;
    for (size_t i = 0; i < count; i++)
        made[i] = (window){windows[i], (registered && windows[i].armed) || is_registered(p, &windows[i])};
    free(p->windows.at);
    p->windows.at = made;
    p->windows.count = count;
    p->windows.capacity = count ? count : 1;
    p->looked = p->surveyed = false;
    int r = ledger_index(p);
    for (size_t i = 0; !r && i < count; i++) {
        const snap_window *w = &made[i].is;
        *address = w->start;
        if (w->start >= w->end || (w->start | w->end | w->at) % PAGE)
            r = -EINVAL;
        else if (w->armed && !made[i].registered)
            r = uffd_register(p->uffd, w->start, w->end - w->start, UFFDIO_REGISTER_MODE_WP, NULL);
        made[i].registered = made[i].registered || (w->armed && !r);
    }
    p->counters.stale = r != 0;
    return r;
}

/* A round is not urgent: it would keep others from this processor for as long as there is something to
 * protect or to copy, even those who could run on another one, to which the kernel moves them late. The
 * sweep is, for it stops after a few chunks, and would wait for consumers who hold the lock and do not
 * run. */
void be_urgent(snap_pump *p, bool urgent)
{
    if (!p->may_be_urgent || p->urgent == urgent)
        return;
    struct sched_param priority = {.sched_priority = urgent};
    if (!sched_setscheduler(p->tid, (urgent ? SCHED_FIFO : SCHED_OTHER) | SCHED_RESET_ON_FORK, &priority))
        p->urgent = urgent;
}

/* ---- waiting ------------------------------------------------------------------------------ */

/* Waits for a message, and when `slots` also for a free staging slot. */
static void idle_ns(snap_pump *p, bool slots, uint64_t ns)
{
    struct pollfd fds[2] = {{.fd = p->uffd, .events = POLLIN}, {.fd = p->wake, .events = POLLIN}};
    struct timespec most = {(time_t)(ns / 1000000000), (long)(ns % 1000000000)};
    be_urgent(p, true);
    if (ppoll(fds, slots ? 2 : 1, &most, NULL) > 0 && slots && fds[1].revents) {
        uint64_t count;
        (void)!read(p->wake, &count, sizeof count);
    }
}

static void idle(snap_pump *p, bool slots, int timeout_ms)
{
    idle_ns(p, slots, (uint64_t)timeout_ms * 1000000);
}

/* Whether the next piece that nobody waits for has to wait; if so, waits for a message or its time. */
static bool rest(snap_pump *p, bool hurried)
{
    uint64_t left = pace_left(p, hurried), most = (uint64_t)BEAT_MS * 1000000;
    if (left)
        idle_ns(p, false, left < most ? left : most);
    return left != 0;
}

/* ---- the sweep ----------------------------------------------------------------------------- */

static void next_block(snap_pump *p)
{
    p->sweep_chunk = 0;
    p->sweep_block = (p->sweep_block + 1) % p->blocks.count;
}

/* Moves the cursor to the next unsaved chunk, round and round. False when there is none. */
static bool next_unsaved(snap_pump *p)
{
    for (size_t tried = 0; tried <= p->blocks.count; tried++) {
        const block *b = p->blocks.at[p->sweep_block];
        for (; p->sweep_chunk < BLOCK_CHUNKS; p->sweep_chunk++)
            if (is_unsaved(&b->chunks[p->sweep_chunk]))
                return true;
        next_block(p);
    }
    return false;
}

/* Releases chunks [first, last) but for those that an event made unsaved again meanwhile. */
static int release_saved(snap_pump *p, const block *b, uint32_t first, uint32_t last)
{
    for (uint32_t i = first; i < last;) {
        uint32_t j = i;
        while (j < last && !is_unsaved(&b->chunks[j]))
            j++;
        int r = j > i ? release_space(p, b->space, b->start + i * CHUNK, b->start + j * CHUNK) : 0;
        if (r)
            return r;
        i = j + 1;
    }
    return 0;
}

/* Whether staging has room for the unsaved chunks among [first, last): a step that broke off half
 * way would release half a huge page and split it. Always true when staging is too small for that
 * ever to be so. */
static bool room_for(snap_pump *p, const block *b, uint32_t first, uint32_t last)
{
    uint64_t needed = 0, patches = 0;
    for (uint32_t i = first; i < last; i++)
        if (is_unsaved(&b->chunks[i]) && is_patched(&b->chunks[i]))
            patches++;
        else
            needed += is_unsaved(&b->chunks[i]);
    needed += (patches + 1) / 2; /* mostly they share */
    return free_places(p) >= needed || needed > most_places(p);
}

static bool children_wait(const snap_pump *p)
{
    return p->children.count && p->unsaved_objects;
}

/* Children, and a target that is held up at its end, wait for the sweep as a writer waits for a fault:
 * what the store cannot take yet goes to the spill file. */
static bool is_urgent(const snap_pump *p)
{
    return children_wait(p) || (p->exits && snap_exits_holds(p->exits));
}

/* As many chunks as a step of the sweep has, of those whose early pages take cells that are scarce. -> how
 * many, 0: none. */
static int sweep_early(snap_pump *p)
{
    int saved = 0;
    for (place at; saved < (int)(STEP / CHUNK) && free_places(p) && early_first(p, &at); saved++) {
        bool any;
        int r = save_chunk(p, at.space, at.address, false);
        if (!r)
            r = release_space(p, at.space, at.address, at.address + CHUNK);
        if (!r)
            r = serve(p, &any);
        if (r)
            return r;
    }
    return saved;
}

/* Saves on to the end of the cursor's 2 MiB and releases what it saved there in one go. While
 * children wait for shared memory that comes first. */
static int sweep(snap_pump *p)
{
    if (!p->unsaved_chunks)
        return 0;
    bool children = children_wait(p), urgent = is_urgent(p);
    int r = urgent ? 0 : sweep_early(p);
    if (r)
        return r < 0 ? r : 0;
    while (children && p->blocks.at[p->sweep_block]->space < OBJECT_SPACE)
        next_block(p);
    if (!next_unsaved(p))
        return 0;
    const block *b = p->blocks.at[p->sweep_block];
    uint32_t first = p->sweep_chunk, i = first;
    uint32_t limit = (uint32_t)((first * CHUNK / STEP + 1) * STEP / CHUNK);
    if (!urgent && !room_for(p, b, first, limit))
        return -ENOBUFS;
    for (; i < limit; i++) {
        if (is_unsaved(&b->chunks[i]) && (r = save_chunk(p, b->space, b->start + i * CHUNK, urgent)))
            break;
        bool any;
        if ((r = serve(p, &any))) /* a writer waits for one chunk at most */
            return r;
    }
    p->sweep_chunk = i;
    int e = release_saved(p, b, first, i);
    return e ? e : r;
}

/* ---- the end ------------------------------------------------------------------------------- */

/* Releases everything in small steps, answering whoever still faults, so that the close of the uffd
 * finds little to do (closing an armed one holds the target's mmap lock for 40 to 200 ms at 4 GiB).
 * Nothing is unregistered here: that would split a mapping for a moment, and a mremap of the target
 * that spans the split would fail. */
static int let_go(snap_pump *p)
{
    p->letting_go = true;
    for (uint64_t cursor = 0;;) {
        bool any;
        int r = serve(p, &any);
        if (r)
            return r;
        if (rest(p, true))
            continue;
        uint64_t began = now_ns();
        size_t k = ledger_above(p, cursor);
        while (k < p->windows.count && !p->windows.at[p->by_start[k]].registered)
            k++;
        if (k == p->windows.count)
            return 0;
        const snap_window *w = &p->windows.at[p->by_start[k]].is;
        uint64_t start = w->start > cursor ? w->start : cursor;
        if (w->object < 0 && (r = survey_first(p, w, start, w->end, &start)))
            return r;
        uint64_t end = (start + LET_GO) & ~(STEP - 1); /* huge pages are released whole */
        if (w->end < end)
            end = w->end;
        r = start < end ? uffd_writeprotect(p->uffd, start, end - start, 0) : 0;
        if (r == -ESRCH)
            return r;
        pace_spent(p, began, 0);
        cursor = end; /* what could not be released here, the close releases */
    }
}

/* Faults and releases that still wait are answered by letting go. */
static bool finished(const snap_pump *p)
{
    return !p->unsaved_chunks && !p->tentative.count;
}

/* Whether nothing has been saved for so long that no event will explain any more why not. */
static bool stuck(snap_pump *p)
{
    if (!p->stuck_since_ns || p->stuck_at != p->unsaved_chunks) {
        p->stuck_since_ns = now_ns();
        p->stuck_at = p->unsaved_chunks;
    }
    return now_ns() - p->stuck_since_ns > PATIENCE_NS;
}

/* Whether no event will explain why marks are gone: one whose cause had begun when they were looked
 * at has been read since, as the fence of save.c tells, and there was none. KSM takes marks so, and
 * reclaim of what MADV_FREE gave up. Several times, because this gives T0 up. */
static bool unexplained(snap_pump *p, uint64_t events, int *times)
{
    int r = uffd_writeprotect(p->uffd, PAGE, PAGE, 0);
    *times = p->counters.events != events || r == -EAGAIN || r == -ESRCH ? 0 : *times + 1;
    return *times == MOST_UNEXPLAINED;
}

/* Right after T0 everything is protected, and who writes here and there meets it at every step, with all
 * that has been waiting since the pause: until the faults get fewer nothing else is done. If that is still
 * so, waits for one. */
static bool catching_up(snap_pump *p)
{
    uint64_t now = now_ns(), faults = p->counters.faults;
    if (p->caught_up)
        return false;
    if (!p->catch_up_until_ns)
        p->catch_up_until_ns = now + CATCH_UP_NS;
    else if (now >= p->look_until_ns)
        p->caught_up = faults - p->look_faults < CATCH_UP_FAULTS || now >= p->catch_up_until_ns;
    if (now >= p->look_until_ns) {
        p->look_until_ns = now + LOOK_NS;
        p->look_faults = faults;
    }
    if (!p->caught_up)
        idle_ns(p, false, p->look_until_ns - now);
    return !p->caught_up;
}

static int after_t0(snap_pump *p)
{
    int times = 0;
    while (!finished(p)) {
        bool any;
        if (atomic_load(&p->stop))
            return -ECANCELED;
        int r = serve(p, &any);
        uint64_t events = p->counters.events;
        if (!r && p->unsaved_chunks && !is_urgent(p) && (catching_up(p) || rest(p, false)))
            continue;
        uint64_t began = now_ns(), saved = p->counters.sweep_chunks;
        if (!r)
            r = sweep(p);
        pace_spent(p, began, (p->counters.sweep_chunks - saved) * CHUNK);
        if (r == -ENOBUFS) {
            p->stuck_since_ns = 0;
            idle(p, true, p->tentative.count ? 1 : BEAT_MS);
            continue;
        }
        if (r && r != -EAGAIN)
            return r;
        /* Held up: an event has been announced (EAGAIN) but is not yet there to be read. */
        bool held_up = r == -EAGAIN || (!p->unsaved_chunks && !finished(p));
        if (!held_up)
            p->stuck_since_ns = times = 0;
        else if (stuck(p) || (r == -EAGAIN && unexplained(p, events, &times)))
            return lost(p, p->unsaved_chunks * CHUNK,
                        p->blocks.at[p->sweep_block]->start + p->sweep_chunk * CHUNK,
                        SNAP_LOST_UNARMED);
        else if (!any)
            idle(p, false, 1);
    }
    return 0;
}

/* ---- ahead of T0 --------------------------------------------------------------------------- */

static int give_order(snap_pump *p, int order)
{
    pthread_mutex_lock(&p->lock);
    bool standing = p->held && !p->released; /* a release that it has not heard of yet counts */
    bool busy = p->order == ORDER_LOOK ? order != ORDER_HOLD : p->order != NO_ORDER;
    int r = p->ended ? -EPIPE : busy || standing ? -EBUSY : 0;
    if (!r && p->order == ORDER_LOOK)
        be_urgent(p, true);
    if (!r) {
        p->order = order;
        p->look_due |= order == ORDER_LOOK;
    }
    pthread_mutex_unlock(&p->lock);
    uint64_t one = 1;
    (void)!write(p->wake, &one, sizeof one);
    return r;
}

int snap_pump_order_round(snap_pump *p, int patient)
{
    p->patient = patient;
    p->only_listed = false;
    return give_order(p, ORDER_ROUND);
}

int snap_pump_order_last_round(snap_pump *p)
{
    p->only_listed = false;
    return give_order(p, ORDER_LAST_ROUND);
}

int snap_pump_order_listed_round(snap_pump *p)
{
    p->only_listed = true;
    return give_order(p, ORDER_LAST_ROUND);
}

int snap_pump_order_written(snap_pump *p)
{
    p->only_listed = false;
    return give_order(p, ORDER_WRITTEN);
}

int snap_pump_order_arm(snap_pump *p, int throttled)
{
    p->throttled = throttled;
    return give_order(p, ORDER_ARM);
}

static int set_addresses(snap_pump *p, addresses *to, const uint64_t *from, size_t count)
{
    int r = 0;
    pthread_mutex_lock(&p->lock);
    to->count = 0;
    for (size_t i = 0; i < count && !r; i++) {
        uint64_t *address = VECTOR_PUSH(to);
        if (address)
            *address = from[i];
        r = address ? 0 : -ENOMEM;
    }
    pthread_mutex_unlock(&p->lock);
    return r;
}

int snap_pump_order_open(snap_pump *p, const uint64_t *addresses, size_t count)
{
    int r = set_addresses(p, &p->to_open, addresses, count);
    return r ? r : give_order(p, ORDER_OPEN);
}

int snap_pump_order_look(snap_pump *p, uint64_t most)
{
    p->most_ahead = most;
    return give_order(p, ORDER_LOOK);
}

void snap_pump_errand(snap_pump *p, void (*run)(void *), void *of)
{
    pthread_mutex_lock(&p->lock);
    p->errand = run;
    p->errand_of = of;
    pthread_mutex_unlock(&p->lock);
}

/* By the first of two: the pump's thread when it has looked, or who waits for it. Caller holds the lock. */
static void run_errand(snap_pump *p)
{
    void (*run)(void *) = p->errand;
    if (!run)
        return;
    p->errand = NULL;
    p->errand_runs = true;
    pthread_mutex_unlock(&p->lock);
    run(p->errand_of);
    pthread_mutex_lock(&p->lock);
    p->errand_runs = false;
    pthread_cond_broadcast(&p->told);
}

static void await_errand(snap_pump *p, bool run)
{
    pthread_mutex_lock(&p->lock);
    if (run)
        run_errand(p);
    p->errand = NULL;
    while (p->errand_runs)
        pthread_cond_wait(&p->told, &p->lock);
    pthread_mutex_unlock(&p->lock);
}

void snap_pump_await_errand(snap_pump *p)
{
    await_errand(p, true);
}

void snap_pump_forget_errand(snap_pump *p)
{
    await_errand(p, false);
}

int snap_pump_touched(snap_pump *p, const uint64_t *addresses, size_t count)
{
    return set_addresses(p, &p->touched, addresses, count);
}

void snap_pump_assist(snap_pump *p)
{
    pthread_mutex_lock(&p->lock);
    (void)written_assist(p);
    pthread_mutex_unlock(&p->lock);
}

int snap_pump_order_hold(snap_pump *p)
{
    return give_order(p, ORDER_HOLD);
}

int snap_pump_await(snap_pump *p, int timeout_ms, snap_pump_round *round)
{
    struct timespec until;
    deadline(&until, timeout_ms);
    int waited = 0;
    pthread_mutex_lock(&p->lock);
    while (p->order != NO_ORDER && !p->ended && waited != ETIMEDOUT)
        if (!written_assist(p))
            waited = pthread_cond_timedwait(&p->told, &p->lock, &until);
    int r = p->ended ? -EPIPE : p->order != NO_ORDER ? -ETIMEDOUT : 0;
    if (!r && round)
        *round = p->round;
    pthread_mutex_unlock(&p->lock);
    return r;
}

static void order_done(snap_pump *p)
{
    pthread_mutex_lock(&p->lock);
    p->order = NO_ORDER;
    pthread_cond_broadcast(&p->told);
    pthread_mutex_unlock(&p->lock);
}

/* Caller holds the lock. */
static void settle_as_ordered(snap_pump *p)
{
    pthread_mutex_unlock(&p->lock);
    int r = settle(p, p->settle_most, p->settle_trust);
    pthread_mutex_lock(&p->lock);
    p->settled = r;
    p->settles = false;
    pthread_cond_broadcast(&p->told);
}

/* Until go, release or stop. */
static int stand(snap_pump *p)
{
    pthread_mutex_lock(&p->lock);
    while (!p->after_t0 && !p->released && !atomic_load(&p->stop)) {
        if (p->settles) {
            settle_as_ordered(p);
            continue;
        }
        struct timespec until;
        deadline(&until, BEAT_MS);
        pthread_cond_timedwait(&p->told, &p->lock, &until);
        beat(p);
    }
    p->held = false;
    if (!p->after_t0) /* the target runs on: no look is good any more */
        p->at_t0 = p->looked = p->surveyed = false;
    pthread_mutex_unlock(&p->lock);
    return atomic_load(&p->stop) ? -ECANCELED : 0;
}

static int hold(snap_pump *p)
{
    pthread_mutex_lock(&p->lock);
    p->held = true;
    p->released = false;
    p->order = NO_ORDER;
    pthread_cond_broadcast(&p->told);
    pthread_mutex_unlock(&p->lock);
    return stand(p);
}

int snap_pump_order_settle(snap_pump *p, uint64_t most, int trust)
{
    pthread_mutex_lock(&p->lock);
    int r = p->ended ? -EPIPE : !p->held || p->settles ? -EBUSY : 0;
    if (!r) {
        p->settles = true;
        p->settle_most = most;
        p->settle_trust = trust;
        pthread_cond_broadcast(&p->told);
    }
    pthread_mutex_unlock(&p->lock);
    return r;
}

int snap_pump_await_settled(snap_pump *p)
{
    pthread_mutex_lock(&p->lock);
    while (p->settles && !p->ended)
        if (!written_assist(p))
            pthread_cond_wait(&p->told, &p->lock);
    int r = p->settles ? -EPIPE : p->settled;
    pthread_mutex_unlock(&p->lock);
    return r;
}

void snap_pump_go(snap_pump *p)
{
    pthread_mutex_lock(&p->lock);
    p->after_t0 = true;
    p->hurried = p->counters.remainder_bytes <= p->slots * CHUNK / 16; /* the reserve takes that, too */
    pthread_cond_broadcast(&p->told);
    pthread_cond_broadcast(&p->ready);
    pthread_mutex_unlock(&p->lock);
}

void snap_pump_release(snap_pump *p)
{
    pthread_mutex_lock(&p->lock);
    p->released = true;
    pthread_cond_broadcast(&p->told);
    pthread_mutex_unlock(&p->lock);
}

/* Whether writers are so fast that another round would have to copy a good part of what this one does. */
static bool outrun(const snap_pump *p, int order)
{
    return order == ORDER_ROUND && !p->patient && p->listed.count >= OUTRUN_CHUNKS &&
           p->listed.count > p->round.copied_chunks / 4;
}

static int look_for_written(snap_pump *p)
{
    be_urgent(p, false);
    return p->only_listed ? faults_protect(p) : written_list(p);
}

static int only_look(snap_pump *p)
{
    p->round = (snap_pump_round){0};
    p->armed_ahead = true;
    int r = look_for_written(p);
    if (!r)
        order_done(p);
    return r;
}

static int go_round(snap_pump *p, int order)
{
    bool copies = order != ORDER_ARM;
    if (!p->round_runs) {
        p->round = (snap_pump_round){0};
        p->round_runs = true; /* its work must not be begun twice, though it may have to rest first */
        p->cursor = 0;
        p->next_pages = 0;
        p->armed_ahead = true;
        p->hurried = order == ORDER_LAST_ROUND;
        int r = gains(p) ? look_for_written(p) : 0;
        if (r)
            return r;
        begin_work(p);
    }
    if (!gains(p) && rest(p, order != ORDER_ROUND)) /* nobody waits for those */
        return 0;
    be_urgent(p, order != ORDER_ROUND && !p->passes); /* nobody waits for it then */
    uint64_t began = now_ns(), copied = p->round.copied_bytes;
    int r = ahead_slice(p, copies);
    if (!r && outrun(p, order))
        r = p->round.outrun = 1;
    pace_spent(p, began, p->round.copied_bytes - copied);
    p->round_runs = r != 1;
    p->throttled = p->throttled && p->round_runs;
    if (r == -ENOBUFS)
        idle(p, true, BEAT_MS);
    if (r != 1)
        return r == -ENOBUFS ? 0 : r;
    r = end_work(p);
    if (gains(p))
        early_ready(p);
    p->hurried = false;
    p->round.next_chunks = p->listed.count;
    p->round.next_bytes = p->next_pages * PAGE;
    if (!r)
        order_done(p);
    return r;
}

static int open_pages(snap_pump *p)
{
    int r = 0;
    for (size_t i = 0; i < p->to_open.count && !r; i++)
        r = open_page(p, p->to_open.at[i]);
    if (!r)
        order_done(p);
    return r;
}

/* Somebody may want it to be held afterwards, and have said so. */
static int look_at_t0(snap_pump *p)
{
    p->at_t0 = true;
    int r = written_look(p);
    if (!r)
        settle_ahead(p);
    pthread_mutex_lock(&p->lock);
    run_errand(p);
    be_urgent(p, true);
    p->order = p->order == ORDER_LOOK ? NO_ORDER : p->order;
    pthread_mutex_unlock(&p->lock);
    return r;
}

static int carry_out(snap_pump *p, int order, bool look_due)
{
    if (look_due)
        return look_at_t0(p);
    switch (order) {
    case ORDER_ROUND:
    case ORDER_LAST_ROUND:
    case ORDER_ARM:
        return go_round(p, order);
    case ORDER_WRITTEN:
        return only_look(p);
    case ORDER_OPEN:
        return open_pages(p);
    case ORDER_HOLD:
        if (!p->faults.count && !p->releases.count && uffd_poll(p->uffd, 0) == 0)
            return hold(p);
        idle(p, false, 1);
        return 0;
    default:
        idle(p, true, BEAT_MS);
        return 0;
    }
}

/* Whoever is let through while memory is protected undoes as much: where that gains nothing on writers, they are
 * let through now and then. */
static bool may_serve(snap_pump *p)
{
    uint64_t now = now_ns();
    if (p->throttled && p->round_runs && now < p->serve_at_ns)
        return false;
    p->serve_at_ns = now + THROTTLED_NS;
    return true;
}

static int ahead_of_t0(snap_pump *p)
{
    while (!p->after_t0) {
        bool any;
        if (atomic_load(&p->stop))
            return -ECANCELED;
        int r = may_serve(p) ? serve(p, &any) : 0;
        if (r)
            return r;
        pthread_mutex_lock(&p->lock);
        int order = p->order;
        bool look_due = p->look_due;
        p->look_due = false;
        pthread_mutex_unlock(&p->lock);
        r = carry_out(p, order, look_due);
        if (r)
            return r;
    }
    return 0;
}

/* Not left to the caller, who has to get hold of the interpreter first: until it is closed who discards
 * or unmaps memory waits for nobody. */
static void close_uffd(snap_pump *p)
{
    if (p->watchdog)
        snap_watchdog_know(p->watchdog, -1);
    (void)dup3(p->wake, p->uffd, O_CLOEXEC); /* the number stays the caller's */
}

int snap_pump_run(snap_pump *p)
{
    p->tid = (pid_t)syscall(SYS_gettid);
    p->may_be_urgent = p->urgent = (sched_getscheduler(0) & ~SCHED_RESET_ON_FORK) == SCHED_FIFO;
    int r = stand(p);
    bool attached = p->uffd >= 0;
    if (!r)
        r = ahead_of_t0(p);
    if (!r)
        r = p->passes ? faults_prove(p) : after_t0(p);
    if (r == -ESRCH && p->after_t0 && finished(p))
        r = 0; /* it has ended, and nothing of it was needed any more */
    if (r == -ESRCH)
        r = lost(p, p->unsaved_chunks * CHUNK, 0, SNAP_LOST_GONE);
    if (p->exits)
        snap_exits_end(p->exits);
    bool gone = p->counters.lost_reason == SNAP_LOST_GONE;
    if (attached && !gone && (r || p->armed_ahead))
        (void)let_go(p); /* a courtesy: the close of the uffd does all of it */
    children_go(p, true);
    if (attached)
        close_uffd(p);
    if (!r && p->passes)
        r = early_hand_out(p);
    snap_pump_end(p);
    return r;
}

void snap_pump_stop(snap_pump *p)
{
    pthread_mutex_lock(&p->lock);
    atomic_store(&p->stop, 1);
    pthread_cond_broadcast(&p->told);
    pthread_mutex_unlock(&p->lock);
    uint64_t one = 1;
    (void)!write(p->wake, &one, sizeof one);
}
