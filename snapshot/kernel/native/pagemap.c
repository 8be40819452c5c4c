#include "pagemap.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* Debian 12's headers (6.1) are older than this ABI; layout of struct pm_scan_arg in Linux 6.7. */
struct scan_arg {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define PM_SCAN_WP_MATCHING 1
#define PM_SCAN_CHECK_WPASYNC 2
#define PAGEMAP_SCAN_IOCTL _IOWR('f', 16, struct scan_arg)

#define PAGE_SHIFT 12
/* Documentation/admin-guide/mm/pagemap.rst */
#define PM_FRAME ((UINT64_C(1) << 55) - 1)
#define PM_UFFD_WP (UINT64_C(1) << 57)
#define PM_SWAP (UINT64_C(1) << 62)
/* The type of a swap entry, all bits set: SWP_PTE_MARKER, the last of them (include/linux/swap.h). No
 * swap file has it, nor a page that moves. */
#define PM_SWAP_TYPE UINT64_C(31)

static int64_t scan(int fd, struct scan_arg *arg)
{
    int found;
    do {
        found = ioctl(fd, PAGEMAP_SCAN_IOCTL, arg);
    } while (found < 0 && errno == EINTR);
    return found < 0 ? -errno : found;
}

int64_t snap_pagemap_scan(int fd, uint64_t start, uint64_t end, uint64_t inverted, uint64_t mask,
                          uint64_t anyof, snap_page_range *out, uint64_t capacity, uint64_t *next)
{
    struct scan_arg arg = {
        .size = sizeof arg, .start = start, .end = end,
        .vec = (uintptr_t)out, .vec_len = capacity,
        .category_inverted = inverted, .category_mask = mask, .category_anyof_mask = anyof,
        .return_mask = SNAP_PAGE_WRITTEN | SNAP_PAGE_FILE | SNAP_PAGE_PRESENT | SNAP_PAGE_SWAPPED |
                       SNAP_PAGE_HUGE,
    };
    int64_t found = scan(fd, &arg);
    if (found >= 0)
        *next = arg.walk_end;
    return found;
}

int64_t snap_pagemap_written(int fd, uint64_t start, uint64_t end, int protect, snap_page_range *out,
                             uint64_t capacity, uint64_t *next)
{
    /* Exactly these masks: the kernel has a fast way for them (pagemap_scan_pmd_entry). */
    struct scan_arg arg = {
        .size = sizeof arg, .flags = protect ? PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC : 0,
        .start = start, .end = end, .vec = (uintptr_t)out, .vec_len = capacity,
        .category_mask = SNAP_PAGE_WRITTEN, .return_mask = SNAP_PAGE_WRITTEN,
    };
    int64_t found = scan(fd, &arg);
    if (found >= 0)
        *next = arg.walk_end;
    return found;
}

int64_t snap_pagemap_first(int fd, uint64_t start, uint64_t end, uint64_t inverted, uint64_t mask,
                           uint64_t anyof, uint64_t *first)
{
    snap_page_range one;
    struct scan_arg arg = {
        .size = sizeof arg, .start = start, .end = end, .vec = (uintptr_t)&one, .vec_len = 1,
        .max_pages = 1,
        .category_inverted = inverted, .category_mask = mask, .category_anyof_mask = anyof,
        .return_mask = SNAP_PAGE_PRESENT,
    };
    int64_t found = scan(fd, &arg);
    if (found > 0)
        *first = one.start;
    return found;
}

/* Bit i of *bits: the entry of page i has all of `mask` set. */
static int entries(int fd, uint64_t start, unsigned pages, uint64_t mask, uint64_t *bits)
{
    uint64_t found[64];
    if (pages > 64)
        return -EINVAL;
    ssize_t want = (ssize_t)(pages * sizeof found[0]);
    ssize_t got = pread(fd, found, (size_t)want, (off_t)((start >> PAGE_SHIFT) * sizeof found[0]));
    if (got < 0)
        return -errno;
    if (got != want)
        return -ESRCH; /* the address space has ended: pagemap reads as empty */
    *bits = 0;
    for (unsigned i = 0; i < pages; i++)
        if ((found[i] & mask) == mask)
            *bits |= UINT64_C(1) << i;
    return 0;
}

int snap_pagemap_armed(int fd, uint64_t start, unsigned pages, uint64_t *armed)
{
    return entries(fd, start, pages, PM_UFFD_WP, armed);
}

int snap_pagemap_empty(int fd, uint64_t start, unsigned pages, uint64_t *empty)
{
    return entries(fd, start, pages, PM_SWAP | PM_SWAP_TYPE, empty);
}

int snap_pagemap_tells(void)
{
    uint64_t entry = 0;
    uint64_t page = (uint64_t)(uintptr_t)&entry >> PAGE_SHIFT;
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    ssize_t got = pread(fd, &entry, sizeof entry, (off_t)(page * sizeof entry));
    close(fd);
    return got == sizeof entry && entry & PM_FRAME;
}
