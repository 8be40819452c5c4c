/* All entries of an LMDB database whose keys begin alike, read past LMDB: 131,072 of them in some
 * milliseconds, where a cursor that is asked for one after the other takes half a second.
 *
 * Nothing that a page says can lead out of it or out of the file, but it may be wrong: the caller
 * compares a checksum of what it gets, and asks LMDB when that does not fit.
 */
#ifndef SNAP_BTREE_RANGE_H
#define SNAP_BTREE_RANGE_H

#include <stdint.h>

/* Appends, in order, what follows `prefix` in each key, and its value, to `out`, when that is
 * `entry` bytes long, the only length that is right. Database `name` of transaction `txnid` in the
 * file `fd`; the caller holds a read transaction of that number. -> how many entries, at most
 * `most` (`out` has room for so many), -EAGAIN: the meta page is that of another transaction;
 * -EBADMSG: the pages are not as they must be, or there are more; another -errno. */
int64_t btree_range(int fd, uint32_t page_size, uint64_t txnid, const char *name,
                    const uint8_t *prefix, uint32_t prefix_length, uint32_t entry, uint8_t *out,
                    uint64_t most);

/* The first 8 bytes of each of `count` entries, a big endian number, into `numbers`. -> all of them
 * or-ed together. */
uint64_t btree_numbers(const uint8_t *entries, uint32_t entry, uint64_t count, uint64_t *numbers);

#endif
