/* The fault path of a take: saves each chunk of the target at its first write after T0, and the
 * rest in the background. docs/architecture.md tells the order that makes the image exact.
 *
 * A pump belongs to one process. Life: new, add_area, add_window, then with the target stopped
 * register, scan, save_stopped, arm; then run in a thread of its own (it blocks, and takes no lock that
 * Python holds) while other threads call next and done; free when run has returned.
 *
 * Functions return 0 or a count, or -errno. `space address`: where a byte is in the image: the
 * address at T0 for private memory, the offset for a shared object.
 */
#ifndef SNAP_PUMP_H
#define SNAP_PUMP_H

#include <stdint.h>

/* Why the memory of T0 can no longer be had (snap_pump_stats.lost_reason). */
#define SNAP_LOST_NOTHING 0
#define SNAP_LOST_UNMAP 1    /* unmapped before it was saved: munmap, brk, mmap or mremap over it */
#define SNAP_LOST_REMOVE 2   /* discarded before it was saved, by a call that was not seen coming */
#define SNAP_LOST_UNARMED 3  /* lost its protection without any event */
#define SNAP_LOST_GONE 4     /* the process exited or called exec */

typedef struct snap_pump snap_pump;

/* A saved chunk on its way to the store. */
typedef struct {
    uint64_t address; /* space address of the chunk, 64 KiB aligned */
    int64_t place;    /* >= 0: staging slot; < 0: slot -place-1 of the spill file */
    uint32_t space;
    uint32_t pages;   /* bitmap: page i belongs to the image; the others are zeros here */
} snap_saved;

typedef struct {
    uint64_t armed_bytes;   /* pages protected at T0 that hold something */
    uint64_t wanted_bytes;  /* what the image has to hold */
    uint64_t saved_bytes;   /* of that, saved so far */
    uint64_t stopped_bytes; /* of that, saved while the target was stopped */
    uint64_t faults;        /* fault messages */
    uint64_t fault_chunks;  /* chunks saved because of a fault or an event */
    uint64_t sweep_chunks;  /* chunks saved by the background sweep */
    uint64_t spilled_chunks;
    uint64_t events;        /* remap, remove and unmap messages */
    uint64_t stalls;        /* times a writer had to wait because staging and spill were full */
    uint64_t peak_slots;    /* most staging slots in use at once */
    uint64_t lost_bytes;
    uint64_t lost_address;
    uint32_t lost_reason;   /* SNAP_LOST_* */
    uint32_t running;
} snap_pump_counters;

/* pid: the target; uffd: of the target, handshake done, O_NONBLOCK, or -1 when nothing will be
 * armed; uffdinfo: /proc/self/fdinfo/<uffd>, open, or -1; pagemap, mem: /proc/PID/pagemap and
 * /proc/PID/mem, open before T0; spill: a file that may grow, or -1 for none; staging: slots * 64
 * KiB of memory that the caller keeps until snap_pump_free. The descriptors stay the caller's. */
int snap_pump_new(int pid, int uffd, int uffdinfo, int pagemap, int mem, int spill, void *staging,
                  uint64_t slots, snap_pump **pump);
void snap_pump_free(snap_pump *pump);

/* A stretch of a space, [start, end) chunk aligned; areas of one space do not overlap. -> its id */
int snap_pump_add_area(snap_pump *pump, uint32_t space, uint64_t start, uint64_t end);
/* Memory of the target at [start, end) that is the bytes from space address `at` of an area.
 * armed: it will be protected (registered with the uffd for WP). object: descriptor of the shared
 * object to read from at offset `at`, or -1: read through the process. unit: bytes that are
 * released at once, a power of two (4096; 2 MiB for hugetlb). */
int snap_pump_add_window(snap_pump *pump, int area, uint64_t start, uint64_t end, uint64_t at,
                         int armed, int object, uint64_t unit);
/* After the last window, before anything below. */
int snap_pump_ready(snap_pump *pump);

/* With the target stopped. Registers the armed windows for write-protect faults: from here on
 * events must be read, so run has to follow before the target goes on. EBUSY: another
 * userfaultfd owns *address. */
int snap_pump_register(snap_pump *pump, uint64_t *address);
/* With the target stopped. Finds the pages of every window that hold something: of armed private
 * memory what is present or swapped; of unarmed private memory what is not the file's page; of
 * shared objects what is data. */
int snap_pump_scan(snap_pump *pump);
/* With the target stopped. Every page of [start, end) of the target (within one window) belongs
 * to the image, whatever the scan says (mappings of deleted files). */
int snap_pump_want(snap_pump *pump, uint64_t start, uint64_t end);
/* With the target stopped. Saves now what will not be armed: chunks with wanted pages in unarmed
 * windows; all chunks when `everything`. Slots that run out spill. */
int snap_pump_save_stopped(snap_pump *pump, int everything);
/* With the target stopped, as the last thing: write-protects all armed windows. This is T0. */
int snap_pump_arm(snap_pump *pump);

/* Serves faults and events and sweeps until everything is saved; after a failure it releases what
 * is armed. The caller then closes the uffd at once: until then nobody serves what still faults.
 * 0: the image is complete. -ENODATA: bytes of T0 were lost, see the counters. -ECANCELED:
 * snap_pump_stop. Anything else: unexpected. In every case the queue ends for snap_pump_next. */
int snap_pump_run(snap_pump *pump);
/* From any thread: run returns soon. */
void snap_pump_stop(snap_pump *pump);

/* Takes up to `most` saved chunks, waiting up to timeout_ms for the first. -> count, 0 at the
 * timeout, -EPIPE when run (or, without a run, snap_pump_end) has ended and all were taken. */
int snap_pump_next(snap_pump *pump, snap_saved *out, int most, int timeout_ms);
/* The chunks are in the store: their places are free again. */
int snap_pump_done(snap_pump *pump, const snap_saved *saved, int count);
/* No run will come (everything was saved while stopped): the queue ends. */
void snap_pump_end(snap_pump *pump);

void snap_pump_stats(snap_pump *pump, snap_pump_counters *out);

#endif
