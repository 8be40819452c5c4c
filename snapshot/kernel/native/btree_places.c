#include "btree_places.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "btree_range_internal.h"

enum { KEY = 8 };

struct wanted {
    uint64_t key;
    uint32_t at;
};

struct search {
    int fd;
    uint32_t size, pages;
    struct wanted *next, *end; /* ascending; those before `next` are done with */
    btree_place *places;
};

static int by_key(const void *a, const void *b)
{
    uint64_t x = ((const struct wanted *)a)->key, y = ((const struct wanted *)b)->key;
    return (x > y) - (x < y);
}

static uint64_t key_of(const uint8_t *node)
{
    return be64toh(btree_u64(node + BTREE_NODE));
}

/* Where the value of a node is that lies at `at` of the file. */
static btree_place place_of(const struct search *search, const uint8_t *node, uint64_t at, uint32_t room)
{
    uint64_t length = btree_length(node);
    btree_place place = {.offset = at + BTREE_NODE + KEY, .bytes = (uint32_t)length};
    if (btree_u16(node + 4) & BTREE_BIGDATA) {
        if (room < BTREE_NODE + KEY + 8)
            return (btree_place){0};
        place.offset = btree_u64(node + BTREE_NODE + KEY) * search->size + BTREE_HEADER;
    } else if (length > room - BTREE_NODE - KEY) {
        return (btree_place){0};
    }
    return place;
}

static void found(struct search *search, const uint8_t *node, uint64_t at, uint32_t room)
{
    uint64_t key = key_of(node);
    while (search->next < search->end && search->next->key < key)
        search->next++;
    for (; search->next < search->end && search->next->key == key; search->next++)
        search->places[search->next->at] = place_of(search, node, at, room);
}

/* The keys of a page that are below `limit`, in order. */
static int visit(struct search *search, uint64_t page, uint64_t limit, unsigned depth)
{
    uint8_t bytes[BTREE_LARGEST];
    if (depth > BTREE_DEEPEST || search->pages++ > BTREE_MOST_PAGES)
        return -EBADMSG;
    int count = btree_page(search->fd, search->size, page, bytes);
    if (count < 0)
        return count;
    for (int i = 0; i < count && search->next < search->end && search->next->key < limit; i++) {
        uint32_t room, behind;
        const uint8_t *node = btree_node(bytes, search->size, (uint32_t)i, &room);
        if (!node)
            return -EBADMSG;
        int branch = btree_u16(bytes + 10) & BTREE_BRANCH;
        if ((!branch || i) && btree_u16(node + 6) != KEY)
            return -EBADMSG;
        if (!branch) {
            found(search, node, page * search->size + (uint64_t)(node - bytes), room);
            continue;
        }
        uint64_t end = limit;
        if (i + 1 < count) {
            const uint8_t *after = btree_node(bytes, search->size, (uint32_t)i + 1, &behind);
            if (!after || btree_u16(after + 6) != KEY)
                return -EBADMSG;
            end = key_of(after) < limit ? key_of(after) : limit;
        }
        if (search->next->key >= end)
            continue;
        int result = visit(search, btree_child(node), end, depth + 1);
        if (result)
            return result;
        while (search->next < search->end && search->next->key < end)
            search->next++;
    }
    return 0;
}

int btree_places(int fd, uint32_t page_size, uint64_t txnid, const char *name, const uint8_t *entries,
                 uint32_t entry, uint32_t count, btree_place *places)
{
    memset(places, 0, count * sizeof *places);
    uint64_t root;
    int result = btree_root(fd, page_size, txnid, name, &root);
    if (result || root == BTREE_NONE || !count)
        return result;
    struct wanted *wanted = malloc(count * sizeof *wanted);
    if (!wanted)
        return -ENOMEM;
    for (uint32_t i = 0; i < count; i++)
        wanted[i] = (struct wanted){be64toh(btree_u64(entries + (size_t)i * entry)), i};
    qsort(wanted, count, sizeof *wanted, by_key);
    struct search search = {.fd = fd, .size = page_size, .next = wanted, .end = wanted + count, .places = places};
    result = visit(&search, root, BTREE_NONE, 0);
    free(wanted);
    if (result)
        memset(places, 0, count * sizeof *places);
    return result;
}
