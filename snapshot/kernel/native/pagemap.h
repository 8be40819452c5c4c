/* /proc/PID/pagemap: which pages hold what (PAGEMAP_SCAN, Linux 6.7) and which are armed. */
#pragma once
#include <stdint.h>

/* Page categories of PAGEMAP_SCAN (include/uapi/linux/fs.h). */
#define SNAP_PAGE_WPALLOWED 1
#define SNAP_PAGE_WRITTEN 2
#define SNAP_PAGE_FILE 4
#define SNAP_PAGE_PRESENT 8
#define SNAP_PAGE_SWAPPED 16
#define SNAP_PAGE_PFNZERO 32
#define SNAP_PAGE_HUGE 64

typedef struct {
    uint64_t start; /* half open, page aligned addresses */
    uint64_t end;
    uint64_t categories;
} snap_page_range;

/* Scans [start, end) of the process whose pagemap is `fd` for pages with (categories ^ inverted)
 * holding all of `mask` and any of `anyof` (0: no such demand); at most `capacity` ranges go to
 * `out`. *next is where to go on, `end` when done.
 * Returns the number of ranges, or -errno (ENOTTY: a kernel before 6.7). */
int64_t snap_pagemap_scan(int fd, uint64_t start, uint64_t end, uint64_t inverted, uint64_t mask,
                          uint64_t anyof, snap_page_range *out, uint64_t capacity, uint64_t *next);

/* The pages of [start, end) that were written since they were protected, or never were, registered with
 * WP_ASYNC or not; empty ones perhaps among them. `protect`: protects them in the same moment, so that
 * none is written in between; then -EPERM: some of it is not registered so. Results as above. */
int64_t snap_pagemap_written(int fd, uint64_t start, uint64_t end, int protect, snap_page_range *out,
                             uint64_t capacity, uint64_t *next);

/* The first page of [start, end) with such categories: *first is its address, which stays as it is
 * when there is none. Returns 0 or 1, or -errno. */
int64_t snap_pagemap_first(int fd, uint64_t start, uint64_t end, uint64_t inverted, uint64_t mask,
                           uint64_t anyof, uint64_t *first);

/* Which of the `pages` (at most 64) pages from `start` are write-protected through userfaultfd:
 * bit i of *armed is page i. Returns 0, -ESRCH when the address space is gone, or -errno. */
int snap_pagemap_armed(int fd, uint64_t start, unsigned pages, uint64_t *armed);

/* Which of them hold nothing, but are protected all the same (UFFD_FEATURE_WP_UNPOPULATED): of the
 * pages that are neither present nor without protection, which PAGEMAP_SCAN calls swapped. Means
 * nothing unless snap_pagemap_tells. Results as above. */
int snap_pagemap_empty(int fd, uint64_t start, unsigned pages, uint64_t *empty);
/* Whether pagemap tells this process what kind of swap entry a page is (CAP_SYS_ADMIN). */
int snap_pagemap_tells(void);
