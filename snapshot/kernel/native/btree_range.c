#include "btree_range.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "btree_range_internal.h"

#define MAGIC 0xBEEFC0DEu
#define VERSION 1u
#define F_SUBDATA 0x02u
#define DB_BYTES 48u
#define DB_ROOT 40u

/* Of a meta page, behind its header: magic, version, address, size of the map, two databases, the
 * last page, the transaction. */
#define META_MAIN (24u + DB_BYTES)
#define META_TXNID (24u + 2 * DB_BYTES + 8)

struct range {
    int fd;
    uint32_t size;
    const uint8_t *prefix;
    uint32_t prefix_length, entry;
    uint8_t *out;
    uint64_t count, most;
    uint32_t pages;
    uint8_t named[DB_BYTES]; /* with `entry` 0: the value of the key `prefix` */
    int found;
};

static int read_all(int fd, uint32_t size, uint64_t page, uint8_t *to)
{
    if (page > (1ull << 48))
        return -EBADMSG;
    size_t done = 0;
    while (done < size) {
        ssize_t got = pread(fd, to + done, size - done, (off_t)(page * size + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return got < 0 ? -errno : -EBADMSG;
        done += (size_t)got;
    }
    return 0;
}

int btree_page(int fd, uint32_t size, uint64_t page, uint8_t *to)
{
    int result = read_all(fd, size, page, to);
    if (result)
        return result;
    uint32_t flags = btree_u16(to + 10), lower = btree_u16(to + 12);
    if (btree_u64(to) != page || lower < BTREE_HEADER || lower > size || !(flags & (BTREE_LEAF | BTREE_BRANCH)))
        return -EBADMSG;
    return (int)((lower - BTREE_HEADER) / 2);
}

const uint8_t *btree_node(const uint8_t *page, uint32_t size, uint32_t i, uint32_t *room)
{
    uint32_t lower = btree_u16(page + 12), offset = btree_u16(page + BTREE_HEADER + i * 2);
    if (offset < lower || offset + BTREE_NODE > size)
        return NULL;
    *room = size - offset;
    return btree_u16(page + offset + 6) > *room - BTREE_NODE ? NULL : page + offset;
}

/* How a key stands to all that begin with the prefix: -1 before, 0 one of them, 1 behind. */
static int side(const struct range *range, const uint8_t *key, uint32_t length)
{
    uint32_t shorter = length < range->prefix_length ? length : range->prefix_length;
    int order = memcmp(key, range->prefix, shorter);
    if (order)
        return order < 0 ? -1 : 1;
    return length < range->prefix_length ? -1 : 0;
}

static int leaf_entry(struct range *range, const uint8_t *node, uint32_t room)
{
    uint32_t key = btree_u16(node + 6), flags = btree_u16(node + 4);
    uint64_t length = btree_length(node);
    const uint8_t *rest = node + BTREE_NODE + range->prefix_length;
    if (flags & BTREE_BIGDATA || length > room - BTREE_NODE - key)
        return -EBADMSG;
    if (!range->entry) { /* a record of the main database */
        if (key != range->prefix_length)
            return 0;
        if (!(flags & F_SUBDATA) || length != DB_BYTES)
            return -EBADMSG;
        memcpy(range->named, node + BTREE_NODE + key, DB_BYTES);
        range->found = 1;
        return 0;
    }
    if (key - range->prefix_length + length != range->entry || range->count == range->most)
        return -EBADMSG;
    memcpy(range->out + range->count++ * range->entry, rest, range->entry);
    return 0;
}

static int visit(struct range *range, uint64_t page, unsigned depth)
{
    uint8_t bytes[BTREE_LARGEST];
    if (depth > BTREE_DEEPEST || range->pages++ > BTREE_MOST_PAGES)
        return -EBADMSG;
    int count = btree_page(range->fd, range->size, page, bytes), result = count < 0 ? count : 0;
    uint32_t flags = btree_u16(bytes + 10);
    uint64_t before = BTREE_NONE; /* the child before this one: it may hold what this one's key leaves */
    for (int i = 0; i < count && !result; i++) {
        uint32_t room;
        const uint8_t *node = btree_node(bytes, range->size, (uint32_t)i, &room);
        if (!node)
            return -EBADMSG;
        int where = flags & BTREE_BRANCH && !i ? -1 : side(range, node + BTREE_NODE, btree_u16(node + 6));
        if (flags & BTREE_LEAF) {
            if (where > 0)
                return 0;
            if (where == 0)
                result = leaf_entry(range, node, room);
            continue;
        }
        if (where >= 0 && before != BTREE_NONE)
            result = visit(range, before, depth + 1);
        before = btree_child(node);
        if (where > 0)
            return result;
    }
    return !result && before != BTREE_NONE ? visit(range, before, depth + 1) : result;
}

int btree_root(int fd, uint32_t size, uint64_t txnid, const char *name, uint64_t *root)
{
    uint8_t meta[BTREE_LARGEST];
    struct range range = {.fd = fd, .size = size, .prefix = (const uint8_t *)name,
                          .prefix_length = (uint32_t)strlen(name)};
    if (size < 512 || size > BTREE_LARGEST)
        return -EINVAL;
    int result = read_all(fd, size, txnid & 1, meta);
    if (result)
        return result;
    const uint8_t *head = meta + BTREE_HEADER;
    uint32_t magic_version[2] = {MAGIC, VERSION};
    if (memcmp(head, magic_version, sizeof magic_version))
        return -EBADMSG;
    if (btree_u64(head + META_TXNID) != txnid)
        return -EAGAIN;
    *root = btree_u64(head + META_MAIN + DB_ROOT);
    if (*root == BTREE_NONE || (result = visit(&range, *root, 0)))
        return result ? result : -EBADMSG;
    *root = btree_u64(range.named + DB_ROOT);
    return range.found ? 0 : -EBADMSG;
}

int64_t btree_range(int fd, uint32_t page_size, uint64_t txnid, const char *name,
                    const uint8_t *prefix, uint32_t prefix_length, uint32_t entry, uint8_t *out,
                    uint64_t most)
{
    struct range range = {.fd = fd, .size = page_size, .prefix = prefix, .prefix_length = prefix_length,
                          .entry = entry, .out = out, .most = most};
    uint64_t root;
    int result = entry ? btree_root(fd, page_size, txnid, name, &root) : -EINVAL;
    if (!result && root != BTREE_NONE)
        result = visit(&range, root, 0);
    return result ? result : (int64_t)range.count;
}

uint64_t btree_numbers(const uint8_t *entries, uint32_t entry, uint64_t count, uint64_t *numbers)
{
    uint64_t all = 0;
    for (uint64_t i = 0; i < count; i++) {
        numbers[i] = __builtin_bswap64(btree_u64(entries + i * entry));
        all |= numbers[i];
    }
    return all;
}
