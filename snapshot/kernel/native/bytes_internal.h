/* Numbers in the bytes of a chunk value, and where they are in its header. All big endian. */
#pragma once
#include <endian.h>
#include <stdint.h>
#include <string.h>

enum { HEADER = 24, HEADER_CODEC = 4, HEADER_DIGEST = 8, HEADER_DIGEST_BYTES = 16 };

static inline uint64_t u64_at(const char *at)
{
    uint64_t x;
    memcpy(&x, at, sizeof x);
    return be64toh(x);
}

static inline uint32_t u32_at(const char *at)
{
    uint32_t x;
    memcpy(&x, at, sizeof x);
    return be32toh(x);
}

static inline uint32_t u16_at(const char *at)
{
    uint16_t x;
    memcpy(&x, at, sizeof x);
    return be16toh(x);
}

/* Checks are those of this chunk: the same bytes of another do not pass for its own. */
static inline uint64_t seed_of(const char *value)
{
    return u64_at(value + HEADER_DIGEST);
}
