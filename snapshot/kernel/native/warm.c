#define _GNU_SOURCE
#include "warm.h"

#include "pagemap.h"

#include <errno.h>
#include <sched.h>
#include <sys/uio.h>

#define PAGE 4096
#define FOUND 256
#define AT_ONCE 64 /* cold, 0.3 ms and more: others may want this processor, and come first */

/* Through the kernel, also ours: what it reads is used as much, and it is no error if a page is gone. */
static int64_t read_pages(int pid, uint64_t start, uint64_t end)
{
    char bytes[AT_ONCE];
    struct iovec here = {bytes, 0}, there[AT_ONCE];
    int64_t touched = 0;
    while (start < end) {
        unsigned long n = 0;
        for (; n < AT_ONCE && start < end; start += PAGE)
            there[n++] = (struct iovec){(void *)(uintptr_t)start, 1};
        here.iov_len = n;
        const ssize_t got = process_vm_readv(pid, &here, 1, there, n, 0);
        touched += got > 0 ? got : 0;
        sched_yield();
    }
    return touched;
}

int64_t snap_warm(int pid, int pagemap, int anonymous, const uint64_t *ranges, uint64_t count)
{
    const uint64_t inverted = anonymous ? SNAP_PAGE_FILE : 0, mask = SNAP_PAGE_PRESENT | inverted;
    snap_page_range found[FOUND];
    int64_t touched = 0;
    for (uint64_t i = 0; i < count; i++) {
        const uint64_t end = ranges[2 * i + 1];
        for (uint64_t next = ranges[2 * i]; next < end;) {
            const int64_t n = snap_pagemap_scan(pagemap, next, end, inverted, mask, 0, found, FOUND, &next);
            if (n == -ENOTTY)
                return n;
            if (n < 0)
                break;
            for (int64_t k = 0; k < n; k++)
                touched += read_pages(pid, found[k].start, found[k].end);
        }
    }
    return touched;
}
