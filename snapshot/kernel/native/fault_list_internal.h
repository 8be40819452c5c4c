#ifndef SNAP_FAULT_LIST_INTERNAL_H
#define SNAP_FAULT_LIST_INTERNAL_H
#include <stdatomic.h>
#include <stdint.h>

#define SNAP_RING_SIZE 65536 /* a power of 2 */

/* The i-th fault since the list was opened is at[i % SNAP_RING_SIZE]. `forks`: each makes a page fault once more
 * that had been let through. */
struct snap_fault_ring {
    _Atomic(uint64_t) forks, count;
    uint64_t at[SNAP_RING_SIZE]; /* addresses, to the byte */
};

#endif
