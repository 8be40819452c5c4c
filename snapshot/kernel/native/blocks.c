#include "blocks.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "bytes_internal.h"
#include "chunk_internal.h"
#include "xxh64_internal.h"
#include "zstd_internal.h"

enum {
    BLOCK = PAGE * SNAP_BLOCK_PAGES,
    ENTRY = 12, /* u32 end of the block behind the table, u64 check of its bytes */
    CHECK = 8,
};

struct snap_blocks {
    const zstd_functions *zstd;
    void *compressor, *decompressor;
    uint32_t blocks_read, at, done; /* of the frame that is being read, and of what it has given */
};

static void put_u64(char *at, uint64_t x)
{
    x = htobe64(x);
    memcpy(at, &x, sizeof x);
}

static void put_u32(char *at, uint32_t x)
{
    x = htobe32(x);
    memcpy(at, &x, sizeof x);
}

static uint32_t blocks_of(uint32_t pages)
{
    return (pages + SNAP_BLOCK_PAGES - 1) / SNAP_BLOCK_PAGES;
}

/* What header and table of a value take, with their check. */
static uint32_t heads_of(uint32_t pages)
{
    return HEADER + blocks_of(pages) * ENTRY + CHECK;
}

static uint32_t smaller(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

/* One frame with a block for every four pages; its end goes into the table. -> bytes; 0: not smaller. */
static uint32_t compressed(snap_blocks *blocks, const char *payload, uint32_t bytes, int level, char *to,
                           char *table)
{
    const zstd_functions *zstd = blocks->zstd;
    zstd_parameters parameters = zstd->parameters(level, bytes, 0);
    if (zstd->failed(zstd->begin(blocks->compressor, NULL, 0, parameters, bytes)))
        return 0;
    uint32_t done = 0;
    for (uint32_t at = 0; at < bytes; at += BLOCK, table += ENTRY) {
        uint32_t now = smaller(BLOCK, bytes - at);
        size_t (*put)(void *, void *, size_t, const void *, size_t) = at + now < bytes ? zstd->block : zstd->last;
        size_t got = put(blocks->compressor, to + done, bytes - done, payload + at, now);
        if (zstd->failed(got)) /* no room: it is larger than the pages themselves */
            return 0;
        done += (uint32_t)got;
        put_u32(table, done);
    }
    return done;
}

static uint32_t plain_blocks(const char *payload, uint32_t bytes, char *to, char *table)
{
    memcpy(to, payload, bytes);
    for (uint32_t at = 0; at < bytes; at += BLOCK, table += ENTRY)
        put_u32(table, smaller(at + BLOCK, bytes));
    return bytes;
}

static uint32_t encode_one(snap_blocks *blocks, const char *header, const char *payload, uint32_t bytes,
                           bool plain, int level, char *to)
{
    uint32_t heads = heads_of(bytes / PAGE), stored = 0;
    char *table = to + HEADER, *behind = to + heads;
    memcpy(to, header, HEADER);
    if (!plain && bytes)
        stored = compressed(blocks, payload, bytes, level, behind, table);
    to[HEADER_CODEC] = stored ? SNAP_ZSTD_BLOCKS : SNAP_RAW_BLOCKS;
    if (!stored)
        stored = plain_blocks(payload, bytes, behind, table);
    uint32_t from = 0;
    for (uint32_t i = 0; i < blocks_of(bytes / PAGE); i++) {
        uint32_t end = u32_at(table + i * ENTRY);
        put_u64(table + i * ENTRY + 4, snap_xxh64(behind + from, end - from, seed_of(to)));
        from = end;
    }
    put_u64(behind - CHECK, snap_xxh64(to, heads - CHECK, seed_of(to)));
    return heads + stored;
}

int snap_blocks_encode(snap_blocks *blocks, uint32_t n, const char *headers, const char *const *payloads,
                       const uint32_t *bytes, const uint8_t *plain, int level, char *to, uint32_t *lengths)
{
    for (uint32_t i = 0; i < n; i++) {
        const char *header = headers + i * HEADER;
        if (bytes[i] != (uint32_t)__builtin_popcount(u16_at(header + 2)) * PAGE)
            return -1;
        lengths[i] = encode_one(blocks, header, payloads[i], bytes[i], plain[i], level, to);
        to += lengths[i];
    }
    return 0;
}

uint32_t snap_blocks_heads(const char *value, uint32_t bytes, const char *digest)
{
    if (bytes < HEADER + CHECK || (value[HEADER_CODEC] != SNAP_RAW_BLOCKS && value[HEADER_CODEC] != SNAP_ZSTD_BLOCKS))
        return 0;
    uint32_t pages = (uint32_t)__builtin_popcount(u16_at(value + 2)), heads = heads_of(pages), from = 0;
    if (bytes < heads || memcmp(value + HEADER_DIGEST, digest, HEADER_DIGEST_BYTES) ||
        u64_at(value + heads - CHECK) != snap_xxh64(value, heads - CHECK, seed_of(value)))
        return 0;
    for (uint32_t i = 0; i < blocks_of(pages); i++) {
        uint32_t end = u32_at(value + HEADER + i * ENTRY);
        if (end < from)
            return 0;
        from = end;
    }
    return from == bytes - heads ? heads : 0;
}

/* Reads a frame on from where it is, to the end of a block `to_end`, to the CHUNK bytes at `to`. -> whether
 * there are `expected` bytes of it then. */
static bool read_frame(snap_blocks *blocks, const char *frame, uint32_t to_end, char *to, uint32_t expected)
{
    const zstd_functions *zstd = blocks->zstd;
    while (blocks->at < to_end) {
        size_t wanted = zstd->wanted(blocks->decompressor);
        if (wanted == 0 || wanted > to_end - blocks->at)
            return false;
        size_t got = zstd->read(blocks->decompressor, to + blocks->done, CHUNK - blocks->done,
                                frame + blocks->at, wanted);
        if (zstd->failed(got))
            return false;
        blocks->at += (uint32_t)wanted;
        blocks->done += (uint32_t)got;
    }
    return blocks->done == expected;
}

static bool begin_frame(snap_blocks *blocks)
{
    blocks->at = blocks->done = 0;
    return !blocks->zstd->failed(blocks->zstd->begin_reading(blocks->decompressor));
}

/* The first `count` pages of a payload lie at `pages`: each goes to its place in the chunk, and zeros to
 * those that are present and not in the payload. */
static void spread(char *pages, uint32_t count, uint32_t present, uint32_t nonzero)
{
    uint32_t rank = (uint32_t)__builtin_popcount(nonzero);
    if (rank == PAGES)
        return;
    for (uint32_t page = PAGES; page-- > 0;) /* from behind: none goes to where another still lies */
        if (nonzero >> page & 1 && --rank < count)
            memmove(pages + page * PAGE, pages + rank * PAGE, PAGE);
    for (uint32_t page = 0; page < PAGES; page++)
        if ((present & ~nonzero) >> page & 1)
            memset(pages + page * PAGE, 0, PAGE);
}

/* The blocks from where it is up to `end` of a value whose heads are sound, checked; `pages` pages are at `to`
 * then. */
static bool read_up_to(snap_blocks *blocks, const char *value, uint32_t heads, uint32_t end, char *to,
                       uint32_t pages)
{
    const char *table = value + HEADER, *stored = value + heads;
    uint32_t from = blocks->at;
    for (uint32_t i = blocks->blocks_read; i < end; i++) {
        uint32_t next = u32_at(table + i * ENTRY);
        if (snap_xxh64(stored + from, next - from, seed_of(value)) != u64_at(table + i * ENTRY + 4))
            return false;
        from = next;
    }
    blocks->blocks_read = end;
    if (value[HEADER_CODEC] == SNAP_ZSTD_BLOCKS)
        return read_frame(blocks, stored, from, to, pages * PAGE);
    if (from != pages * PAGE)
        return false;
    memcpy(to + blocks->at, stored + blocks->at, from - blocks->at);
    blocks->at = from;
    return true;
}

uint32_t snap_blocks_decode(snap_blocks *blocks, const char *value, uint32_t bytes, const char *digest,
                            uint32_t page, char *to, uint32_t *present)
{
    uint32_t heads = snap_blocks_heads(value, bytes, digest);
    if (!heads)
        return 0;
    *present = u16_at(value);
    uint32_t nonzero = u16_at(value + 2);
    if (nonzero & ~*present)
        return 0;
    uint32_t known = ALL & ~nonzero, count = 0;
    uint32_t all = (uint32_t)__builtin_popcount(nonzero);
    if (page == SNAP_ALL_BLOCKS) {
        count = all;
    } else if (nonzero >> page & 1) {
        uint32_t before = (uint32_t)__builtin_popcount(nonzero & ((1u << page) - 1));
        count = smaller((before / SNAP_BLOCK_PAGES + 1) * SNAP_BLOCK_PAGES, all);
    }
    blocks->blocks_read = 0;
    if (!begin_frame(blocks) || (count && !read_up_to(blocks, value, heads, blocks_of(count), to, count)))
        return 0;
    for (uint32_t i = 0, rank = 0; i < PAGES; i++)
        if (nonzero >> i & 1 && rank++ < count)
            known |= 1u << i;
    spread(to, count, *present, nonzero);
    return known;
}

int snap_blocks_finish(snap_blocks *blocks, const char *value, char *to)
{
    return u16_at(value + 2) == ALL && read_up_to(blocks, value, heads_of(PAGES), blocks_of(PAGES), to, PAGES);
}

int snap_blocks_unpack(snap_blocks *blocks, const char *frame, uint32_t bytes, char *to, uint32_t expected)
{
    return begin_frame(blocks) && read_frame(blocks, frame, bytes, to, expected) &&
           blocks->zstd->wanted(blocks->decompressor) == 0;
}

/* Whether the library does what its names say: it need not have these functions in this form. */
static bool works(snap_blocks *blocks)
{
    enum { TEST = 3 * BLOCK / 2 };
    static char data[TEST], frame[TEST], table[2 * ENTRY], back[CHUNK];
    for (uint32_t i = 0; i < TEST; i++)
        data[i] = (char)(i % 251 * (i / 997));
    uint32_t bytes = compressed(blocks, data, TEST, -2, frame, table);
    return bytes && begin_frame(blocks) && read_frame(blocks, frame, u32_at(table), back, BLOCK) &&
           !memcmp(back, data, BLOCK) && read_frame(blocks, frame, bytes, back, TEST) && !memcmp(back, data, TEST);
}

snap_blocks *snap_blocks_new(void)
{
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    static int tested;
    const zstd_functions *zstd = snap_zstd();
    snap_blocks *blocks = zstd ? calloc(1, sizeof *blocks) : NULL;
    if (!blocks)
        return NULL;
    blocks->zstd = zstd;
    blocks->compressor = zstd->compressor();
    blocks->decompressor = zstd->decompressor();
    pthread_mutex_lock(&mutex);
    if (!tested && blocks->compressor && blocks->decompressor)
        tested = works(blocks) ? 1 : -1;
    pthread_mutex_unlock(&mutex);
    if (tested == 1 && blocks->compressor && blocks->decompressor)
        return blocks;
    snap_blocks_free(blocks);
    return NULL;
}

void snap_blocks_free(snap_blocks *blocks)
{
    if (!blocks)
        return;
    blocks->zstd->free_compressor(blocks->compressor);
    blocks->zstd->free_decompressor(blocks->decompressor);
    free(blocks);
}
