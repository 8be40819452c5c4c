/* Where in an LMDB data file the values of many keys lie, read past LMDB: a value that has pages of its own
 * stays where it is for as long as it is there, a small one until something is put beside it. What is found
 * may be wrong, as with btree_range, or become so: the values must have checks of their own. */
#ifndef SNAP_BTREE_PLACES_H
#define SNAP_BTREE_PLACES_H

#include <stdint.h>

typedef struct {
    uint64_t offset; /* in the file */
    uint32_t bytes;  /* 0: it was not found */
} btree_place;

/* The places of the values of `count` keys, big endian numbers at entries + i * entry, in database
 * `name`, of whatever order. -> 0, or -errno as btree_range: `places` then has none. */
int btree_places(int fd, uint32_t page_size, uint64_t txnid, const char *name, const uint8_t *entries,
                 uint32_t entry, uint32_t count, btree_place *places);

#endif
