#ifndef SNAP_CLAIM_H
#define SNAP_CLAIM_H

#include <stdint.h>

/* Puts `to` into *word, in memory that processes share, if it holds `from`: 1, else 0. Whatever the
 * caller has written before is seen by everybody before this, as a full barrier. */
int snap_claim(uint64_t *word, uint64_t from, uint64_t to);

#endif
