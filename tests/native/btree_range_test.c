/* btree_range and btree_places on a small file made here, and on the same with bytes changed at random:
 * they may refuse or be wrong, but read nothing outside of its pages (AddressSanitizer). */
#define _GNU_SOURCE
#include "btree_places.h"
#include "btree_range.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096u
#define LEAVES 5u
#define EACH 60u
#define PREFIX 12u
#define ENTRY 32u
#define PAGES (4 + LEAVES)

static uint8_t file[PAGES][PAGE];

static void put16(uint8_t *at, uint16_t value) { memcpy(at, &value, 2); }
static void put64(uint8_t *at, uint64_t value) { memcpy(at, &value, 8); }

static void begin(uint32_t number, uint16_t flags)
{
    memset(file[number], 0, PAGE);
    put64(file[number], number);
    put16(file[number] + 10, flags);
    put16(file[number] + 12, 16);
    put16(file[number] + 14, PAGE);
}

static uint8_t *node(uint32_t number, uint32_t low, uint16_t flags, const void *key, uint16_t length,
                     uint32_t data)
{
    uint8_t *page = file[number];
    uint16_t lower, upper;
    memcpy(&lower, page + 12, 2);
    memcpy(&upper, page + 14, 2);
    upper = (uint16_t)(upper - ((8u + length + data + 1) & ~1u));
    put16(page + lower, upper);
    put16(page + 12, (uint16_t)(lower + 2));
    put16(page + 14, upper);
    put16(page + upper, (uint16_t)low);
    put16(page + upper + 4, flags);
    put16(page + upper + 6, length);
    memcpy(page + upper + 8, key, length);
    return page + upper + 8 + length;
}

/* Keys: 8 bytes image, 4 bytes space, 8 bytes address, big endian; a third each of three spaces. */
static void key_of(uint32_t i, uint8_t key[20])
{
    uint64_t address = __builtin_bswap64((uint64_t)i << 16);
    memset(key, 0, 20);
    key[7] = 1;
    key[11] = (uint8_t)(i / (LEAVES * EACH / 3));
    memcpy(key + 12, &address, 8);
}

static void make(void)
{
    uint8_t key[20], value[24] = {7};
    uint32_t magic[2] = {0xBEEFC0DE, 1};
    memset(file, 0, sizeof file);
    memcpy(file[0] + 16, magic, 8);
    put64(file[0] + 16 + 24 + 48 + 40, 2);
    begin(2, 2);
    uint8_t *db = node(2, 48, 2, "index", 5, 48);
    memset(db, 0, 48);
    put64(db + 40, 3);
    begin(3, 1);
    for (uint32_t leaf = 0; leaf < LEAVES; leaf++) {
        key_of(leaf * EACH, key);
        node(3, 4 + leaf, 0, key, leaf ? 20 : 0, 0);
        begin(4 + leaf, 2);
        for (uint32_t i = 0; i < EACH; i++) {
            key_of(leaf * EACH + i, key);
            memcpy(node(4 + leaf, 24, 0, key, 20, 24), value, 24);
        }
    }
}

/* Keys of 8 bytes; every third value has pages of its own. */
static void make_numbers(void)
{
    make();
    for (uint32_t leaf = 0; leaf < LEAVES; leaf++) {
        uint64_t first = __builtin_bswap64((uint64_t)leaf * EACH);
        if (leaf == 0)
            begin(3, 1);
        node(3, 4 + leaf, 0, &first, leaf ? 8 : 0, 0);
        begin(4 + leaf, 2);
        for (uint32_t i = 0; i < EACH; i++) {
            uint32_t number = leaf * EACH + i;
            uint64_t key = __builtin_bswap64(number), page = 1000 + number;
            if (number % 3)
                memset(node(4 + leaf, 24, 0, &key, 8, 24), (int)number, 24);
            else
                memcpy(node(4 + leaf, 60000, 1, &key, 8, 8), &page, 8);
        }
    }
}

static void expect(int good, const char *what);

static void find_places(int fd)
{
    enum { COUNT = LEAVES * EACH + 2 };
    uint64_t entries[COUNT];
    btree_place places[COUNT];
    for (uint32_t i = 0; i < COUNT; i++) /* in no order; two are not there */
        entries[i] = __builtin_bswap64(i * 7 % COUNT);
    expect(!btree_places(fd, PAGE, 0, "index", (uint8_t *)entries, 8, COUNT, places), "no places");
    for (uint32_t i = 0; i < COUNT; i++) {
        uint32_t number = i * 7 % COUNT;
        uint8_t value[24];
        if (number >= LEAVES * EACH)
            expect(!places[i].bytes, "the place of what is not there");
        else if (number % 3)
            expect(places[i].bytes == 24 && pread(fd, value, 24, (off_t)places[i].offset) == 24 &&
                       value[0] == (uint8_t)number && value[23] == (uint8_t)number, "another value");
        else
            expect(places[i].bytes == 60000 && places[i].offset == (1000 + number) * PAGE + 16, "another page");
    }
}

static void find_places_somehow(int fd)
{
    uint64_t entries[40];
    btree_place *places = malloc(40 * sizeof *places); /* not one more */
    for (uint32_t i = 0; i < 40; i++)
        entries[i] = __builtin_bswap64((uint64_t)rand() % 310);
    btree_places(fd, PAGE, 0, "index", (uint8_t *)entries, 8, 40, places);
    free(places);
}

static int64_t read_space(int fd, uint8_t space, uint8_t *out, uint64_t most)
{
    uint8_t prefix[PREFIX] = {0};
    prefix[7] = 1, prefix[11] = space;
    return btree_range(fd, PAGE, 0, "index", prefix, PREFIX, ENTRY, out, most);
}

static void expect(int good, const char *what)
{
    if (!good) {
        fprintf(stderr, "btree_range_test: %s\n", what);
        exit(1);
    }
}

int main(int argc, char **argv)
{
    uint32_t third = LEAVES * EACH / 3, rounds = (argc > 1 ? (uint32_t)atoi(argv[1]) : 5) * 2000;
    int fd = memfd_create("btree", MFD_CLOEXEC);
    uint8_t *out = malloc(third * ENTRY); /* not a byte more */
    uint64_t *numbers = malloc(third * sizeof *numbers);
    srand(argc > 2 ? (unsigned)atoi(argv[2]) : 1);
    make();
    expect(pwrite(fd, file, sizeof file, 0) == sizeof file, "no file");
    for (uint8_t space = 0; space < 3; space++) {
        expect(read_space(fd, space, out, third) == third, "not all entries of a space");
        btree_numbers(out, ENTRY, third, numbers);
        for (uint32_t i = 0; i < third; i++)
            expect(numbers[i] == (uint64_t)(space * third + i) << 16, "another entry");
    }
    expect(read_space(fd, 3, out, third) == 0, "a space that is none");
    expect(read_space(fd, 1, out, third - 1) < 0, "more than there is room for");
    expect(btree_range(fd, PAGE, 1, "index", out, 1, ENTRY, out, 1) < 0, "another transaction");
    make_numbers();
    expect(pwrite(fd, file, sizeof file, 0) == sizeof file, "no file");
    find_places(fd);
    for (uint32_t round = 0; round < rounds; round++) {
        if (round % 2)
            make();
        else
            make_numbers();
        for (int i = rand() % 6; i >= 0; i--) {
            uint8_t *page = file[rand() % PAGES];
            page[rand() % 4 ? rand() % 160 : rand() % (int)PAGE] = (uint8_t)rand();
        }
        expect(pwrite(fd, file, sizeof file, 0) == sizeof file, "no file");
        for (uint8_t space = 0; space < 3; space++)
            expect(read_space(fd, space, out, third) <= third, "too many entries");
        find_places_somehow(fd);
    }
    free(out);
    free(numbers);
    close(fd);
    return 0;
}
