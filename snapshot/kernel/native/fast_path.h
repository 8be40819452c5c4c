/* Missing pages to the threads that wait for them, from the message of the userfaultfd to the page without a
 * step outside of C: what is to be had of the store without LMDB (stored.h), and lies in
 * the image where it belongs in the process. All else is left to the caller, whose ledger has the say. */
#ifndef SNAP_FAST_PATH_H
#define SNAP_FAST_PATH_H

#include <stdint.h>

#include "stored.h"
#include "uffd.h"

/* Faults in a turn. */
#define SNAP_FAST_MOST 64

typedef struct {
    uint64_t address;
    uint32_t pages; /* bitmap of those that are dealt with */
} snap_fast_chunk;

typedef struct {
    uint32_t faults;   /* that were served */
    uint32_t filled;   /* pages that were put in place */
    int32_t error;     /* of the userfaultfd, 0 or -errno: -ESRCH when the process is gone */
    uint32_t in_a_row; /* batches, each of which came within the grace of the one before */
    uint32_t others;   /* of the other descriptors that can be read, or have an error */
    uint32_t count;    /* of `chunks`: two for each fault at most */
    snap_fast_chunk chunks[128];
} snap_fast_turn;

/* `uffd` is a userfaultfd that cannot be waited for (O_NONBLOCK). Neither becomes its own. NULL: no memory. */
typedef struct snap_fast_path snap_fast_path;
snap_fast_path *snap_fast_path_new(snap_stored *stored, int uffd);
void snap_fast_path_free(snap_fast_path *fast);

/* The pages of [start, end) are missing, and their bytes are in the image at the same address. */
void snap_fast_path_allow(snap_fast_path *fast, uint64_t start, uint64_t end);
/* They are not, from here on. */
void snap_fast_path_forbid(snap_fast_path *fast, uint64_t start, uint64_t end);

/* The other descriptors that `turn` waits for, 256 at most. -> 0 or -EINVAL. */
int snap_fast_path_watch(snap_fast_path *fast, const int *descriptors, uint32_t count);
/* Whether there is a message to be read. */
int snap_fast_path_pending(const snap_fast_path *fast);
/* Waits for a message or for another descriptor, timeout_ms at most (-1: for ever). Reads up to `most` (64 at
 * most) messages and serves the faults among them, again and again while more come within `grace_us` of the
 * page that was served last, `row` batches at most. -> how many messages are left at `messages` for the caller:
 * faults that it must serve, or everything that was read with an event. */
uint32_t snap_fast_path_turn(snap_fast_path *fast, int timeout_ms, uffd_message *messages, uint32_t most,
                             uint32_t row, uint32_t grace_us, snap_fast_turn *turn);

#endif
