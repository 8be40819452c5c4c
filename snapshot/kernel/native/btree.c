#include "btree.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAGIC 0xBEEFC0DEu
#define VERSION 1u
#define HEADER 16u
#define P_BRANCH 0x01u
#define P_LEAF 0x02u
#define P_OVERFLOW 0x04u
#define KNOWN_PAGE_FLAGS (P_BRANCH | P_LEAF | 0x10u) /* P_DIRTY is left set on disk */
#define F_BIGDATA 0x01u
#define F_SUBDATA 0x02u
#define MDB_INTEGERKEY 0x08u
#define NODE 8u
#define MAX_KEY 511u
#define DEEPEST 32u /* CURSOR_STACK of mdb.c */
#define NONE (~0ull)

struct db {
    uint32_t pad;
    uint16_t flags;
    uint16_t depth;
    uint64_t branches, leaves, overflows, entries, root;
};

struct meta {
    uint32_t magic, version;
    uint64_t address, mapsize;
    struct db dbs[2]; /* free pages, the main database */
    uint64_t last, txnid;
};

enum kind { FREE, MAIN, NAMED };

struct walk {
    int fd;
    uint32_t size;
    uint64_t next; /* pages of the file that LMDB uses */
    int deep;
    uint8_t *seen; /* one bit for each: it belongs to something */
    btree_report *report;
};

/* One tree: what its pages turned out to be, to compare with what its record says. */
struct tree {
    struct db said, found;
    enum kind kind;
    uint8_t last[MAX_KEY]; /* the key before: they ascend through the whole tree */
    uint32_t last_length;
    int any;
};

static int bad(struct walk *walk, uint64_t page, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* 1: the walk ends. */
static int bad(struct walk *walk, uint64_t page, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    vsnprintf(walk->report->reason, sizeof walk->report->reason, format, list);
    va_end(list);
    walk->report->page = page;
    return 1;
}

/* 0, 1 when the file ends before, or -errno. */
static int read_at(struct walk *walk, uint64_t page, void *to, size_t length, size_t within)
{
    size_t done = 0;
    while (done < length) {
        ssize_t got = pread(walk->fd, (char *)to + done, length - done,
                            (off_t)(page * walk->size + within + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return -errno;
        if (got == 0)
            return bad(walk, page, "the file ends before it");
        done += (size_t)got;
    }
    return 0;
}

/* Claims pages: each belongs to one thing only. */
static int claim(struct walk *walk, uint64_t from, uint64_t first, uint64_t count)
{
    if (first < 2 || first >= walk->next || count > walk->next - first)
        return bad(walk, from, "it leads to page %llu of %llu", (unsigned long long)first,
                   (unsigned long long)walk->next);
    for (uint64_t page = first; page < first + count; page++) {
        if (walk->seen[page >> 3] >> (page & 7) & 1)
            return bad(walk, from, "page %llu is used twice", (unsigned long long)page);
        walk->seen[page >> 3] |= (uint8_t)(1u << (page & 7));
    }
    return 0;
}

static uint16_t u16(const uint8_t *at)
{
    uint16_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static int compare(enum kind kind, const uint8_t *a, uint32_t a_length, const uint8_t *b,
                   uint32_t b_length)
{
    if (kind == FREE) { /* MDB_INTEGERKEY, 8 bytes, checked by the caller */
        uint64_t x, y;
        memcpy(&x, a, 8);
        memcpy(&y, b, 8);
        return x < y ? -1 : x > y;
    }
    uint32_t shorter = a_length < b_length ? a_length : b_length;
    int order = memcmp(a, b, shorter);
    return order ? order : (a_length > b_length) - (a_length < b_length);
}

static int tree(struct walk *walk, const struct db *said, enum kind kind, uint64_t from);

/* A list of free pages: its length, then page numbers in descending order, none of them in use. */
static int free_list(struct walk *walk, uint64_t page, const uint8_t *data, uint64_t length)
{
    uint64_t count, number, before = NONE;
    if (length < 8)
        return bad(walk, page, "a list of free pages of %llu bytes", (unsigned long long)length);
    memcpy(&count, data, 8);
    if (count > length / 8 - 1)
        return bad(walk, page, "a list of %llu free pages", (unsigned long long)count);
    for (uint64_t i = 1; i <= count; i++) {
        memcpy(&number, data + i * 8, 8);
        if (number >= before)
            return bad(walk, page, "its list of free pages is out of order");
        before = number;
        int result = claim(walk, page, number, 1);
        if (result)
            return result;
    }
    return 0;
}

/* What a writer that frees the pages of a long value goes by. */
static int long_value(struct walk *walk, uint64_t page, uint64_t count)
{
    uint8_t header[HEADER];
    int result = read_at(walk, page, header, sizeof header, 0);
    if (result)
        return result;
    uint64_t number;
    uint32_t pages;
    memcpy(&number, header, 8);
    memcpy(&pages, header + 12, 4);
    if (number != page || (u16(header + 10) & ~0x10u) != P_OVERFLOW || pages != count)
        return bad(walk, page, "it is not the first of %llu pages of a value",
                   (unsigned long long)count);
    return 0;
}

static int value(struct walk *walk, struct tree *into, uint64_t page, const uint8_t *node,
                 uint32_t room)
{
    uint64_t length = u16(node) | (uint64_t)u16(node + 2) << 16;
    uint16_t flags = u16(node + 4), key = u16(node + 6);
    const uint8_t *data = node + NODE + key;
    int result = 0;
    if (flags & F_BIGDATA) {
        uint64_t first, count = (HEADER - 1 + length) / walk->size + 1;
        if (room < NODE + key + 8u)
            return bad(walk, page, "a node leads out of the page");
        memcpy(&first, data, 8);
        if ((result = claim(walk, page, first, count)))
            return result;
        into->found.overflows += count;
        if (walk->deep && (result = long_value(walk, first, count)))
            return result;
        if (into->kind != FREE)
            return 0;
        uint8_t *list = malloc(length ? length : 1);
        if (!list)
            return -ENOMEM;
        result = read_at(walk, first, list, length, HEADER);
        if (!result)
            result = free_list(walk, page, list, length);
        free(list);
        return result;
    }
    if (length > room - NODE - key)
        return bad(walk, page, "a value leads out of the page");
    if (into->kind == FREE)
        return free_list(walk, page, data, length);
    if (into->kind == NAMED || !(flags & F_SUBDATA))
        return 0;
    struct db named;
    if (length != sizeof named)
        return bad(walk, page, "a database of %llu bytes", (unsigned long long)length);
    memcpy(&named, data, sizeof named);
    return tree(walk, &named, NAMED, page);
}

/* The key of a node, which must be above the one before and not below `low`, the key in the branch
 * that led here. */
static int key(struct walk *walk, struct tree *into, uint64_t page, const uint8_t *node,
               const uint8_t *low, uint32_t low_length)
{
    uint32_t length = u16(node + 6);
    const uint8_t *bytes = node + NODE;
    if (length == 0 || length > MAX_KEY || (into->kind == FREE && length != 8))
        return bad(walk, page, "a key of %u bytes", length);
    if (into->any && compare(into->kind, into->last, into->last_length, bytes, length) >= 0)
        return bad(walk, page, "its keys are out of order");
    if (low_length && compare(into->kind, low, low_length, bytes, length) > 0)
        return bad(walk, page, "a key is below that of its branch");
    memcpy(into->last, bytes, length);
    into->last_length = length;
    into->any = 1;
    return 0;
}

static int visit(struct walk *walk, struct tree *into, uint64_t page, uint64_t from, unsigned depth,
                 const uint8_t *low, uint32_t low_length);

static int nodes(struct walk *walk, struct tree *into, uint64_t page, const uint8_t *bytes,
                 unsigned depth, const uint8_t *low, uint32_t low_length)
{
    uint32_t lower = u16(bytes + 12), upper = u16(bytes + 14), used = 0;
    int leaf = !!(u16(bytes + 10) & P_LEAF), result = 0;
    uint32_t count = (lower - HEADER) / 2;
    for (uint32_t i = 0; i < count && !result; i++) {
        uint32_t offset = u16(bytes + HEADER + i * 2);
        if (offset < upper || offset & 1 || offset + NODE > walk->size)
            return bad(walk, page, "a node is at %u", offset);
        const uint8_t *node = bytes + offset;
        uint32_t room = walk->size - offset, length = u16(node + 6), flags = u16(node + 4);
        if (length > room - NODE)
            return bad(walk, page, "a key leads out of the page");
        if (leaf) {
            uint32_t allowed = into->kind == MAIN ? F_BIGDATA | F_SUBDATA : F_BIGDATA;
            if (flags & ~allowed)
                return bad(walk, page, "a node has the flags %#x", flags);
            uint32_t data = flags & F_BIGDATA ? 8 : u16(node) | (uint32_t)u16(node + 2) << 16;
            used += data < walk->size ? (NODE + length + data + 1) & ~1u : walk->size;
            if (!(result = key(walk, into, page, node, low, low_length)))
                result = value(walk, into, page, node, room);
            into->found.entries++;
            continue;
        }
        /* The first key of a branch stands for all that is lower, and may be anything. */
        uint64_t child = u16(node) | (uint64_t)u16(node + 2) << 16 | (uint64_t)flags << 32;
        used += (NODE + length + 1) & ~1u;
        if (i && (length == 0 || length > MAX_KEY || (into->kind == FREE && length != 8)))
            return bad(walk, page, "a key of %u bytes in a branch", length);
        if (i && into->any &&
            compare(into->kind, into->last, into->last_length, node + NODE, length) >= 0)
            return bad(walk, page, "a branch is out of order");
        result = i ? visit(walk, into, child, page, depth + 1, node + NODE, length)
                   : visit(walk, into, child, page, depth + 1, low, low_length);
    }
    /* Nodes that overlap would be moved over each other by the next writer. */
    if (!result && used != walk->size - upper)
        return bad(walk, page, "its nodes take %u bytes of %u", used, walk->size - upper);
    return result;
}

static int visit(struct walk *walk, struct tree *into, uint64_t page, uint64_t from, unsigned depth,
                 const uint8_t *low, uint32_t low_length)
{
    if (depth > into->said.depth || depth > DEEPEST)
        return bad(walk, from, "a tree deeper than %u", into->said.depth);
    int result = claim(walk, from, page, 1);
    if (result)
        return result;
    uint8_t *bytes = malloc(walk->size);
    if (!bytes)
        return -ENOMEM;
    if ((result = read_at(walk, page, bytes, walk->size, 0)))
        goto out;
    walk->report->pages++;
    uint64_t number;
    memcpy(&number, bytes, 8);
    uint32_t flags = u16(bytes + 10), lower = u16(bytes + 12), upper = u16(bytes + 14);
    uint32_t wanted = depth == into->said.depth ? P_LEAF : P_BRANCH;
    if (number != page)
        result = bad(walk, page, "it says that it is page %llu", (unsigned long long)number);
    else if (flags & ~KNOWN_PAGE_FLAGS || (flags & (P_BRANCH | P_LEAF)) != wanted)
        result = bad(walk, page, "it has the flags %#x where %#x belong", flags, wanted);
    else if (lower < HEADER || lower & 1 || lower > upper || upper > walk->size)
        result = bad(walk, page, "it has its nodes at %u and %u", lower, upper);
    else if (lower == HEADER || (wanted == P_BRANCH && lower < HEADER + 4))
        result = bad(walk, page, "it has too few nodes");
    else
        result = nodes(walk, into, page, bytes, depth, low, low_length);
    if (wanted == P_LEAF)
        into->found.leaves++;
    else
        into->found.branches++;
out:
    free(bytes);
    return result;
}

static int tree(struct walk *walk, const struct db *said, enum kind kind, uint64_t from)
{
    struct tree one = {.said = *said, .kind = kind};
    if ((said->flags & ~(kind == FREE ? MDB_INTEGERKEY : 0u)) != 0)
        return bad(walk, from, "a database has the flags %#x", said->flags);
    if (said->root == NONE) {
        if (said->depth || said->entries || said->branches || said->leaves || said->overflows)
            return bad(walk, from, "an empty database says that it is not");
        return 0;
    }
    if (!said->depth)
        return bad(walk, from, "a database of depth 0");
    int result = visit(walk, &one, said->root, from, 1, NULL, 0);
    if (result)
        return result;
    if (one.found.entries != said->entries || one.found.leaves != said->leaves ||
        one.found.branches != said->branches || one.found.overflows != said->overflows)
        return bad(walk, from, "a database has %llu entries of %llu, or pages it does not name",
                   (unsigned long long)one.found.entries, (unsigned long long)said->entries);
    return 0;
}

int btree_check(int fd, uint32_t page_size, uint64_t txnid, int flags, btree_report *report)
{
    struct meta meta;
    memset(report, 0, sizeof *report);
    struct walk walk = {.fd = fd, .size = page_size, .deep = flags & BTREE_DEEP, .report = report};
    uint64_t at = txnid & 1; /* the two meta pages take turns */
    if (page_size < 512 || page_size > 32768)
        return -EINVAL;
    int result = read_at(&walk, at, &meta, sizeof meta, HEADER);
    if (result)
        return result < 0 ? result : 0;
    if (meta.magic != MAGIC || meta.version != VERSION) {
        bad(&walk, at, "it is no meta page");
        return 0;
    }
    if (meta.txnid != txnid)
        return -EAGAIN;
    off_t end = lseek(fd, 0, SEEK_END);
    if (end < 0)
        return -errno;
    if (meta.last >= (uint64_t)end / page_size) {
        bad(&walk, at, "it counts %llu pages, the file has %llu", (unsigned long long)meta.last + 1,
            (unsigned long long)end / page_size);
        return 0;
    }
    walk.next = meta.last + 1;
    walk.seen = calloc(1, walk.next / 8 + 1);
    if (!walk.seen)
        return -ENOMEM;
    meta.dbs[0].pad = meta.dbs[1].pad = 0;
    result = tree(&walk, &meta.dbs[1], MAIN, at);
    if (!result)
        result = tree(&walk, &meta.dbs[0], FREE, at);
    free(walk.seen);
    return result < 0 ? result : 0;
}
