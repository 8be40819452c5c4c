#include "xxh64_internal.h"

#include <endian.h>
#include <string.h>

#define P1 UINT64_C(11400714785074694791)
#define P2 UINT64_C(14029467366897019727)
#define P3 UINT64_C(1609587929392839161)
#define P4 UINT64_C(9650029242287828579)
#define P5 UINT64_C(2870177450012600261)

static uint64_t rotated(uint64_t x, int by)
{
    return x << by | x >> (64 - by);
}

static uint64_t word(const unsigned char *at)
{
    uint64_t x;
    memcpy(&x, at, sizeof x);
    return le64toh(x);
}

static uint64_t rounded(uint64_t lane, uint64_t input)
{
    return rotated(lane + input * P2, 31) * P1;
}

static uint64_t merged(uint64_t hash, uint64_t lane)
{
    return (hash ^ rounded(0, lane)) * P1 + P4;
}

static uint64_t striped(const unsigned char **at, const unsigned char *end, uint64_t seed)
{
    uint64_t a = seed + P1 + P2, b = seed + P2, c = seed, d = seed - P1;
    for (; end - *at >= 32; *at += 32) {
        a = rounded(a, word(*at));
        b = rounded(b, word(*at + 8));
        c = rounded(c, word(*at + 16));
        d = rounded(d, word(*at + 24));
    }
    uint64_t hash = rotated(a, 1) + rotated(b, 7) + rotated(c, 12) + rotated(d, 18);
    return merged(merged(merged(merged(hash, a), b), c), d);
}

uint64_t snap_xxh64(const void *data, size_t bytes, uint64_t seed)
{
    const unsigned char *at = data, *end = at + bytes;
    uint64_t hash = bytes >= 32 ? striped(&at, end, seed) : seed + P5;
    hash += bytes;
    for (; end - at >= 8; at += 8)
        hash = rotated(hash ^ rounded(0, word(at)), 27) * P1 + P4;
    if (end - at >= 4) {
        uint32_t half;
        memcpy(&half, at, sizeof half);
        hash = rotated(hash ^ le32toh(half) * P1, 23) * P2 + P3;
        at += 4;
    }
    for (; at < end; at++)
        hash = rotated(hash ^ *at * P5, 11) * P1;
    hash = (hash ^ hash >> 33) * P2;
    hash = (hash ^ hash >> 29) * P3;
    return hash ^ hash >> 32;
}
