#ifndef SNAP_CONTENT_H
#define SNAP_CONTENT_H

#include <stdint.h>

#define SNAP_NOISE 65536

/* Of the pages `present` (bit i: the 4 KiB at i * 4096) of the 64 KiB at data: those that hold
 * anything but zeros; and SNAP_NOISE, when a sample of these has all bytes about equally
 * often, as what was compressed or encrypted has: no compressor makes that smaller. (A repetition of
 * noise is taken for noise too: that costs space.) */
uint32_t snap_content(const char *data, uint32_t present);

/* Bit i: the 4 KiB at i * 4096 of the 64 KiB at a are other than those at b. */
uint32_t snap_differing(const char *a, const char *b);

#endif
