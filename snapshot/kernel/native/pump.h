/* The memory of a take: copied ahead of T0 while the target runs, settled at T0, the rest saved at
 * its first write or by the sweep. docs/architecture.md tells the order that makes the image exact.
 *
 * A pump belongs to one process. Life: new; run in a thread of its own (it blocks, and takes no lock
 * that Python holds) while other threads call next and done. Whenever the target is stopped: hold,
 * plan if its map has changed, release. Ahead of T0: order and await any number of rounds. T0: hold
 * with the target stopped, plan if its map has changed, settle, go. free when run has returned.
 *
 * Functions return 0 or a count, or -errno. `space address`: where a byte is in the image: the
 * address at T0 for private memory, the offset for a shared object.
 */
#ifndef SNAP_PUMP_H
#define SNAP_PUMP_H

#include "exits.h"
#include "fault_list.h"
#include "watchdog.h"

#include <stddef.h>
#include <stdint.h>

/* Why the memory of T0 can no longer be had (snap_pump_counters.lost_reason). */
#define SNAP_LOST_NOTHING 0
#define SNAP_LOST_UNMAP 1    /* unmapped before it was saved: munmap, brk, mmap or mremap over it */
#define SNAP_LOST_REMOVE 2   /* discarded before it was saved, by a call that was not seen coming */
#define SNAP_LOST_UNARMED 3  /* lost its protection without any event */
#define SNAP_LOST_GONE 4     /* the process exited or called exec */
#define SNAP_LOST_STALLED 5  /* none: the consumers took nothing for too long, and writers waited */
#define SNAP_LOST_SHARED 6   /* shared memory was mapped once more, by mremap, before it was saved */
#define SNAP_LOST_GROWN 7    /* the same by a mapping of it that grew in place: perhaps written unseen */
#define SNAP_LOST_UNLISTED 8 /* perhaps written before T0 by who is in no list of faults */

typedef struct snap_pump snap_pump;

/* Memory of the target at [start, end) that is the bytes from space address `at`. Private memory
 * (space < 2^16) has at == start when it is planned. */
typedef struct {
    uint64_t start, end; /* page aligned */
    uint64_t at;
    uint32_t space;
    int32_t object; /* descriptor of the shared object to read from at offset `at`, or -1 */
    uint32_t armed; /* it can be protected; otherwise it is copied at T0, while all stands still */
    uint32_t whole; /* every page belongs to the image, also those that are the file's */
    uint32_t huge;  /* 2 MiB, the size of its pages, when it is private and of hugetlbfs; else 0 */
    uint32_t fickle; /* its pages may lose their protection without an event (KSM, MADV_FREE) */
} snap_window;

/* A saved chunk on its way to the store. A later one replaces an earlier one of the same address;
 * the two are never with the consumers at once. */
typedef struct {
    uint64_t address; /* space address of the chunk, 64 KiB aligned */
    int64_t place;    /* >= 0: staging slot; < 0: slot -place-1 of the spill file */
    uint32_t space;
    uint32_t pages;   /* bitmap: page i belongs to the image; where the others would be is anything.
                         0: nothing of the chunk belongs to the image any more, and there is no place */
    uint32_t patch;   /* 0: all pages are here. SNAP_PATCH and a bitmap: only these are, the others
                         are those of the chunk that was handed out before */
} snap_saved;
#define SNAP_PATCH 65536

typedef struct {
    uint64_t armed_bytes;   /* pages that were protected at T0 */
    uint64_t wanted_bytes;  /* what the image has to hold */
    uint64_t saved_bytes;   /* copied so far, ahead of T0 too: a chunk that is copied again counts again */
    uint64_t ahead_bytes;   /* of that, copied ahead of T0 */
    uint64_t stopped_bytes; /* of that, copied while the target was stopped */
    uint64_t remainder_bytes; /* what was not saved when T0 came */
    uint64_t faults;        /* fault messages */
    uint64_t ahead_faults;  /* of them, before T0 */
    uint64_t fault_chunks;  /* chunks saved because of a fault or an event, or while the end waited */
    uint64_t fault_pages;   /* pages saved because of a fault, before their chunk */
    uint64_t sweep_chunks;  /* chunks saved by the background sweep, ahead of T0 too */
    uint64_t spilled_chunks;
    uint64_t events;        /* remap, remove, unmap and fork messages */
    uint64_t changes;       /* of them, those that took memory out of the plan */
    uint64_t forks;         /* children of which an event told */
    uint64_t forks_ahead;   /* of them, before T0 */
    uint64_t objects_left;  /* chunks of shared objects that were not saved when T0 was settled */
    uint64_t stalls;        /* times a writer had to wait because staging and spill were full */
    uint64_t peak_slots;    /* most staging slots in use at once */
    uint64_t looked_chunks; /* at T0 */
    uint64_t listed;        /* 1: at T0 only what snap_pump_list lists was looked at */
    uint64_t missed_pages;  /* of what was not looked at, with `verify`: others than were known */
    uint64_t missed_address; /* the chunk of the first of them; what of it was found: */
    uint64_t missed_found;   /* want, bare and mask, */
    uint64_t missed_known;   /* and known: want, kept, bare, 16 bits each, state and listed */
    uint64_t lost_bytes;
    uint64_t lost_address;
    uint32_t lost_reason;   /* SNAP_LOST_* */
    uint32_t stale;         /* the windows are not those of the target any more: plan before settle */
} snap_pump_counters;

/* What a round did. */
typedef struct {
    uint64_t copied_chunks;
    uint64_t copied_bytes;
    uint64_t next_chunks; /* of which is known that they were written since: work for another round */
    uint64_t next_bytes;  /* of them, those that were let through, and are not protected any more */
    uint64_t written_bytes; /* where writers pass: written since the last look, found when it began */
    uint32_t outrun;      /* it was given up: writers are too fast for it */
} snap_pump_round;

/* pid: the target; pagemap, mem: /proc/PID/pagemap and /proc/PID/mem, open before T0; spill: a file
 * that may grow, or -1 for none; staging: slots * 64 KiB of memory that the caller keeps until
 * snap_pump_free. The descriptors stay the caller's. The pump is held: until `release` its run stands
 * still. */
int snap_pump_new(int pid, int pagemap, int mem, int spill, void *staging, uint64_t slots,
                  snap_pump **pump);
/* Before the first plan, held. uffd: of the target, handshake done, O_NONBLOCK, telling of forks
 * (EVENT_FORK) if shared objects will be armed; uffdinfo: /proc/self/fdinfo/<uffd>. */
void snap_pump_attach(snap_pump *pump, int uffd, int uffdinfo);
void snap_pump_free(snap_pump *pump);
/* Before run. It beats the watchdog (may be NULL), gives up when a writer of the target would have
 * to wait for longer than stall_ms for the consumers to make room, and ends `exits` (may be NULL) when
 * nothing is unsaved any more, or nothing more will be saved. */
void snap_pump_watch(snap_pump *pump, snap_watchdog *watchdog, snap_exits *exits, int stall_ms);

/* Before the first release, if `uffd` has WP_UNPOPULATED and snap_pagemap_tells: what was protected in a
 * round need not be looked at again at T0 unless a fault or an event tells of it. verify: it is all the
 * same, and the two are compared (missed_pages). */
void snap_pump_cover(snap_pump *pump, int verify);

/* Before the first release, if `uffd` has WP_ASYNC, and what snap_pump_cover needs: writers wait for nobody,
 * and nothing is told of them. No shared object, and nothing of hugetlbfs, may be armed. What has no good
 * copy at T0 is copied then and there, or settle fails with -E2BIG; after it nothing can be lost. */
void snap_pump_pass(snap_pump *pump);

/* Where writers pass, between two orders: who writes is listed there from now on, until run has returned. After two
 * more looks T0 can do with that list, if there is a chunk in it for pages_each pages at most (to look at so many of
 * all takes as long), and no event has come for quiet_ms (who unmaps memory mostly does so again). It is proved
 * after T0, and snap_pump_await_settled tells of that like of something unsaved: what goes until then is lost. */
void snap_pump_list(snap_pump *pump, const snap_fault_ring *ring, uint64_t pages_each, int quiet_ms);

/* Before the first release: where the kernel writes when any thread of the target ends (set_tid_address(2)),
 * in a C library that has one place for all; known without this is only a place beside the robust list
 * of a thread (get_robust_list(2)), as glibc has it. */
void snap_pump_clears(snap_pump *pump, uint64_t address);
int snap_pump_has_robust_list(int tid);

/* Before run: at most so many bytes a second are copied that nobody waits for, and not more than so
 * many percent of a processor are used by all threads of this process; 0: no limit. What a writer, or a
 * target at its end, waits for is copied at once. */
void snap_pump_pace(snap_pump *pump, uint64_t bytes, unsigned percent);

/* All windows, in place of those planned before, and registers what will be armed. With the target
 * stopped, or `registered` by the caller, and the pump held: to register a range that is not, or no
 * longer, a whole mapping would split one for a moment, and a mremap of the target across the split
 * would fail. What was copied stays copied. A window that cannot be registered is an error, with its address in *address (EBUSY: another
 * userfaultfd owns it). */
int snap_pump_plan(snap_pump *pump, const snap_window *windows, size_t count, int registered,
                   uint64_t *address);

/* Serves faults and events until everything is saved. Ahead of T0 it carries out what is ordered in
 * between. In the end it releases what is armed and closes the uffd: its number, which the caller has
 * still to close, is something else then, and the watchdog knows of none.
 * 0: the image is complete. -ENODATA: bytes of T0 were lost, see the counters. -ECANCELED:
 * snap_pump_stop. Anything else: unexpected. In every case the queue ends for snap_pump_next. */
int snap_pump_run(snap_pump *pump);
/* From any thread: run returns soon. */
void snap_pump_stop(snap_pump *pump);

/* Orders to a running pump, one at a time, ahead of T0; each is followed by await until it is done.
 * round: protect what is not, copy what has no copy of a time since when it was protected.
 * A round that is not `patient` is given up when writers undo most of what it does.
 * last_round: the same, whatever the pace.
 * listed_round: where writers pass, the same of what is listed (snap_pump_list) and may not have been looked at
 * since; of nothing, where that is not known.
 * written: where writers pass, only protect what was written, and count it.
 * arm: only protect it, so that T0 finds little to do; it is saved afterwards. `throttled`: who writes meanwhile
 * is let through once in a millisecond.
 * open: let through writes to the pages at these addresses, as if somebody had tried them.
 * look: with the target stopped, where writers pass: find what was written, and what else has to be looked at,
 * and copy it if it is at most `most` bytes. T0 does that otherwise.
 * hold: answer all that waits, then stand still until release or go; plan and settle meanwhile. May be
 * given while it still looks, or has not begun to: who awaits it then takes his share of that. */
int snap_pump_order_round(snap_pump *pump, int patient);
int snap_pump_order_last_round(snap_pump *pump);
int snap_pump_order_listed_round(snap_pump *pump);
int snap_pump_order_written(snap_pump *pump);
int snap_pump_order_arm(snap_pump *pump, int throttled);
int snap_pump_order_open(snap_pump *pump, const uint64_t *addresses, size_t count);
int snap_pump_order_look(snap_pump *pump, uint64_t most);
/* The caller takes his share of a look, if one goes on. */
void snap_pump_assist(snap_pump *pump);
/* Before order_look: run(of) is to come after that, in the same thread, unless somebody waits for it before:
 * he makes it himself. It must wait for nothing that the target may hold while it waits for its events to be
 * read. */
void snap_pump_errand(snap_pump *pump, void (*run)(void *), void *of);
void snap_pump_await_errand(snap_pump *pump);
/* It shall not be begun any more; waits if it has been. */
void snap_pump_forget_errand(snap_pump *pump);
int snap_pump_order_hold(snap_pump *pump);
/* Before settle: to the pages at these addresses the caller may have written since the look, or the kernel
 * for calls that it had the target make. */
int snap_pump_touched(snap_pump *pump, const uint64_t *addresses, size_t count);
/* 0: the order is done; -ETIMEDOUT: not within timeout_ms; -EPIPE: run has ended. *round may be
 * NULL. */
int snap_pump_await(snap_pump *pump, int timeout_ms, snap_pump_round *round);

/* T0. With the target stopped and the pump held, whose thread does it. What has no copy that is still
 * good is the remainder. A remainder of at most `most` bytes is copied now, of a larger one only what
 * cannot be armed; the other is armed. `trust`, of SNAP_TRUST_*: what of before is good. */
#define SNAP_TRUST_COPIES 1 /* no device has written past the page tables */
#define SNAP_TRUST_COVER 2  /* no protection has gone without an event: what is covered is not looked at */
int snap_pump_order_settle(snap_pump *pump, uint64_t most, int trust);
/* Waits for it. 1: something is armed and unsaved now, or to be proved; 0: nothing is. -ESTALE: see the counters; -EPIPE: run
 * has ended. */
int snap_pump_await_settled(snap_pump *pump);
/* The pump that is held goes on: after T0, or still ahead of it. */
void snap_pump_go(snap_pump *pump);
void snap_pump_release(snap_pump *pump);

/* When run has returned: whether [start, end) of the target is known as mapping a shared object. One
 * that is not has come, or grown, after T0, and no event told of it. */
int snap_pump_shows(snap_pump *pump, uint64_t start, uint64_t end);

/* Takes up to `most` saved chunks, waiting up to timeout_ms for the first. -> count, 0 at the
 * timeout, -EPIPE when run has ended (or, without one, snap_pump_end was called) and all were taken. */
int snap_pump_next(snap_pump *pump, snap_saved *out, int most, int timeout_ms);
/* The chunks are in the store: their places are free again. */
void snap_pump_done(snap_pump *pump, const snap_saved *saved, int count);
/* No run will come: the queue ends. */
void snap_pump_end(snap_pump *pump);

void snap_pump_stats(snap_pump *pump, snap_pump_counters *out);

#endif
