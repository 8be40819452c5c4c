#define _GNU_SOURCE
#include "btf_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/btf.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Of newer headers than those of Debian 12 (include/uapi/linux/btf.h). */
#define KIND_TYPE_TAG 18
#define KIND_ENUM64 19
#define KINDS 20

#define MOST_QUALIFIERS 8
#define DEPTH 4 /* of structs and unions without a name in one another */

/* What follows the struct btf_type: so many bytes, and so many for each of vlen. */
static const struct {
    unsigned char fixed, each;
} tails[KINDS] = {
    [BTF_KIND_INT] = {4, 0},        [BTF_KIND_ARRAY] = {sizeof(struct btf_array), 0},
    [BTF_KIND_STRUCT] = {0, 12},    [BTF_KIND_UNION] = {0, 12},
    [BTF_KIND_ENUM] = {0, 8},       [BTF_KIND_FUNC_PROTO] = {0, 8},
    [BTF_KIND_VAR] = {4, 0},        [BTF_KIND_DATASEC] = {0, 12},
    [BTF_KIND_DECL_TAG] = {4, 0},   [KIND_ENUM64] = {0, 12},
};

static int read_whole(const char *path, unsigned char **bytes, size_t *size)
{
    struct stat stat;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    int result = fstat(fd, &stat) < 0 ? -errno : 0;
    size_t have = 0, want = result == 0 ? (size_t)stat.st_size : 0;
    *bytes = malloc(want ? want : 1);
    if (!*bytes)
        result = -ENOMEM;
    while (result == 0 && have < want) {
        ssize_t n = read(fd, *bytes + have, want - have);
        result = n > 0 ? 0 : n == 0 ? -EIO : -errno;
        have += n > 0 ? (size_t)n : 0;
    }
    close(fd);
    *size = have;
    return result;
}

/* 0: a kind that is not known has no known length. */
static size_t length_of(const struct btf_type *type)
{
    uint32_t kind = BTF_INFO_KIND(type->info), vlen = BTF_INFO_VLEN(type->info);
    return kind < KINDS ? sizeof *type + tails[kind].fixed + (size_t)tails[kind].each * vlen : 0;
}

/* Counts the types of [at, end), and notes where each is. */
static int index_types(snap_btf *btf, const unsigned char *at, const unsigned char *end)
{
    uint32_t room = 0;
    btf->count = 1;
    while (at < end) {
        if (btf->count >= room) {
            room = room ? 2 * room : 1 << 17;
            void *more = realloc(btf->types, room * sizeof *btf->types);
            if (!more)
                return -ENOMEM;
            btf->types = more;
            btf->types[0] = NULL;
        }
        const size_t left = (size_t)(end - at);
        const size_t length = left < sizeof(struct btf_type) ? 0 : length_of((const void *)at);
        if (length == 0 || length > left)
            return -EPROTO;
        btf->types[btf->count++] = at;
        at += length;
    }
    return 0;
}

int snap_btf_load(const char *path, snap_btf *made)
{
    size_t size = 0;
    *made = (snap_btf){0};
    int result = read_whole(path, &made->bytes, &size);
    const struct btf_header *header = (const void *)made->bytes;
    if (result == 0 && (size < sizeof *header || header->magic != BTF_MAGIC || header->hdr_len > size ||
                        header->type_off % 4 || header->hdr_len % 4))
        result = -EPROTO;
    if (result == 0) {
        const size_t body = size - header->hdr_len;
        if (header->type_off > body || header->type_len > body - header->type_off ||
            header->str_off > body || header->str_len > body - header->str_off || !header->str_len ||
            made->bytes[header->hdr_len + header->str_off + header->str_len - 1])
            result = -EPROTO;
    }
    if (result == 0) {
        const unsigned char *types = made->bytes + header->hdr_len + header->type_off;
        made->strings = (const char *)made->bytes + header->hdr_len + header->str_off;
        result = index_types(made, types, types + header->type_len);
    }
    if (result < 0)
        snap_btf_free(made);
    return result;
}

void snap_btf_free(snap_btf *btf)
{
    free(btf->types);
    free(btf->bytes);
    *btf = (snap_btf){0};
}

static const struct btf_type *type_at(const snap_btf *btf, uint32_t id)
{
    return id > 0 && id < btf->count ? (const void *)btf->types[id] : NULL;
}

static const char *name_at(const snap_btf *btf, uint32_t offset)
{
    const struct btf_header *header = (const void *)btf->bytes;
    return offset < header->str_len ? btf->strings + offset : "";
}

static uint32_t find(const snap_btf *btf, uint32_t kind, const char *name)
{
    for (uint32_t id = 1; id < btf->count; id++) {
        const struct btf_type *type = type_at(btf, id);
        if (BTF_INFO_KIND(type->info) == kind && strcmp(name_at(btf, type->name_off), name) == 0)
            return id;
    }
    return 0;
}

uint32_t snap_btf_function(const snap_btf *btf, const char *name)
{
    return find(btf, BTF_KIND_FUNC, name);
}

/* Without the const, volatile and tags before it. */
static const struct btf_type *plain(const snap_btf *btf, uint32_t id)
{
    for (int i = 0; i < MOST_QUALIFIERS; i++) {
        const struct btf_type *type = type_at(btf, id);
        uint32_t kind = type ? BTF_INFO_KIND(type->info) : 0;
        if (kind != BTF_KIND_CONST && kind != BTF_KIND_VOLATILE && kind != KIND_TYPE_TAG)
            return type;
        id = type->type;
    }
    return NULL;
}

static int64_t offset_in(const snap_btf *btf, uint32_t id, const char *member, int depth)
{
    const struct btf_type *type = plain(btf, id);
    uint32_t kind = type ? BTF_INFO_KIND(type->info) : 0;
    if (depth == 0 || (kind != BTF_KIND_STRUCT && kind != BTF_KIND_UNION))
        return -1;
    const struct btf_member *members = (const void *)(type + 1);
    for (uint32_t i = 0; i < BTF_INFO_VLEN(type->info); i++) {
        const struct btf_member *m = &members[i];
        int fields = BTF_INFO_KFLAG(type->info);
        uint32_t bits = fields ? BTF_MEMBER_BIT_OFFSET(m->offset) : m->offset;
        int64_t at = fields && BTF_MEMBER_BITFIELD_SIZE(m->offset) ? bits / 32 * 4 : bits / 8;
        const char *name = name_at(btf, m->name_off);
        if (*name && strcmp(name, member) == 0)
            return at;
        int64_t inside = *name ? -1 : offset_in(btf, m->type, member, depth - 1);
        if (inside >= 0)
            return at + inside;
    }
    return -1;
}

int64_t snap_btf_offset(const snap_btf *btf, const char *structure, const char *member)
{
    return offset_in(btf, find(btf, BTF_KIND_STRUCT, structure), member, DEPTH);
}
