/* Chunk values of which one page can be had without the rest: the payload is compressed, and
 * checked, in blocks of four pages; docs/image-format.md has the layout. */
#ifndef SNAP_BLOCKS_H
#define SNAP_BLOCKS_H

#include <stdint.h>

#define SNAP_RAW_BLOCKS 3
#define SNAP_ZSTD_BLOCKS 4
#define SNAP_BLOCK_PAGES 4
/* In place of a page: all of them. */
#define SNAP_ALL_BLOCKS 16
/* Header and table of a value with 16 pages. */
#define SNAP_BLOCKS_HEADS 80

/* For one thread at a time. NULL: no memory, or no libzstd that can do it. */
typedef struct snap_blocks snap_blocks;
snap_blocks *snap_blocks_new(void);
void snap_blocks_free(snap_blocks *blocks);

/* Writes n values one behind the other to `to`, which has room for n times SNAP_BLOCKS_HEADS + 65536 bytes.
 * headers: of each 24 bytes, whose codec is filled in. payloads, bytes: the nonzero pages of each, as many
 * as its header says; plain: not to be compressed. lengths: of the values. -> 0 or -1: none is valid. */
int snap_blocks_encode(snap_blocks *blocks, uint32_t n, const char *headers, const char *const *payloads,
                       const uint32_t *bytes, const uint8_t *plain, int level, char *to, uint32_t *lengths);

/* -> bytes of header and table, when `value` says the digest (16 bytes) and they match their check; 0: not a
 * value of blocks that can be trusted. */
uint32_t snap_blocks_heads(const char *value, uint32_t bytes, const char *digest);

/* Decodes a chunk up to the block that page `page` is in, and no further. -> bitmap of the pages that lie at
 * their places of the 64 KiB at `to` then, or do not belong to the image; 0: the value is none of blocks, or
 * damaged. *present: bitmap of those that belong to it. */
uint32_t snap_blocks_decode(snap_blocks *blocks, const char *value, uint32_t bytes, const char *digest,
                            uint32_t page, char *to, uint32_t *present);

/* Goes on where snap_blocks_decode stopped, with the same value and `to`. -> whether all pages are at `to`
 * then; it only can when all are in the payload. */
int snap_blocks_finish(snap_blocks *blocks, const char *value, char *to);

/* A zstd frame like any other, of `expected` bytes, to the 64 KiB at `to`. Whether it is that. */
int snap_blocks_unpack(snap_blocks *blocks, const char *frame, uint32_t bytes, char *to, uint32_t expected);

#endif
