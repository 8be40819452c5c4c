/* XXH64, of the xxHash specification 0.1.1: a fast check for bits that have flipped. */
#pragma once
#include <stddef.h>
#include <stdint.h>

uint64_t snap_xxh64(const void *data, size_t bytes, uint64_t seed);
