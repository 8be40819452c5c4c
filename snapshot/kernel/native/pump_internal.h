/* Shared by ledger.c, stopped.c, save.c, serve.c and pump.c: the parts of a pump. */
#ifndef SNAP_PUMP_INTERNAL_H
#define SNAP_PUMP_INTERNAL_H

#include "pump.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

#define PAGE UINT64_C(4096)
#define CHUNK UINT64_C(65536)
#define CHUNK_PAGES 16
#define STEP UINT64_C(0x200000) /* sweep and release: 2 MiB, so that huge pages stay huge */

enum { UNSAVED = 0, TENTATIVE = 1, SAVED = 2 };

/* A stretch of one space with one state per chunk. */
typedef struct {
    uint32_t space;
    uint64_t start;
    uint64_t chunks;
    uint16_t *want; /* bitmap of pages that hold something at T0 */
    uint8_t *state;
    bool has_unarmed;
    size_t first_window, windows; /* in pump->windows */
} area;

/* Where a piece of an area is in the target's address space now. */
typedef struct {
    uint64_t start, end; /* run-time addresses */
    uint64_t at;         /* space address of start */
    uint64_t unit;
    uint32_t area;
    int object;
    bool armed;
} window;

/* A copied chunk that may not be published before a fence has passed (see save.c). */
typedef struct {
    snap_saved saved;
    uint32_t area;
    uint64_t index;
    uint64_t low, high; /* the run-time addresses that it was read from lie in [low, high) */
} tentative;

typedef struct {
    uint64_t start, end;
} range;

/* A growing array: ptr, count, capacity. */
#define VECTOR(type) \
    struct {         \
        type *at;    \
        size_t count, capacity; \
    }

struct snap_pump {
    int pid, uffd, uffdinfo, pagemap, mem, spill;
    int wake; /* eventfd: a slot came free, or stop */
    uint8_t *staging;
    uint64_t slots;
    uint8_t *bounce; /* one chunk, on its way to the spill file */

    VECTOR(area) areas;
    VECTOR(window) windows;  /* by (area, at) */
    uint32_t *by_start;      /* indices of windows, by start */
    VECTOR(tentative) tentative;
    VECTOR(uint64_t) faults;    /* addresses whose fault is not yet served */
    VECTOR(range) releases;     /* ranges to be released as soon as the kernel lets us */
    uint64_t unsaved_chunks;    /* with wanted pages */
    uint32_t sweep_area;
    uint64_t sweep_chunk;
    uint64_t stuck_since_ns;    /* since when the next chunk is not as it was at T0; 0: it is */
    bool letting_go;            /* nothing is saved any more: faults are released at once */

    atomic_int stop;

    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t ready;
    VECTOR(snap_saved) queue;
    size_t queue_head;
    uint32_t *free_slots;
    uint64_t free_count;
    VECTOR(uint32_t) free_spill;
    uint64_t spill_end;
    bool ended;
    snap_pump_counters counters;
};

/* The address of one more element, or NULL when there is no memory. */
#define VECTOR_PUSH(v) \
    (snap_grow((void **)&(v)->at, &(v)->capacity, (v)->count, sizeof *(v)->at) ? NULL : &(v)->at[(v)->count++])
int snap_grow(void **at, size_t *capacity, size_t count, size_t size);

/* ledger.c */
int ledger_index(snap_pump *p);
window *ledger_find(snap_pump *p, uint64_t address);
/* Position in by_start of the first window that ends above `address`. */
size_t ledger_above(const snap_pump *p, uint64_t address);
/* The first window of area `a` that may hold space address `at` or above; iterate while inside. */
size_t ledger_first(const snap_pump *p, const area *a, uint64_t at);
/* Takes [start, end) out of all windows (unmapped), or moves it by `delta` (mremap). */
int ledger_unmap(snap_pump *p, uint64_t start, uint64_t end);
int ledger_move(snap_pump *p, uint64_t from, uint64_t to, uint64_t length);
/* Wanted bytes of [start, end) (run-time) in chunks that are not at least `state`. */
uint64_t ledger_unsaved(snap_pump *p, uint64_t start, uint64_t end, uint8_t state, uint64_t *where);

/* save.c */
/* Copies an unsaved chunk with wanted pages and keeps it tentative. urgent: may use the reserve of
 * staging, then the spill file, then waits; else -ENOBUFS when staging runs low. -EAGAIN: it is
 * not as it was at T0 just now, an event will tell; -ESRCH: the address space is gone. */
int save_chunk(snap_pump *p, uint32_t area_id, uint64_t index, bool urgent);
/* The same while the target is stopped: nothing can have changed, it is published at once. */
int save_stopped(snap_pump *p, uint32_t area_id, uint64_t index);
/* A release succeeded: no change of the address space is unread, the tentative copies are T0. */
int save_publish(snap_pump *p);
/* Forgets tentative copies that touch [start, end) (run-time): they will be saved again. */
void save_forget(snap_pump *p, uint64_t start, uint64_t end);
uint64_t now_ns(void);

/* serve.c */
/* Reads and answers messages that wait. *any: whether there was one. */
int serve(snap_pump *p, bool *any);
/* Releases what is armed of the space addresses [from, to) of an area. */
int release_space(snap_pump *p, const area *a, uint64_t from, uint64_t to);
/* Notes why T0 is impossible now. -> -ENODATA */
int lost(snap_pump *p, uint64_t bytes, uint64_t address, uint32_t reason);

#endif
