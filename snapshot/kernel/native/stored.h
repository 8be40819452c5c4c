/* The chunks of an image, read from the data file of its store without LMDB and decoded: those that have blocks
 * (blocks.h), and deltas (delta.h) whose bases have. For the others, and for what does not match its checks or has
 * moved, the caller asks the image. */
#ifndef SNAP_STORED_H
#define SNAP_STORED_H

#include <stdint.h>

#include "blocks.h"
#include "btree_places.h"

/* Chunk i is at addresses[i], ascending, its value at places[i], and its index entry, of so many bytes, at
 * entries + i * entry: its number at 8, its digest at 16. */
typedef struct {
    const uint64_t *addresses;
    const btree_place *places;
    const char *entries;
    uint32_t count, entry;
} snap_chunks;

/* `store` is the data file; `bases` the chunks that deltas are made against: that of a delta is at its number
 * times 65536. What they point to must stay there. For one thread at a time. NULL: no memory, or no blocks
 * here. */
typedef struct snap_stored snap_stored;
snap_stored *snap_stored_new(int store, const snap_chunks *chunks, const snap_chunks *bases);
void snap_stored_free(snap_stored *stored);

uint32_t snap_stored_count(const snap_stored *stored);
uint64_t snap_stored_address(const snap_stored *stored, uint32_t chunk);
/* The first chunk that is not below `address`; the count of all when there is none. */
uint32_t snap_stored_from(const snap_stored *stored, uint64_t address);

/* As snap_blocks_decode. 0 also: it is not to be had in this way. */
uint32_t snap_stored_decode(snap_stored *stored, uint32_t chunk, uint32_t page, char *to, uint32_t *present);
/* Goes on with the last one to its end, as snap_blocks_finish. */
int snap_stored_finish(snap_stored *stored, char *to);
/* `chunks` chunks as a whole, one behind the other from `address` on, to `to`; present: bitmap of the pages of
 * each that belong to the image. -> how many, up to the first that is not to be had. */
uint32_t snap_stored_run(snap_stored *stored, uint64_t address, uint32_t chunks, char *to, uint16_t *present);

#endif
