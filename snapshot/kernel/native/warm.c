#define _GNU_SOURCE
#include "warm.h"

#include "pagemap.h"

#include <errno.h>
#include <sched.h>
#include <sys/uio.h>
#include <time.h>

#define PAGE 4096
#define FOUND 256
#define AT_ONCE 64
#define TURN_NS INT64_C(300000)
#define GIVEN_NS INT64_C(10000000) /* who competes with many that never wait gets a turn in 100 ms */

/* Others may want this processor, and come first: after TURN_NS each time, until GIVEN_NS are spent so. */
struct turns {
    int64_t began_ns, given_ns;
};

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static void give_way(struct turns *t)
{
    const int64_t now = now_ns();
    if (now - t->began_ns < TURN_NS || t->given_ns > GIVEN_NS)
        return;
    sched_yield();
    t->began_ns = now_ns();
    t->given_ns += t->began_ns - now;
}

/* Through the kernel, also ours: what it reads is used as much, and it is no error if a page is gone. */
static int64_t read_pages(int pid, uint64_t start, uint64_t end, struct turns *turns)
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
        give_way(turns);
    }
    return touched;
}

int64_t snap_warm(int pid, int pagemap, int anonymous, const uint64_t *ranges, uint64_t count)
{
    const uint64_t inverted = anonymous ? SNAP_PAGE_FILE : 0, mask = SNAP_PAGE_PRESENT | inverted;
    snap_page_range found[FOUND];
    struct turns turns = {now_ns(), 0};
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
                touched += read_pages(pid, found[k].start, found[k].end, &turns);
        }
    }
    return touched;
}
