#ifndef SNAP_FORGET_H
#define SNAP_FORGET_H

#include <stdint.h>

/* Takes the pages of [start, end) out of the page tables of this process; whoever reads them next
 * finds them in the page cache. The caller knows that a file is mapped there, shared: of memory that
 * is its own the bytes would be lost. -> 0 or -errno. */
int snap_forget(uint64_t start, uint64_t end);

#endif
