/* Chunk values that are deltas: some pages of their own, the others those of a base (docs/image-format.md). */
#ifndef SNAP_DELTA_H
#define SNAP_DELTA_H

#include <stdint.h>

#define SNAP_DELTA 5
/* Header, header of the payload, check. */
#define SNAP_DELTA_HEADS 40

/* The check of a delta: of the 32 bytes before it, and the `bytes` of its payload. */
uint64_t snap_delta_check(const char *heads, const char *payload, uint32_t bytes);

#endif
