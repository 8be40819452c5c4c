#include "delta_internal.h"

#include <string.h>

#include "bytes_internal.h"
#include "chunk_internal.h"
#include "xxh64_internal.h"

enum { OWN_AT = 24, CODEC_AT = 26, CHECK_AT = 32 };
_Static_assert(CHECK_AT + 8 == SNAP_DELTA_HEADS, "the check comes before the payload");

uint64_t snap_delta_check(const char *heads, const char *payload, uint32_t bytes)
{
    return snap_xxh64(heads, CHECK_AT, snap_xxh64(payload, bytes, seed_of(heads)));
}

bool delta_open(const char *value, uint32_t bytes, const char *digest, delta *found)
{
    if (bytes < SNAP_DELTA_HEADS || value[HEADER_CODEC] != SNAP_DELTA ||
        memcmp(value + HEADER_DIGEST, digest, HEADER_DIGEST_BYTES))
        return false;
    const uint32_t nonzero = u16_at(value + 2), own = u16_at(value + OWN_AT);
    *found = (delta){.present = u16_at(value), .nonzero = nonzero, .own = own, .based = nonzero & ~own,
                     .bytes = bytes - SNAP_DELTA_HEADS, .payload = value + SNAP_DELTA_HEADS,
                     .packed = value[CODEC_AT] != 0};
    return !(found->nonzero & ~found->present) && !(found->own & ~found->nonzero) &&
           u64_at(value + CHECK_AT) == snap_delta_check(value, found->payload, found->bytes);
}

bool delta_own_pages(const delta *d, snap_blocks *blocks, char *room, char *to)
{
    const uint32_t size = (uint32_t)__builtin_popcount(d->own) * PAGE;
    const char *from = d->payload;
    if (d->packed) {
        if (!snap_blocks_unpack(blocks, d->payload, d->bytes, room, size))
            return false;
        from = room;
    } else if (d->bytes != size) {
        return false;
    }
    for (uint32_t page = 0; page < PAGES; page++)
        if (d->own >> page & 1) {
            memcpy(to + page * PAGE, from, PAGE);
            from += PAGE;
        }
    return true;
}

void delta_copy(uint32_t which, const char *from, char *to)
{
    for (uint32_t page = 0; page < PAGES; page++)
        if (which >> page & 1)
            memcpy(to + page * PAGE, from + page * PAGE, PAGE);
}
