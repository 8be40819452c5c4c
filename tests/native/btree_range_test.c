/* btree_range on a small file made here, and on the same with bytes changed at random: it may refuse
 * or be wrong, but reads nothing outside of its pages (AddressSanitizer). */
#define _GNU_SOURCE
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
    for (uint32_t round = 0; round < rounds; round++) {
        make();
        for (int i = rand() % 6; i >= 0; i--) {
            uint8_t *page = file[rand() % PAGES];
            page[rand() % 4 ? rand() % 160 : rand() % (int)PAGE] = (uint8_t)rand();
        }
        expect(pwrite(fd, file, sizeof file, 0) == sizeof file, "no file");
        for (uint8_t space = 0; space < 3; space++)
            expect(read_space(fd, space, out, third) <= third, "too many entries");
    }
    free(out);
    free(numbers);
    close(fd);
    return 0;
}
