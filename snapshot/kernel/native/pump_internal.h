/* Shared by ledger.c, cover.c, survey.c, spare.c, written.c, listed_faults.c, ahead.c, settle.c, pace.c, save.c, early.c, queue.c,
 * serve.c, peek.c, children.c and pump.c: the parts of a pump. */
#ifndef SNAP_PUMP_INTERNAL_H
#define SNAP_PUMP_INTERNAL_H

#include "deadline_internal.h"
#include "pump.h"
#include "vector_internal.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/uio.h>
#include <time.h>

#define PAGE UINT64_C(4096)
#define CHUNK UINT64_C(65536)
#define CHUNK_PAGES 16
#define BLOCK_CHUNKS 1024
#define BLOCK (CHUNK * BLOCK_CHUNKS)
#define STEP UINT64_C(0x200000) /* sweep and release: 2 MiB, so that huge pages stay huge */
#define OBJECT_SPACE (1u << 16)
#define NO_PLACE INT64_MIN

/* Of a chunk. SAVED ahead of T0: `kept` was copied when it was protected; whether it still is, the
 * page tables know. TENTATIVE: see save.c. */
enum { UNSAVED = 0, TENTATIVE = 1, SAVED = 2 };

typedef struct {
    uint16_t want;    /* pages that hold something: as last seen, from T0 on as they were then */
    uint16_t kept;    /* pages of the newest copy that was handed on */
    uint16_t bare;    /* UNSAVED: pages of `kept` of which the copy is not good any more */
    uint16_t version; /* of that copy; under the lock */
    uint8_t state;
    bool flying;      /* a copy is with the consumers; under the lock */
    bool listed;      /* to be looked at at T0 (cover.c) */
    bool due;         /* what `account` has entered of it: */
    uint16_t counted; /* wanted pages */
    uint16_t lacking; /* of them, those without a copy */
    uint16_t early;   /* UNSAVED: its pages that are kept already (early.c) */
    uint32_t first_early; /* the number of the first of them, 0: none */
} chunk;

static inline bool is_unsaved(const chunk *c)
{
    return c->want && c->state == UNSAVED;
}

/* Of an UNSAVED chunk: the pages of which there is no good copy. */
static inline uint16_t missing(const chunk *c)
{
    return (uint16_t)(c->want & (c->bare | ~c->kept));
}

/* Of them: those of which no early page is kept either. */
static inline uint16_t lacking(const chunk *c)
{
    return (uint16_t)(missing(c) & ~c->early);
}

/* What snap_saved says of a copy of these pages of a chunk: a patch, if they are not all that it wants. */
static inline uint32_t patch_of(const chunk *c, uint16_t pages)
{
    return pages != c->want ? SNAP_PATCH | pages : 0;
}

/* 64 MiB of one space. Blocks are made when something is found in them: a reservation costs none. */
typedef struct {
    uint32_t space;
    uint64_t start; /* space address, a multiple of BLOCK */
    chunk chunks[BLOCK_CHUNKS];
} block;

/* Where a piece of a space is in the target's address space now. */
typedef struct {
    snap_window is;
    bool registered;
} window;

/* A copied chunk that may not be published before a fence has passed (see save.c). */
typedef struct {
    snap_saved saved;
    uint64_t low, high; /* the run-time addresses that it was read from lie in [low, high) */
    bool only;          /* it cannot be copied again: its memory has been discarded or unmapped */
    uint32_t early;     /* the number of the early page that it is (saved.pages), 0: a chunk */
} tentative;

/* A cell of early.c, in staging or (-cell - 1) in the spill file, counted in pages; the one after it, of
 * those of a chunk or of the free ones; numbers, which are indices and 1, so that 0 is none. */
typedef struct {
    int64_t cell;
    uint32_t next;
    uint16_t bit; /* which page of its chunk */
} early_page;

typedef struct {
    uint32_t first; /* number */
    uint64_t count;
} free_cells;

/* A staging slot that patches of several chunks share: each has its pages where they are in the chunk, so
 * those whose pages differ fit into one. */
typedef struct {
    uint32_t slot;
    uint16_t used; /* pages; 0: none is open here */
} shared_slot;
#define OPEN_SLOTS 8

/* An entry of the queue: void when its chunk has a newer version. */
typedef struct {
    snap_saved saved;
    uint16_t version;
} queued;

typedef struct {
    uint64_t start, end;
} range;

/* Of a chunk. */
typedef struct {
    uint64_t address;
    uint32_t space;
} place;

/* What a look at a chunk's pages finds. */
typedef struct {
    uint16_t want; /* hold something */
    uint16_t bare; /* of them, those that are not protected */
    uint16_t mask; /* pages that were looked at */
} seen;

/* Pages on their way into cells, with one call of the kernel for all. */
#define MOST_AT_ONCE 512 /* half of what the kernel takes (UIO_MAXIOV) */
typedef struct {
    struct iovec here[MOST_AT_ONCE], there[MOST_AT_ONCE];
    struct {
        place of;
        uint32_t number;
        uint16_t bit;
    } pages[MOST_AT_ONCE];
    size_t count;
} batch;

typedef struct looking looking; /* see written.c */

typedef VECTOR(range) ranges;
typedef VECTOR(place) places;
typedef VECTOR(uint64_t) addresses;

#define MARKS 16

/* A look began. */
typedef struct {
    uint64_t at_ns;
    uint64_t faults; /* in the ring then */
} fault_mark;

enum { NO_ORDER, ORDER_ROUND, ORDER_LAST_ROUND, ORDER_ARM, ORDER_WRITTEN, ORDER_OPEN, ORDER_LOOK,
       ORDER_HOLD };

/* See pace.c; ns of CLOCK_MONOTONIC, or of the processors. */
typedef struct {
    uint64_t bytes;   /* a second, 0: any */
    unsigned percent; /* of a processor, for all threads of this process; 0: any */
    uint64_t rested_ns, due_ns; /* nothing is copied before */
    uint64_t share_since_ns, share_used_ns;
} pace;

struct snap_pump {
    int pid, uffd, uffdinfo, pagemap, mem, spill;
    int wake; /* eventfd: a slot came free, an order, or stop */
    uint8_t *staging;
    uint64_t slots;
    snap_watchdog *watchdog;
    snap_exits *exits;
    uint64_t stall_ns;
    uint8_t *bounce; /* one chunk, on its way to the spill file */

    VECTOR(block *) blocks;     /* by (space, start); only run inserts, under the lock */
    VECTOR(window) windows;     /* by (space, at) */
    uint32_t *by_start;         /* indices of windows, by start */
    VECTOR(tentative) tentative;
    VECTOR(early_page) early;   /* all cells */
    free_cells free_early[2];   /* those of staging, and of the spill file */
    uint64_t cut_slots;         /* of staging, into cells */
    uint64_t early_used;        /* cells */
    batch batch;
    places early_chunks;        /* those that got their first early page, in that order */
    size_t early_head;          /* of those before it nothing is to be done */
    addresses faults;           /* those whose fault is not yet served */
    VECTOR(range) releases;     /* ranges to be released as soon as the kernel lets us */
    VECTOR(range) plain_moves;  /* callers of mremap that were seen to leave nothing behind */
    VECTOR(range) disturbed;    /* what events touched while `watching` */
    VECTOR(range) aliases;      /* mappings of shared objects that are no window, but were told of after
                                   T0; where one ends is not known if it is empty here */
    VECTOR(int) children;       /* their userfaultfds, held until shared memory is saved */
    bool passes;                /* writers wait for nobody, and only the page tables tell (written.c) */
    bool at_t0;                 /* the target stands still: a look has been ordered */
    bool looked;                /* at what was written: written_look */
    bool surveyed;              /* … and at all that has to be looked at: settle_ahead */
    uint64_t held_ahead;        /* pages that it has copied */
    const snap_fault_ring *ring; /* see listed_faults.c; NULL: nobody lists */
    uint64_t pages_each, quiet_ns; /* see snap_pump_list */
    fault_mark marks[MARKS];    /* the newest last */
    size_t mark_count;
    uint64_t listed_from;       /* faults in it before those that count */
    bool only_listed;           /* this round looks at nothing else */
    uint64_t forks;             /* in it at T0 */
    bool by_list;               /* at T0 only what it lists was looked at, and that is not proved yet */
    addresses faulted;          /* pages, sorted: what it lists */
    ranges looked_at;           /* at T0 because of that */
    uint64_t event_ns;          /* when the last event came, 0: none has */
    uint64_t most_ahead;        /* bytes that it may copy */
    bool empties;               /* protecting covers empty pages, and pagemap tells them apart */
    bool verify;                /* at T0 look at everything, and compare */
    int loadavg;                /* /proc/loadavg, -1: not open yet */
    long listed_pid;            /* the last one when all its threads were listed, 0: they were not */
    uint64_t look_again_ns;     /* for what their threads hold */
    uint64_t clears;            /* see snap_pump_clears */
    addresses heads;            /* of the robust lists of the threads */
    addresses spared;           /* of pages, sorted */
    places spared_chunks;       /* to be listed at T0: a round protected them but for such pages */
    ranges covered, fickle;     /* see cover.c; run-time addresses */
    seen found[BLOCK_CHUNKS];   /* by the look at a block at T0 */
    places listed;              /* chunks to be looked at at T0, or in the next round */
    places work;                /* of this round, sorted */
    uint64_t wanted_pages;      /* of all chunks, as `account` was told */
    uint64_t lacking_pages;     /* of them, those without a copy */
    uint64_t unsaved_chunks;    /* with wanted pages that are in no copy of theirs */
    uint64_t unsaved_objects;   /* of them, those of shared objects */
    size_t sweep_block;
    uint32_t sweep_chunk;
    uint64_t stuck_since_ns;    /* since when nothing could be saved that should; 0: it can */
    uint64_t stuck_at;          /* unsaved_chunks then */
    bool after_t0;
    bool armed_ahead;           /* by a round: not everything is released when all is saved */
    bool watching;
    bool round_runs;            /* the order of a round has been begun */
    bool aliased;               /* ahead of T0: shared objects had mappings that were no window */
    bool forked;                /* ahead of T0: children can write to shared memory unseen */
    bool closes;                /* the thread `closer` runs */
    pthread_t closer;
    bool huge_removed;          /* ahead of T0: pages of hugetlbfs were discarded (see settle.c) */
    bool hurried;               /* the last rounds: T0 waits, and there is nobody to make room */
    uint64_t next_pages;        /* see snap_pump_round */
    bool may_be_urgent, urgent; /* this thread runs before others, when it waits for a fault */
    pid_t tid;                  /* this thread */
    bool caught_up;             /* see catching_up */
    uint64_t catch_up_until_ns, look_until_ns, look_faults;
    bool throttled;             /* this one lets writers through once in a while only (ORDER_ARM) */
    uint64_t serve_at_ns;
    bool patient;               /* a round is not given up because of writers */
    bool letting_go;            /* nothing is saved any more: faults are released at once */

    pace pace;
    uint64_t singles_ns;        /* see serve.c, lets_one_page */
    uint64_t cursor;            /* of a round: the run-time address to go on at */
    snap_pump_round round;

    atomic_int stop;

    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t ready; /* for the consumers */
    pthread_cond_t told;  /* an order was given, is done, go, or run has ended */
    pthread_cond_t leave; /* for `closer` */
    VECTOR(int) closing;  /* userfaultfds of children that may run */
    bool last_closed;     /* no more will come */
    int order;
    bool look_due;     /* ordered, and not begun; it may be held afterwards by now */
    void (*errand)(void *); /* after the look; NULL: none, or it has begun */
    void *errand_of;
    bool errand_runs;
    addresses to_open; /* for ORDER_OPEN */
    addresses touched; /* see snap_pump_touched */
    bool held, released;
    looking *looking;     /* NULL: nobody can help */
    bool settles;         /* what follows was ordered, and is not done */
    uint64_t settle_most;
    int settle_trust, settled;
    VECTOR(queued) queue;
    size_t queue_head;
    VECTOR(queued) waiting; /* for an older copy of their chunk to be done; older than all of queue */
    uint32_t *free_slots;
    uint64_t free_count;
    uint16_t *users; /* of each slot */
    shared_slot open[OPEN_SLOTS];
    VECTOR(uint32_t) free_spill;
    uint64_t spill_end;
    bool ended;
    snap_pump_counters counters;
};

/* Whether this round is one of those that gain on writers who wait for nobody: nothing of it is stored yet. */
static inline bool gains(const snap_pump *p)
{
    return p->passes && p->hurried;
}

/* pump.c */
/* Who runs the pump may have made it run before all others, for who waits at a fault: whether it is to. By its
 * own thread, or while that looks, under the lock. */
void be_urgent(snap_pump *p, bool urgent);

/* ledger.c */
/* Sorts the windows; after every change of one. */
int ledger_index(snap_pump *p);
window *ledger_find(snap_pump *p, uint64_t address);
/* Position in by_start of the first window that ends above `address`. */
size_t ledger_above(const snap_pump *p, uint64_t address);
/* The first window of `space` that may hold space address `at` or above; iterate while inside. */
size_t ledger_first(const snap_pump *p, uint32_t space, uint64_t at);
/* The first block of shared objects; all behind it are. Others are not looked at for that: in the pause the
 * first use of each takes long. */
size_t ledger_objects(const snap_pump *p);
/* The chunk at a space address: NULL when nothing was ever found near it. */
chunk *ledger_chunk(const snap_pump *p, uint32_t space, uint64_t at);
/* The same, made when it is not there; NULL when there is no memory. */
chunk *ledger_make(snap_pump *p, uint32_t space, uint64_t at);
/* Takes [start, end) out of all windows (unmapped), or moves it (mremap). */
int ledger_unmap(snap_pump *p, uint64_t start, uint64_t end);
int ledger_move(snap_pump *p, uint64_t from, uint64_t to, uint64_t length);
/* Ahead of T0: the copies of these pages of a chunk are worth nothing, */
void ledger_soil(snap_pump *p, uint32_t space, chunk *c, uint16_t pages);
/* … or of all chunks in the run-time range [start, end) are worth nothing. */
int ledger_distrust(snap_pump *p, uint64_t start, uint64_t end);
/* Whether a mapping of a shared object is in the run-time range [start, end). */
bool ledger_shared(const snap_pump *p, uint64_t start, uint64_t end);
/* Whether any window of hugetlbfs is in the run-time range [start, end). */
bool ledger_huge(const snap_pump *p, uint64_t start, uint64_t end);
/* … or any that is coverable (cover.c). */
bool ledger_coverable(const snap_pump *p, uint64_t start, uint64_t end);
/* Grows [*low, *high), run-time addresses in w, to whole pages: what the kernel protects at once. */
void whole_pages(const snap_window *w, uint64_t *low, uint64_t *high);
/* Wanted bytes of shared objects in chunks that are UNSAVED. */
uint64_t ledger_unsaved_objects(const snap_pump *p, uint64_t *where);
/* Wanted bytes of [start, end) (run-time) in chunks that are not at least `state`, without the early. */
uint64_t ledger_unsaved(snap_pump *p, uint64_t start, uint64_t end, uint8_t state, uint64_t *where);

/* cover.c */
bool ranges_meet(const ranges *set, uint64_t start, uint64_t end);
int ranges_add(ranges *set, uint64_t start, uint64_t end);
int ranges_remove(ranges *set, uint64_t start, uint64_t end);
/* Whether parts of w can be covered at all. */
bool coverable(const snap_pump *p, const snap_window *w);
/* All pages of [start, end), empty or not, of a coverable window have just been protected. */
int cover(snap_pump *p, uint64_t start, uint64_t end);
/* [start, end) is not covered any more; `for_good`: nor will it be. */
int uncover(snap_pump *p, uint64_t start, uint64_t end, bool for_good);
/* Whether w is covered at `at`, and up to where that is so (or is not so). */
bool is_covered(const snap_pump *p, const snap_window *w, uint64_t at, uint64_t *until);
/* The chunk is to be looked at at T0. */
int list_chunk(snap_pump *p, uint32_t space, uint64_t address, chunk *c);
/* The same of all chunks in the run-time range [start, end). */
int list_range(snap_pump *p, uint64_t start, uint64_t end);
/* By space and address, each once, without those that are not to be looked at any more. */
void sort_listed(snap_pump *p);
/* After sort_listed at T0: whether the chunk is in the list itself; its mark alone proves nothing. */
bool was_looked_at(const snap_pump *p, uint32_t space, uint64_t address);
/* What is listed is the work of a round, and afterwards what is left of that is listed. */
void begin_work(snap_pump *p);
int end_work(snap_pump *p);
/* The first work of `space` at or above an address, NULL: none. */
const place *work_from(const snap_pump *p, uint32_t space, uint64_t address);
/* After every change of want, kept or state ahead of T0. */
void account(snap_pump *p, uint32_t space, chunk *c);

/* survey.c */
/* Looks at the pages of w in the run-time range [start, end), at most BLOCK: out[i] is the i-th chunk
 * counted from the one that holds start. */
int survey(const snap_pump *p, const snap_window *w, uint64_t start, uint64_t end, seen *out);
/* The chunks that `survey` gives for that range. */
size_t survey_chunks(const snap_window *w, uint64_t start, uint64_t end);
/* Where in [start, end) of w anything may be, `end` when nowhere; a multiple of PAGE. */
int survey_first(const snap_pump *p, const snap_window *w, uint64_t start, uint64_t end, uint64_t *first);

/* spare.c */
/* Finds the pages that must not be protected now; before each protecting. `all`: also those that only
 * became so a moment ago. */
int spare_find(snap_pump *p, bool all);
/* Those of the chunk of w at a space address, as a bitmap. */
uint16_t spare_pages(const snap_pump *p, const snap_window *w, uint64_t address);
/* Protects the other pages of w in [start, end), run-time addresses. */
int spare_protect(const snap_pump *p, const snap_window *w, uint64_t start, uint64_t end);
/* T0: saves the chunks that have any, for they cannot be armed. */
int spare_save(snap_pump *p);

/* written.c */
/* Lists the chunks of covered memory that were written since they were protected, or held something then,
 * and protects them anew, so that their copies are to be made after it; serves meanwhile. */
int written_list(snap_pump *p);
/* The same at T0: nothing is protected any more. Serves unless the pump is held. */
int written_look(snap_pump *p);
/* By who waits for it, with the lock: he takes his share of it. false: none goes on; the lock was kept. */
bool written_assist(snap_pump *p);
/* The next part to look at of what can be covered: [*start, *cursor) of *w, run-time addresses, at or above *cursor,
 * which is moved behind it. 1, 0: there is none, or -errno. */
int written_next(const snap_pump *p, uint64_t *cursor, snap_window *w, uint64_t *start);
/* Lists what was written in [start, end) of w, covered or not: what is known of it. */
int written_part(snap_pump *p, const snap_window *w, uint64_t start, uint64_t end, bool protect);

/* listed_faults.c */
/* A look at all that is covered begins. */
void faults_mark(snap_pump *p);
/* The same of what may have been written since the last looks, if that is known: protects it, and lists it. */
int faults_protect(snap_pump *p);
/* At T0: 1 if chunks with pages that may have been written are listed now; 0: all must be looked at. */
int faults_list(snap_pump *p);
/* After T0: whether what is in [start, end), run-time addresses, is not known to be as at T0, and can only be looked
 * at while it is there. */
bool faults_unsure(const snap_pump *p, uint64_t start, uint64_t end);
/* After T0, before anything loses its protection: 0 if the list was complete; -ENODATA. */
int faults_prove(snap_pump *p);

/* ahead.c */
/* One slice of a round that copies, or only protects; 1 when the round is over. -ENOBUFS: there is no
 * room for its copies now. */
int ahead_slice(snap_pump *p, bool copies);

/* settle.c */
/* See snap_pump_order_settle. */
int settle(snap_pump *p, uint64_t most, int trust);
/* What of it can be done where writers pass while it is not known yet whether the windows are those of T0, nor
 * what to trust; as far as it can. */
void settle_ahead(snap_pump *p);

/* pace.c */
/* A piece of what nobody waits for has been done since then. */
void pace_spent(snap_pump *p, uint64_t began_ns, uint64_t bytes);
/* For how many ns nothing of that kind is to be begun. `hurried`: whatever the user's limit. */
uint64_t pace_left(snap_pump *p, bool hurried);

/* queue.c */
/* A staging slot, or for the urgent a slot of the spill file; NO_PLACE when there is none. For some pages
 * of a chunk (0: it is to be nobody else's) perhaps a slot in which others are used. */
int64_t take_place(snap_pump *p, uint16_t pages, bool urgent, bool no_spill);
/* A slot of the spill file, NO_PLACE if there is no file. */
int64_t take_spill(snap_pump *p);
void give_place(snap_pump *p, int64_t place);
/* Staging slots that the not urgent may take; and as many as these could ever be. */
uint64_t free_places(snap_pump *p);
uint64_t most_places(const snap_pump *p);
/* However many are cells, so many slots are left to the urgent. */
static inline uint64_t least_reserve(const snap_pump *p)
{
    return p->slots / 16;
}
/* Hands a copy to the consumers; it replaces those before it. Caller holds the lock. */
int enqueue(snap_pump *p, const snap_saved *saved);

/* early.c */
/* Whether a page of a chunk of w can be saved by itself. */
bool may_be_early(const snap_window *w, const chunk *c);
/* Where writers wait for nobody: keeps these pages of a chunk as they are now, in place of what was kept of
 * them. -ENOBUFS: there is no room; -EAGAIN: not all of them can be read. */
int early_hold(snap_pump *p, uint32_t space, uint64_t address, chunk *c, uint16_t pages);
/* Cells for the next: memory that is touched for the first time costs as much as what it is for. */
void early_ready(snap_pump *p);
/* The same of what is lacking of all listed chunks, while the target stands still. */
int early_hold_listed(snap_pump *p);
/* What is kept of these pages is worth nothing. */
void early_drop(snap_pump *p, chunk *c, uint16_t pages);
/* After T0: hands all chunks with pages that are kept to the consumers. */
int early_hand_out(snap_pump *p);
/* Saves the page at a space address, tentative; 0 as well if none is needed. -ENOBUFS: there is
 * no room for it; -EAGAIN as for save_chunk. */
int save_early(snap_pump *p, uint32_t space, uint64_t at);
/* What is tentative is T0, and from now on a part of the chunk; or it is forgotten. */
void early_publish(snap_pump *p, chunk *c, const tentative *t);
void early_forget(snap_pump *p, const tentative *t);
/* Puts those of `pages` that are kept to where they are in the chunk at `out`. -EIO: the spill file. */
int early_put(const snap_pump *p, const chunk *c, uint16_t pages, uint8_t *out);
/* The chunk is saved. */
void early_done(snap_pump *p, chunk *c);
/* When cells are getting scarce: a chunk whose pages have some, the first of all; false: there is none. */
bool early_first(snap_pump *p, place *first);

/* save.c */
/* Copies pages of the chunk at a space address to where they are in the chunk at `out`, if all still
 * carry their mark (else -EAGAIN), from within [*low, *high). */
int copy_pages(snap_pump *p, uint32_t space, uint64_t address, uint16_t pages, uint8_t *out, uint64_t *low,
               uint64_t *high);
/* Whether of this chunk, which is missing some pages, only those are to be copied: a patch. */
bool is_patched(const chunk *c);
/* After T0: the pages of an UNSAVED chunk that its copy will have. Each has to keep its mark until then, or
 * be saved early, though there be a good copy of it: a chunk that lacks many pages is copied whole. */
uint16_t pages_to_save(uint32_t space, const chunk *c);
/* Where these pages of a chunk of private memory are: at[i] is the run-time address of the i-th. -EAGAIN:
 * not all are in windows. */
int find_pages(const snap_pump *p, uint32_t space, uint64_t address, uint16_t pages, uint64_t *at);
/* As copy_pages, protected or not. */
int copy_as_is(snap_pump *p, uint32_t space, uint64_t address, uint16_t pages, uint8_t *out);
/* Copies an unsaved chunk with wanted pages and keeps it tentative. urgent: may use the reserve of
 * staging, then the spill file, then waits; else -ENOBUFS when staging runs low. -EAGAIN: it is
 * not as it was at T0 just now, an event will tell; -ESRCH: the address space is gone. */
int save_chunk(snap_pump *p, uint32_t space, uint64_t address, bool urgent);
/* The same while the target is stopped: nothing can have changed, it is published at once. Only its
 * bare pages, if there is a good copy of the others. */
int save_stopped(snap_pump *p, uint32_t space, uint64_t address);
/* The same, if the chunk there is UNSAVED and wants any pages. */
int save_now(snap_pump *p, uint32_t space, uint64_t address, chunk *c);
/* A release succeeded: no change of the address space is unread, the tentative copies are T0. */
int save_publish(snap_pump *p);
/* Forgets tentative copies that touch [start, end) (run-time): they will be saved again. -ENODATA
 * when one cannot. */
int save_forget(snap_pump *p, uint64_t start, uint64_t end);
/* The memory of [start, end) (run-time) is discarded or unmapped: tentative copies of it are the
 * only ones. */
void save_last(snap_pump *p, uint64_t start, uint64_t end);
/* Shared objects can be written unseen from now on: the same of all tentative copies of them. */
void save_last_objects(snap_pump *p);
uint64_t now_ns(void);
/* Until a place may have come free; false: it is to stop. */
bool wait_for_place(snap_pump *p);
/* Lets a thread run that may be on this processor; sched_yield would not, for who runs before it. */
void breathe(void);
/* One more chunk of the space is unsaved, or (-1) one less. */
void count_unsaved(snap_pump *p, uint32_t space, int more);
/* Tells the watchdog that this thread goes on. */
void beat(snap_pump *p);

/* serve.c */
/* Reads and answers messages that wait. *any: whether there was one. */
int serve(snap_pump *p, bool *any);
/* Releases what is armed of the space addresses [from, to). */
int release_space(snap_pump *p, uint32_t space, uint64_t from, uint64_t to);
/* Lets through writes to the page at a run-time address, ahead of T0. */
int open_page(snap_pump *p, uint64_t address);
/* Saves the unsaved chunks among the space addresses [from, to). -EAGAIN: not all could be. */
int save_space(snap_pump *p, uint32_t space, uint64_t from, uint64_t to);
/* Notes why T0 is impossible now. -> -ENODATA */
int lost(snap_pump *p, uint64_t bytes, uint64_t address, uint32_t reason);

/* children.c */
/* The target has forked; `fd`, which is ours to close, is the userfaultfd of the child. */
int child_born(snap_pump *p, int fd);
/* Lets the children go that have nothing to wait for any more, or all. */
void children_go(snap_pump *p, bool all);
/* When run has returned: the descriptors of all are closed. */
void children_end(snap_pump *p);

/* peek.c */
/* Saves what is unsaved of all shared objects. -EAGAIN: not all could be. */
int save_objects(snap_pump *p);
/* An event comes next and it has not been read, so its caller does not go on yet: what it announces
 * is not yet done (madvise), or nothing has been done with it (mremap). If that is to discard
 * memory, or to map shared memory once more, it is saved now: /proc/PID/task/TID/syscall shows the
 * call. */
int save_before_event(snap_pump *p);
/* Whether a mremap that tells of [from, from + length) leaves a mapping of a shared object that is
 * not protected, so that nothing tells of writes to it: a second one when it moves nothing (old size
 * 0), the old place with MREMAP_DONTUNMAP (which no event tells, but the system call). */
bool makes_alias(const snap_pump *p, uint64_t from, uint64_t length);
/* Whether the run-time range [from, to), of which an event tells that it goes, shows that a mapping
 * of a shared object had grown (which no event tells) over what another shows: it goes on behind the
 * end of the mapping as it is known. */
bool had_grown(const snap_pump *p, uint64_t from, uint64_t to);

#endif
