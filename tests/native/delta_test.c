/* Deltas and their bases as snap_stored reads them: whole, page by page, and with bits that have flipped, also
 * such that the check of the delta is right again. A page is what it was, or is not to be had. */
#define _GNU_SOURCE
#include "delta.h"
#include "stored.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"

enum { PAGE = 4096, CHUNK = 16 * PAGE, ENTRY = 32, BASE_AT = 0, DELTA_AT = 2 * CHUNK };

static unsigned seed;
static char before[CHUNK], after[CHUNK], value[SNAP_DELTA_HEADS + CHUNK], base[SNAP_BLOCKS_HEADS + CHUNK];
static char entry[ENTRY], base_entry[ENTRY];
static uint32_t value_bytes, base_bytes, present, nonzero;

static uint32_t any(uint32_t below)
{
    return (uint32_t)rand_r(&seed) % below;
}

static void put16(char *at, uint32_t x)
{
    at[0] = (char)(x >> 8), at[1] = (char)x;
}

static void fill(char *page, uint32_t with)
{
    for (uint32_t at = 0; at < PAGE; at += 4)
        memcpy(page + at, &(uint32_t[]){with * 7919 + at / 64}, 4);
}

static void head(char *to, uint32_t of_these, uint32_t codec)
{
    memset(to, 0, 24);
    put16(to, present), put16(to + 2, of_these);
    to[4] = (char)codec;
    for (int at = 8; at < 24; at++)
        to[at] = (char)any(256);
}

/* The pages in blocks. -> bytes; heads: where the pages begin. */
static uint32_t in_blocks(snap_blocks *blocks, const char *pages, uint32_t which, char *to)
{
    static char payload[CHUNK];
    char header[24];
    uint32_t bytes = 0, length;
    uint8_t plain = any(3) == 0;
    for (uint32_t i = 0; i < 16; i++)
        if (which >> i & 1) {
            memcpy(payload + bytes, pages + i * PAGE, PAGE);
            bytes += PAGE;
        }
    head(header, which, 0);
    const char *payloads[] = {payload};
    CHECK(snap_blocks_encode(blocks, 1, header, payloads, &bytes, &plain, -2, to, &length) == 0);
    return length;
}

static void reseal(void)
{
    const uint64_t check = __builtin_bswap64(
        snap_delta_check(value, value + SNAP_DELTA_HEADS, value_bytes - SNAP_DELTA_HEADS));
    memcpy(value + 32, &check, 8);
}

/* All pages of both are filled or zeros at random; `own` are other ones now. */
static void make(snap_blocks *blocks)
{
    static char frame[SNAP_BLOCKS_HEADS + CHUNK];
    const uint32_t own = any(4) ? 1u << any(16) | 1u << any(16) : any(1 << 16), full = any(2) ? 0xffff : any(1 << 16);
    memset(before, 0, CHUNK), memset(after, 0, CHUNK);
    present = any(2) ? 0xffff : full | own | any(1 << 16);
    nonzero = (full | own) & present;
    for (uint32_t i = 0; i < 16; i++) {
        if (full >> i & 1)
            fill(before + i * PAGE, i + 1);
        if (own >> i & 1)
            fill(after + i * PAGE, i + 100);
        else if (nonzero >> i & 1)
            memcpy(after + i * PAGE, before + i * PAGE, PAGE);
    }
    present |= full;
    base_bytes = in_blocks(blocks, before, full, base);
    memcpy(base_entry + 16, base + 8, 16);
    const uint32_t length = in_blocks(blocks, after, own & nonzero, frame);
    const uint32_t pages = (uint32_t)__builtin_popcount(own & nonzero), heads = 24 + (pages + 3) / 4 * 12 + 8;
    head(value, nonzero, SNAP_DELTA);
    memcpy(entry + 16, value + 8, 16);
    memset(value + 24, 0, 8);
    put16(value + 24, own & nonzero);
    value[26] = frame[4] == SNAP_ZSTD_BLOCKS; /* that frame is one like any other, behind its table */
    memcpy(value + SNAP_DELTA_HEADS, frame + heads, length - heads);
    value_bytes = SNAP_DELTA_HEADS + length - heads;
    reseal();
}

static void compare(const char *to, uint32_t known)
{
    for (uint32_t i = 0; i < 16; i++)
        if ((known & present) >> i & 1)
            CHECK(!memcmp(to + i * PAGE, after + i * PAGE, PAGE));
}

static void store_both(int store)
{
    CHECK(pwrite(store, base, base_bytes, BASE_AT) == (ssize_t)base_bytes);
    CHECK(pwrite(store, value, value_bytes, DELTA_AT) == (ssize_t)value_bytes);
}

static void flip(char *bytes, uint32_t count)
{
    bytes[any(count)] ^= (char)(1 << any(8));
}

int main(int argc, char **argv)
{
    const int rounds = argc > 1 ? atoi(argv[1]) * 50 : 300;
    seed = argc > 2 ? (unsigned)atoi(argv[2]) : 1;
    snap_blocks *blocks = snap_blocks_new();
    if (!blocks) {
        puts("no libzstd: nothing to be tested");
        return 0;
    }
    static char to[CHUNK];
    const int store = memfd_create("store", 0);
    int whole = 0, refused = 0;
    for (int i = 0; i < rounds; i++) {
        uint32_t found, known;
        const uint64_t number = 1 + any(1000), at = (uint64_t)any(100) * CHUNK, of_base = number * CHUNK;
        const uint64_t swapped = __builtin_bswap64(number);
        memcpy(entry + 8, &swapped, 8);
        make(blocks);
        store_both(store);
        btree_place where = {.offset = DELTA_AT, .bytes = value_bytes}, below = {.offset = BASE_AT, .bytes = base_bytes};
        snap_stored *stored = snap_stored_new(store, &(snap_chunks){&at, &where, entry, 1, ENTRY},
                                              &(snap_chunks){&of_base, &below, base_entry, 1, ENTRY});
        CHECK(stored);
        memset(to, 'x', CHUNK);
        CHECK(snap_stored_decode(stored, 0, SNAP_ALL_BLOCKS, to, &found) == 0xffff && found == present);
        compare(to, 0xffff);
        for (uint32_t page = 0; page < 16; page++) {
            memset(to, 'x', CHUNK);
            known = snap_stored_decode(stored, 0, page, to, &found);
            CHECK(known >> page & 1 && found == present);
            compare(to, known);
            if (any(2)) {
                CHECK(snap_stored_finish(stored, to));
                compare(to, 0xffff);
                whole++;
            }
        }
        if (any(3) == 0)
            flip(base, base_bytes);
        else
            flip(value, value_bytes);
        store_both(store);
        known = snap_stored_decode(stored, 0, any(17), to, &found);
        compare(to, known);
        refused += known == 0;
        /* Headers that say other things, and payloads that are none: nothing is read or written where it is
           not to be. What comes of it is of no account. */
        for (int k = 0; k < 20; k++) {
            flip(value + (any(2) ? 24 : 0), any(2) ? 8 : value_bytes - 24);
            where.bytes = any(8) ? value_bytes : any(value_bytes);
            reseal();
            memcpy(entry + 16, value + 8, 16);
            store_both(store);
            if (snap_stored_decode(stored, 0, any(17), to, &found))
                snap_stored_finish(stored, to);
        }
        snap_stored_free(stored);
    }
    CHECK(whole > rounds && refused > rounds / 4);
    printf("%d deltas, %d refused\n", rounds, refused);
    snap_blocks_free(blocks);
    return 0;
}
