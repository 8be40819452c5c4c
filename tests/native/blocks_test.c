/* Values of blocks: each page comes back from its block and those before it, and a value of which bits were
 * changed is refused, or gives what was written (AddressSanitizer looks on). */
#include "blocks.h"

#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "xxh64_internal.h"

enum { PAGE = 4096, PAGES = 16, CHUNK = PAGE * PAGES, HEADER = 24, ALL = 0xffff };

static void put16(char *at, unsigned x)
{
    at[0] = (char)(x >> 8), at[1] = (char)x;
}

static void make_page(char *page, int kind)
{
    for (int i = 0; i < PAGE; i++)
        page[i] = (char)(kind == 0 ? rand() : kind == 1 ? "some text "[i % 10] : i % 64 ? 0 : rand());
    page[0] |= 1;
}

/* The nonzero pages of `chunk` one after the other. -> bytes */
static uint32_t gather(const char *chunk, uint32_t nonzero, char *payload)
{
    uint32_t bytes = 0;
    for (int page = 0; page < PAGES; page++)
        if (nonzero >> page & 1) {
            memcpy(payload + bytes, chunk + page * PAGE, PAGE);
            bytes += PAGE;
        }
    return bytes;
}

struct made {
    char chunk[CHUNK], header[HEADER];
    uint32_t present, nonzero, bytes; /* of the value */
    char *value;                      /* not a byte more */
};

static void make(snap_blocks *blocks, struct made *made)
{
    static char payload[CHUNK], room[SNAP_BLOCKS_HEADS + CHUNK];
    int full = rand() % 3 == 0, kind = rand() % 4;
    made->present = full ? ALL : (uint32_t)rand() & ALL;
    made->nonzero = full ? ALL : made->present & (uint32_t)rand();
    memset(made->chunk, 0, CHUNK);
    for (int page = 0; page < PAGES; page++)
        if (made->nonzero >> page & 1)
            make_page(made->chunk + page * PAGE, kind == 3 ? rand() % 3 : kind);
    put16(made->header, made->present);
    put16(made->header + 2, made->nonzero);
    memset(made->header + 4, 0, 4);
    for (int i = 8; i < HEADER; i++)
        made->header[i] = (char)rand();
    uint32_t bytes = gather(made->chunk, made->nonzero, payload);
    const char *payloads[] = {payload};
    uint8_t plain = rand() % 4 == 0;
    CHECK(snap_blocks_encode(blocks, 1, made->header, payloads, &bytes, &plain, -2, room, &made->bytes) == 0);
    made->value = malloc(made->bytes);
    memcpy(made->value, room, made->bytes);
}

/* What is said to be known is what was written, and the page itself is. */
static void compare(const struct made *made, const char *chunk, uint32_t known, uint32_t present)
{
    CHECK(present == made->present);
    for (int page = 0; page < PAGES; page++)
        if (known & present & 1u << page)
            CHECK(!memcmp(chunk + page * PAGE, made->chunk + page * PAGE, PAGE));
}

static void read_back(snap_blocks *blocks, const struct made *made)
{
    char *chunk = malloc(CHUNK);
    const char *digest = made->header + 8;
    uint32_t present;
    CHECK(snap_blocks_heads(made->value, made->bytes, digest));
    for (uint32_t page = 0; page <= SNAP_ALL_BLOCKS; page++) {
        memset(chunk, 0x5a, CHUNK);
        uint32_t known = snap_blocks_decode(blocks, made->value, made->bytes, digest, page, chunk, &present);
        CHECK(page == SNAP_ALL_BLOCKS ? known == ALL : known >> page & 1);
        compare(made, chunk, known, present);
        int whole = snap_blocks_finish(blocks, made->value, chunk);
        CHECK(whole == (made->nonzero == ALL));
        if (whole)
            compare(made, chunk, ALL, made->present);
    }
    free(chunk);
}

static void damage(snap_blocks *blocks, struct made *made)
{
    char *chunk = malloc(CHUNK), digest[16];
    uint32_t present, page = (uint32_t)rand() % (SNAP_ALL_BLOCKS + 1), bytes = made->bytes;
    memcpy(digest, made->header + 8, sizeof digest);
    for (int i = rand() % 3; i >= 0; i--)
        made->value[(uint32_t)(rand() % 3 ? rand() : rand() % 100) % bytes] ^= (char)(1 << rand() % 8);
    if (rand() % 8 == 0)
        bytes = (uint32_t)rand() % (bytes + 1);
    uint32_t known = snap_blocks_decode(blocks, made->value, bytes, digest, page, chunk, &present);
    if (known)
        compare(made, chunk, known, present);
    if (known && snap_blocks_finish(blocks, made->value, chunk))
        compare(made, chunk, ALL, present);
    free(chunk);
}

static uint64_t number_at(const char *at, int bytes)
{
    uint64_t x = 0;
    for (int i = 0; i < bytes; i++)
        x = x << 8 | (uint8_t)at[i];
    return x;
}

static void put_number(char *at, uint64_t x)
{
    for (int i = 7; i >= 0; i--, x >>= 8)
        at[i] = (char)x;
}

/* What was changed on purpose, with checks that are right: anything but a step outside. */
static void forge(snap_blocks *blocks, struct made *made)
{
    char *chunk = malloc(CHUNK), *value = made->value, *table = value + HEADER;
    uint32_t count = 0, present, from = 0;
    for (int i = rand() % 6; i >= 0; i--)
        value[(uint32_t)(rand() % 2 ? rand() : rand() % 100) % made->bytes] ^= (char)(1 << rand() % 8);
    for (uint64_t pages = number_at(value + 2, 2); pages; pages &= pages - 1)
        count++;
    uint32_t entries = (count + 3) / 4, heads = HEADER + entries * 12 + 8;
    uint64_t seed = number_at(value + 8, 8);
    if (made->bytes >= heads) {
        for (uint32_t i = 0; i < entries; i++) {
            uint32_t end = (uint32_t)number_at(table + i * 12, 4);
            if (end < from || end > made->bytes - heads)
                break;
            put_number(table + i * 12 + 4, snap_xxh64(value + heads + from, end - from, seed));
            from = end;
        }
        put_number(value + heads - 8, snap_xxh64(value, heads - 8, seed));
    }
    uint32_t page = (uint32_t)rand() % (SNAP_ALL_BLOCKS + 1);
    if (snap_blocks_decode(blocks, value, made->bytes, value + 8, page, chunk, &present))
        snap_blocks_finish(blocks, value, chunk);
    free(chunk);
}

int main(int argc, char **argv)
{
    int rounds = (argc > 1 ? atoi(argv[1]) : 5) * 200;
    srand(argc > 2 ? (unsigned)atoi(argv[2]) : 1);
    /* of the specification */
    CHECK(snap_xxh64("", 0, 0) == 0xef46db3751d8e999);
    CHECK(snap_xxh64("Nobody inspects the spammish repetition", 39, 0) == 0xfbcea83c8a378bf1);
    snap_blocks *blocks = snap_blocks_new();
    CHECK(blocks); /* Debian's dpkg depends on libzstd */
    for (int round = 0; round < rounds; round++) {
        struct made made;
        make(blocks, &made);
        read_back(blocks, &made);
        damage(blocks, &made);
        free(made.value);
        make(blocks, &made);
        forge(blocks, &made);
        free(made.value);
    }
    snap_blocks_free(blocks);
    return 0;
}
