/* Reading a delta. */
#pragma once
#include <stdbool.h>

#include "blocks.h"
#include "delta.h"

typedef struct {
    uint32_t present, nonzero, own, based; /* bitmaps of pages; based: those that are the base's */
    uint32_t bytes;                 /* of the payload */
    const char *payload;
    bool packed;
} delta;

/* Whether a value of so many bytes is a delta with this digest, and matches its check. */
bool delta_open(const char *value, uint32_t bytes, const char *digest, delta *found);
/* Its own pages to their places of the 64 KiB at `to`, by way of as many at `room`. Whether they are there. */
bool delta_own_pages(const delta *d, snap_blocks *blocks, char *room, char *to);
/* Pages `which` of 64 KiB at `from` to the same places at `to`. */
void delta_copy(uint32_t which, const char *from, char *to);
