/* What the readers of LMDB's trees have in common. Sizes and offsets are bytes. */
#pragma once
#include <stdint.h>
#include <string.h>

enum {
    BTREE_HEADER = 16,
    BTREE_NODE = 8,
    BTREE_LARGEST = 4096, /* a page: that of a store */
    BTREE_DEEPEST = 32,
    BTREE_BRANCH = 0x01, /* flags of a page */
    BTREE_LEAF = 0x02,
    BTREE_BIGDATA = 0x01, /* of a node: its value has pages of its own */
};
#define BTREE_MOST_PAGES (1u << 20) /* of one walk: pages that lead to each other would never end */
#define BTREE_NONE (~0ull)

static inline uint16_t btree_u16(const uint8_t *at)
{
    uint16_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static inline uint64_t btree_u64(const uint8_t *at)
{
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

/* The page that a branch's node names, and the length that a leaf's says. */
static inline uint64_t btree_child(const uint8_t *node)
{
    return btree_u16(node) | (uint64_t)btree_u16(node + 2) << 16 | (uint64_t)btree_u16(node + 4) << 32;
}

static inline uint64_t btree_length(const uint8_t *node)
{
    return btree_u16(node) | (uint64_t)btree_u16(node + 2) << 16;
}

/* Reads a page and looks at its head. -> how many nodes it has, or -errno. */
int btree_page(int fd, uint32_t size, uint64_t page, uint8_t *to);
/* Node i of a page; NULL: it leads out of it. *room: bytes from there on. */
const uint8_t *btree_node(const uint8_t *page, uint32_t size, uint32_t i, uint32_t *room);
/* The root of a named database, BTREE_NONE: it is empty. -> 0 or -errno as btree_range. */
int btree_root(int fd, uint32_t size, uint64_t txnid, const char *name, uint64_t *root);
