/* Missing pages to the threads that wait for them, from the message of the userfaultfd to the page without a
 * step outside of C, and between them those that nobody waits for: what is to be had of the store without LMDB
 * (stored.h), and lies in the image where it belongs in the process. All else is left to the caller, whose
 * ledger has the say. */
#ifndef SNAP_FAST_PATH_H
#define SNAP_FAST_PATH_H

#include <stdint.h>

#include "stored.h"
#include "uffd.h"

/* Faults in a turn. */
#define SNAP_FAST_FAULTS 64
/* Chunks that a decoder is asked for at once, when they follow each other. */
#define SNAP_FAST_RUN 4
/* Beside the number of a slot: the fast path has asked. */
#define SNAP_FAST_OWN 2147483648u

typedef struct {
    uint64_t start, end;
} snap_fast_range;

typedef struct {
    uint32_t faults;   /* that were served */
    uint32_t filled;   /* pages that were put in place */
    int32_t error;     /* of the userfaultfd, 0 or -errno: -ESRCH when the process is gone */
    uint32_t others;   /* of the other descriptors that can be read, or have an error */
    uint32_t lost;     /* bit i: decoder i has ended */
    uint32_t streams;  /* decoders have something to bring yet */
    uint32_t count;    /* of `ranges`: what is not missing any more */
    uint64_t chunks[64]; /* of each fault, the address */
    snap_fast_range ranges[640];
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

/* From here on what nobody waits for is brought too: `count` decoders are asked by 16 bytes to requests[i] (u32
 * slot, u32 chunks, u64 address of the first), and answer by 16 from answers[i] (u32 slot, u32 chunks that were
 * decoded, u16 the pages present of each), which does not block; -1: there is no decoder i. The `each` slots of
 * decoder i begin with i * each; a slot is SNAP_FAST_RUN chunks of `memory`, and in requests and answers it has
 * SNAP_FAST_OWN beside its number: what somebody else asks is answered to him. -> 0 or -EINVAL: too many. */
int snap_fast_path_stream(snap_fast_path *fast, char *memory, uint32_t count, uint32_t each, const int *requests,
                          const int *answers);
/* Asks for nothing more, and forgets what it has asked for. */
void snap_fast_path_alone(snap_fast_path *fast);
/* Chunks that come before all others, by their addresses. -> 0 or -ENOMEM: they do not. */
int snap_fast_path_first(snap_fast_path *fast, const uint64_t *addresses, uint32_t count);

/* Waits for a message, for a decoder, or for another descriptor, timeout_ms at most (-1: for ever). Reads up to
 * `most` (64 at most) messages, serves the faults among them, and gives those threads grace_us to run; then puts a
 * run in place that is decoded, all of it when somebody waits again already (or all that is missing would come by
 * faults), else until somebody does. And so on until the caller is needed: another descriptor can be read, a
 * decoder has ended, nothing came in time, `turn` is full, there is nothing to stream, an error. -> how many
 * messages are left at `messages` for the caller: faults that it must serve, or everything that was read with an
 * event. */
uint32_t snap_fast_path_turn(snap_fast_path *fast, int timeout_ms, uffd_message *messages, uint32_t most,
                             uint32_t grace_us, snap_fast_turn *turn);

#endif
