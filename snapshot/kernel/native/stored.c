#define _GNU_SOURCE
#include "stored.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bytes_internal.h"
#include "chunk_internal.h"
#include "delta_internal.h"

enum { MOST_BYTES = SNAP_BLOCKS_HEADS + CHUNK, NUMBER_AT = 8, DIGEST_AT = 16 };

struct snap_stored {
    snap_blocks *blocks, *others; /* whose frame goes on, and for those that are read at once */
    int store;
    snap_chunks chunks, bases;
    bool is_delta; /* the last one */
    bool has_base; /* its base has been begun */
    delta delta;
    uint32_t base;
    char value[MOST_BYTES], base_value[MOST_BYTES], under[CHUNK], own[CHUNK];
};

snap_stored *snap_stored_new(int store, const snap_chunks *chunks, const snap_chunks *bases)
{
    snap_stored *stored = malloc(sizeof *stored);
    if (!stored)
        return NULL;
    stored->blocks = snap_blocks_new();
    stored->others = snap_blocks_new();
    stored->store = store, stored->chunks = *chunks, stored->bases = *bases;
    if (stored->blocks && stored->others)
        return stored;
    snap_stored_free(stored);
    return NULL;
}

void snap_stored_free(snap_stored *stored)
{
    if (stored) {
        snap_blocks_free(stored->blocks);
        snap_blocks_free(stored->others);
    }
    free(stored);
}

uint32_t snap_stored_count(const snap_stored *stored)
{
    return stored->chunks.count;
}

uint64_t snap_stored_address(const snap_stored *stored, uint32_t chunk)
{
    return stored->chunks.addresses[chunk];
}

static uint32_t from(const snap_chunks *chunks, uint64_t address)
{
    uint32_t low = 0, high = chunks->count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (chunks->addresses[middle] < address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

uint32_t snap_stored_from(const snap_stored *stored, uint64_t address)
{
    return from(&stored->chunks, address);
}

static const char *entry_of(const snap_chunks *chunks, uint32_t chunk)
{
    return chunks->entries + (size_t)chunk * chunks->entry;
}

/* -> bytes of the value; 0: it cannot be had. */
static uint32_t read_value(const snap_stored *stored, const snap_chunks *chunks, uint32_t chunk, char *to)
{
    const btree_place *place = &chunks->places[chunk];
    if (!place->bytes || place->bytes > MOST_BYTES ||
        pread(stored->store, to, place->bytes, (off_t)place->offset) != (ssize_t)place->bytes)
        return 0;
    return place->bytes;
}

/* The pages that the delta has from its base, as many as come with `page`, to `to`. -> their bitmap; 0: they
 * cannot be had. */
static uint32_t from_base(snap_stored *stored, uint32_t page, char *to)
{
    const delta *d = &stored->delta;
    const char *digest = entry_of(&stored->bases, stored->base) + DIGEST_AT;
    uint32_t ours, bytes = read_value(stored, &stored->bases, stored->base, stored->base_value);
    uint32_t known = !bytes ? 0
                            : snap_blocks_decode(stored->blocks, stored->base_value, bytes, digest, page,
                                                 stored->under, &ours);
    if (!known || d->based & ~u16_at(stored->base_value + 2))
        return 0;
    stored->has_base = true;
    delta_copy(known & d->based, stored->under, to);
    return known & d->based;
}

static uint32_t decode_delta(snap_stored *stored, uint32_t chunk, uint32_t page, char *to, uint32_t *present)
{
    const delta *d = &stored->delta;
    uint32_t known = ALL & ~d->based;
    const uint64_t number = u64_at(entry_of(&stored->chunks, chunk) + NUMBER_AT);
    stored->is_delta = true, stored->has_base = false;
    stored->base = from(&stored->bases, number * CHUNK);
    *present = d->present;
    if (stored->base == stored->bases.count || stored->bases.addresses[stored->base] != number * CHUNK)
        return 0;
    if (d->based && (page == SNAP_ALL_BLOCKS || d->based >> page & 1)) {
        const uint32_t found = from_base(stored, page, to);
        if (!found)
            return 0;
        known |= found;
    }
    if (!delta_own_pages(d, stored->others, stored->own, to))
        return 0;
    for (uint32_t i = 0; i < PAGES; i++)
        if ((d->present & ~d->nonzero) >> i & 1)
            memset(to + i * PAGE, 0, PAGE);
    return known;
}

uint32_t snap_stored_decode(snap_stored *stored, uint32_t chunk, uint32_t page, char *to, uint32_t *present)
{
    const uint32_t bytes = read_value(stored, &stored->chunks, chunk, stored->value);
    const char *digest = entry_of(&stored->chunks, chunk) + DIGEST_AT;
    stored->is_delta = false;
    if (!bytes)
        return 0;
    if (delta_open(stored->value, bytes, digest, &stored->delta))
        return decode_delta(stored, chunk, page, to, present);
    return snap_blocks_decode(stored->blocks, stored->value, bytes, digest, page, to, present);
}

int snap_stored_finish(snap_stored *stored, char *to)
{
    if (!stored->is_delta)
        return snap_blocks_finish(stored->blocks, stored->value, to);
    const delta *d = &stored->delta;
    if (stored->has_base && snap_blocks_finish(stored->blocks, stored->base_value, stored->under)) {
        delta_copy(d->based, stored->under, to);
        return 1;
    }
    return !d->based || from_base(stored, SNAP_ALL_BLOCKS, to) == d->based;
}

uint32_t snap_stored_run(snap_stored *stored, uint64_t address, uint32_t chunks, char *to, uint16_t *present)
{
    uint32_t first = snap_stored_from(stored, address), done = 0;
    for (; done < chunks && first + done < stored->chunks.count; done++) {
        uint32_t found;
        if (stored->chunks.addresses[first + done] != address + (uint64_t)done * CHUNK ||
            snap_stored_decode(stored, first + done, SNAP_ALL_BLOCKS, to + done * CHUNK, &found) != ALL)
            break;
        present[done] = (uint16_t)found;
    }
    return done;
}
