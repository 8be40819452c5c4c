#define _GNU_SOURCE
#include "stored.h"

#include <stdlib.h>
#include <unistd.h>

#include "chunk_internal.h"

enum { MOST_BYTES = SNAP_BLOCKS_HEADS + CHUNK, DIGEST_AT = 16 };

struct snap_stored {
    snap_blocks *blocks;
    int store;
    uint32_t count, entry;
    const uint64_t *addresses;
    const btree_place *places;
    const char *entries;
    char value[MOST_BYTES];
};

snap_stored *snap_stored_new(int store, uint32_t count, const uint64_t *addresses, const btree_place *places,
                             const char *entries, uint32_t entry)
{
    snap_stored *stored = malloc(sizeof *stored);
    if (!stored)
        return NULL;
    stored->blocks = snap_blocks_new();
    if (!stored->blocks) {
        free(stored);
        return NULL;
    }
    stored->store = store, stored->count = count, stored->addresses = addresses;
    stored->places = places, stored->entries = entries, stored->entry = entry;
    return stored;
}

void snap_stored_free(snap_stored *stored)
{
    if (stored)
        snap_blocks_free(stored->blocks);
    free(stored);
}

uint32_t snap_stored_count(const snap_stored *stored)
{
    return stored->count;
}

uint64_t snap_stored_address(const snap_stored *stored, uint32_t chunk)
{
    return stored->addresses[chunk];
}

uint32_t snap_stored_from(const snap_stored *stored, uint64_t address)
{
    uint32_t low = 0, high = stored->count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (stored->addresses[middle] < address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

uint32_t snap_stored_decode(snap_stored *stored, uint32_t chunk, uint32_t page, char *to, uint32_t *present)
{
    const btree_place *place = &stored->places[chunk];
    if (!place->bytes || place->bytes > MOST_BYTES ||
        pread(stored->store, stored->value, place->bytes, (off_t)place->offset) != (ssize_t)place->bytes)
        return 0;
    const char *digest = stored->entries + (size_t)chunk * stored->entry + DIGEST_AT;
    return snap_blocks_decode(stored->blocks, stored->value, place->bytes, digest, page, to, present);
}

int snap_stored_finish(snap_stored *stored, char *to)
{
    return snap_blocks_finish(stored->blocks, stored->value, to);
}

uint32_t snap_stored_run(snap_stored *stored, uint64_t address, uint32_t chunks, char *to, uint16_t *present)
{
    uint32_t first = snap_stored_from(stored, address), done = 0;
    for (; done < chunks && first + done < stored->count; done++) {
        uint32_t found;
        if (stored->addresses[first + done] != address + (uint64_t)done * CHUNK ||
            snap_stored_decode(stored, first + done, SNAP_ALL_BLOCKS, to + done * CHUNK, &found) != ALL)
            break;
        present[done] = (uint16_t)found;
    }
    return done;
}
