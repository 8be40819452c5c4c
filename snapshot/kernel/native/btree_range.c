#include "btree_range.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#define MAGIC 0xBEEFC0DEu
#define VERSION 1u
#define HEADER 16u
#define P_BRANCH 0x01u
#define P_LEAF 0x02u
#define F_BIGDATA 0x01u
#define F_SUBDATA 0x02u
#define NODE 8u
#define DEEPEST 32u
#define LARGEST 4096u /* a page: that of a store */
#define DB_BYTES 48u
#define DB_ROOT 40u
#define NONE (~0ull)

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
    uint8_t named[DB_BYTES]; /* with `entry` 0: the value of the key `prefix` */
    int found;
};

static uint16_t u16(const uint8_t *at)
{
    uint16_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static uint64_t u64(const uint8_t *at)
{
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static int read_page(const struct range *range, uint64_t page, uint8_t *to)
{
    if (page > (1ull << 48))
        return -EBADMSG;
    size_t done = 0;
    while (done < range->size) {
        ssize_t got = pread(range->fd, to + done, range->size - done,
                            (off_t)(page * range->size + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return got < 0 ? -errno : -EBADMSG;
        done += (size_t)got;
    }
    return 0;
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
    uint32_t key = u16(node + 6), flags = u16(node + 4);
    uint64_t length = u16(node) | (uint64_t)u16(node + 2) << 16;
    const uint8_t *rest = node + NODE + range->prefix_length;
    if (flags & F_BIGDATA || length > room - NODE - key)
        return -EBADMSG;
    if (!range->entry) { /* a record of the main database */
        if (key != range->prefix_length)
            return 0;
        if (!(flags & F_SUBDATA) || length != DB_BYTES)
            return -EBADMSG;
        memcpy(range->named, node + NODE + key, DB_BYTES);
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
    uint8_t bytes[LARGEST];
    if (depth > DEEPEST)
        return -EBADMSG;
    int result = read_page(range, page, bytes);
    if (result)
        return result;
    uint32_t flags = u16(bytes + 10), lower = u16(bytes + 12);
    if (u64(bytes) != page || lower < HEADER || lower > range->size ||
        !(flags & (P_LEAF | P_BRANCH)))
        return -EBADMSG;
    uint32_t count = (lower - HEADER) / 2;
    uint64_t before = NONE; /* the child before this one: it may hold what this one's key leaves */
    for (uint32_t i = 0; i < count && !result; i++) {
        uint32_t offset = u16(bytes + HEADER + i * 2);
        if (offset < lower || offset + NODE > range->size)
            return -EBADMSG;
        const uint8_t *node = bytes + offset;
        uint32_t length = u16(node + 6), room = range->size - offset;
        if (length > room - NODE)
            return -EBADMSG;
        int where = flags & P_BRANCH && !i ? -1 : side(range, node + NODE, length);
        if (flags & P_LEAF) {
            if (where > 0)
                return 0;
            if (where == 0)
                result = leaf_entry(range, node, room);
            continue;
        }
        if (where >= 0 && before != NONE)
            result = visit(range, before, depth + 1);
        before = u16(node) | (uint64_t)u16(node + 2) << 16 | (uint64_t)u16(node + 4) << 32;
        if (where > 0)
            return result;
    }
    return !result && before != NONE ? visit(range, before, depth + 1) : result;
}

int64_t btree_range(int fd, uint32_t page_size, uint64_t txnid, const char *name,
                    const uint8_t *prefix, uint32_t prefix_length, uint32_t entry, uint8_t *out,
                    uint64_t most)
{
    uint8_t meta[LARGEST];
    struct range range = {.fd = fd, .size = page_size, .prefix = (const uint8_t *)name,
                          .prefix_length = (uint32_t)strlen(name)};
    if (page_size < 512 || page_size > LARGEST || !entry)
        return -EINVAL;
    int result = read_page(&range, txnid & 1, meta);
    if (result)
        return result;
    const uint8_t *head = meta + HEADER;
    uint32_t magic_version[2] = {MAGIC, VERSION};
    if (memcmp(head, magic_version, sizeof magic_version))
        return -EBADMSG;
    if (u64(head + META_TXNID) != txnid)
        return -EAGAIN;
    uint64_t root = u64(head + META_MAIN + DB_ROOT);
    if (root == NONE || (result = visit(&range, root, 0)))
        return result ? result : -EBADMSG;
    if (!range.found)
        return -EBADMSG;
    root = u64(range.named + DB_ROOT);
    range.prefix = prefix, range.prefix_length = prefix_length;
    range.entry = entry, range.out = out, range.most = most;
    result = root == NONE ? 0 : visit(&range, root, 0);
    return result ? result : (int64_t)range.count;
}

uint64_t btree_numbers(const uint8_t *entries, uint32_t entry, uint64_t count, uint64_t *numbers)
{
    uint64_t all = 0;
    for (uint64_t i = 0; i < count; i++) {
        numbers[i] = __builtin_bswap64(u64(entries + i * entry));
        all |= numbers[i];
    }
    return all;
}
