/* What the two halves of the fast path share: fast_path.c serves who waits, fast_stream.c brings the rest. */
#pragma once
#include <poll.h>
#include <stdbool.h>

#include "chunk_internal.h"
#include "fast_path.h"

enum {
    FAST_DECODERS = 16,
    FAST_SLOTS = 64,
    FAST_OTHERS = 256,
};

typedef struct {
    int requests, answers;
    bool ended;
} fast_decoder;

typedef struct {
    enum { SLOT_FREE, SLOT_ASKED, SLOT_READY } state;
    uint32_t first, chunks; /* a run of chunks that follow each other */
    uint32_t good, done;    /* of them: decoded, dealt with */
    uint16_t present[SNAP_FAST_RUN];
} fast_slot;

struct snap_fast_path {
    snap_stored *stored;
    int uffd;
    /* Of each chunk: the pages that are to come from there, and << 16 those that have come and may be waited for
     * by a message that is still to be read. */
    uint32_t *wanted;
    /* What was decoded with the last page, for when nobody waits; present: 0 when there is nothing. */
    struct { uint32_t chunk, known, present; } rest;
    struct pollfd waits[1 + FAST_DECODERS + FAST_OTHERS]; /* the userfaultfd, decoders, others */
    int other[FAST_OTHERS];
    uint32_t others;

    uint64_t *todo; /* a bit for each chunk of which pages are wanted and nobody was asked for */
    uint32_t todo_count, cursor;
    uint32_t *order, order_count, order_at; /* chunks that come first */
    char *memory;
    uint32_t decoders, each;
    fast_decoder decoder[FAST_DECODERS];
    fast_slot slot[FAST_SLOTS];
    uint32_t ready[FAST_SLOTS], ready_first, ready_count, asked;

    char pages[CHUNK];
};

/* Pages of a chunk are there, or are to be forgotten: on record in `turn`, and not wanted any more. */
void fast_dealt_with(snap_fast_path *fast, uint32_t chunk, uint32_t pages, uint32_t placed, snap_fast_turn *turn);
/* Whether the chunk is to be asked for has changed, unless somebody has been asked for it. */
void fast_note(snap_fast_path *fast, uint32_t chunk, bool todo);
/* Fills the pollfds of decoders. -> how many */
uint32_t fast_stream_waits(snap_fast_path *fast, struct pollfd *waits);
void fast_stream_ask(snap_fast_path *fast);
/* After poll: takes the answers. Who has ended is in turn->lost. */
void fast_stream_hear(snap_fast_path *fast, const struct pollfd *waits, snap_fast_turn *turn);
/* Puts the oldest run in place that is decoded; when not `all` of it must be, only until somebody waits. */
void fast_stream_put(snap_fast_path *fast, bool all, snap_fast_turn *turn);
bool fast_stream_works(const snap_fast_path *fast);
