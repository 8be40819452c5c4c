/* userfaultfd(2): the ioctls and nothing else.
 *
 * The ABI is written down here, not taken from <linux/userfaultfd.h>: the headers of a
 * distribution are often older than its kernel (6.1 headers lack WP_UNPOPULATED, POISON, WP_ASYNC
 * and MOVE). Names are the kernel's, so do not include the system's header beside this one;
 * tests/kernel/test_uffd.py compares the two.
 *
 * Every function returns 0 (or a count) or -errno. Addresses are those of the process in which
 * the userfaultfd was created, whoever calls; ranges are half open and page aligned.
 */
#ifndef SNAP_UFFD_H
#define SNAP_UFFD_H

#include <stdint.h>

#define UFFD_API_VERSION 0xAA

/* features of UFFDIO_API */
#define UFFD_FEATURE_PAGEFAULT_FLAG_WP (1 << 0)
#define UFFD_FEATURE_EVENT_FORK (1 << 1)
#define UFFD_FEATURE_EVENT_REMAP (1 << 2)
#define UFFD_FEATURE_EVENT_REMOVE (1 << 3)
#define UFFD_FEATURE_MISSING_HUGETLBFS (1 << 4)
#define UFFD_FEATURE_MISSING_SHMEM (1 << 5)
#define UFFD_FEATURE_EVENT_UNMAP (1 << 6)
#define UFFD_FEATURE_SIGBUS (1 << 7)
#define UFFD_FEATURE_THREAD_ID (1 << 8)
#define UFFD_FEATURE_MINOR_HUGETLBFS (1 << 9)
#define UFFD_FEATURE_MINOR_SHMEM (1 << 10)
#define UFFD_FEATURE_EXACT_ADDRESS (1 << 11)
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM (1 << 12)
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#define UFFD_FEATURE_POISON (1 << 14)
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#define UFFD_FEATURE_MOVE (1 << 16)

/* flags of userfaultfd(2), beside O_CLOEXEC and O_NONBLOCK */
#define UFFD_USER_MODE_ONLY 1

/* modes of UFFDIO_REGISTER */
#define UFFDIO_REGISTER_MODE_MISSING (1 << 0)
#define UFFDIO_REGISTER_MODE_WP (1 << 1)
#define UFFDIO_REGISTER_MODE_MINOR (1 << 2)

/* modes of UFFDIO_COPY, UFFDIO_ZEROPAGE, UFFDIO_WRITEPROTECT, UFFDIO_CONTINUE */
#define UFFDIO_COPY_MODE_DONTWAKE (1 << 0)
#define UFFDIO_COPY_MODE_WP (1 << 1)
#define UFFDIO_ZEROPAGE_MODE_DONTWAKE (1 << 0)
#define UFFDIO_WRITEPROTECT_MODE_WP (1 << 0)
#define UFFDIO_WRITEPROTECT_MODE_DONTWAKE (1 << 1)

/* uffd_message.event */
#define UFFD_EVENT_PAGEFAULT 0x12
#define UFFD_EVENT_FORK 0x13
#define UFFD_EVENT_REMAP 0x14
#define UFFD_EVENT_REMOVE 0x15
#define UFFD_EVENT_UNMAP 0x16

/* flags of a page fault message (arg[0]) */
#define UFFD_PAGEFAULT_FLAG_WRITE (1 << 0)
#define UFFD_PAGEFAULT_FLAG_WP (1 << 1)
#define UFFD_PAGEFAULT_FLAG_MINOR (1 << 2)

/* struct uffd_msg without its union. arg[] is, by event:
 *   PAGEFAULT  flags, address, tid (with THREAD_ID, low 32 bits)
 *   FORK       the new descriptor (low 32 bits)
 *   REMAP      from, to, len
 *   REMOVE, UNMAP  start, end
 */
typedef struct {
    uint8_t event;
    uint8_t reserved1;
    uint16_t reserved2;
    uint32_t reserved3;
    uint64_t arg[3];
} uffd_message;

/* A new userfaultfd of the calling process; flags as userfaultfd(2). Tries the system call, then,
 * when that is denied (EPERM, EACCES) or missing (ENOSYS), /dev/userfaultfd. -> fd */
int uffd_open(int flags);
/* The handshake, once in the life of a userfaultfd. *features: in what is wanted, out what the
 * kernel has; *ioctls (may be NULL): which ioctls on the descriptor itself. EINVAL when a wanted
 * feature is unknown (the handshake may then be repeated), EPERM for EVENT_FORK without
 * CAP_SYS_PTRACE. */
int uffd_api(int fd, uint64_t *features, uint64_t *ioctls);
/* *ioctls (may be NULL): which ioctls the range allows. EBUSY: another userfaultfd has it. */
int uffd_register(int fd, uint64_t start, uint64_t len, uint64_t mode, uint64_t *ioctls);
int uffd_unregister(int fd, uint64_t start, uint64_t len);
/* mode: UFFDIO_WRITEPROTECT_MODE_*. EAGAIN: an event must be read first, nothing was changed or
 * a part; the whole call can be repeated. ENOENT: some of the range is not registered for WP. */
int uffd_writeprotect(int fd, uint64_t start, uint64_t len, uint64_t mode);
/* Fills missing pages at dst from src (of the caller). *copied: bytes that were put in place, also
 * when an error is returned after some. EEXIST: a page is there; ENOENT: not one registered
 * mapping; EAGAIN: only *copied bytes, or an event must be read first; ESRCH: process gone. */
int uffd_copy(int fd, uint64_t dst, const void *src, uint64_t len, uint64_t mode, int64_t *copied);
/* The same with zeros. */
int uffd_zeropage(int fd, uint64_t start, uint64_t len, uint64_t mode, int64_t *zeroed);
/* Wakes the threads that wait for a page of the range; those still missing fault again. */
int uffd_wake(int fd, uint64_t start, uint64_t len);
/* Up to n messages; 0 when there is none now. fd must be O_NONBLOCK. -> count */
int uffd_read_msgs(int fd, uffd_message *messages, int n);
/* 1 when descriptor `number` of process `pid` is the userfaultfd `fd` of ours, 0 when it is something
 * else, -EBADF when it is not open, -ESRCH, -EPERM (kcmp(2)). */
int uffd_is(int fd, int pid, int number);
/* Waits until a message can be read. -> 1 readable, 0 timeout (ms; -1 waits for ever), -EBADF also
 * for POLLERR: the descriptor is unusable. EINTR is not hidden. */
int uffd_poll(int fd, int timeout_ms);
/* The same, for at most timeout_us µs. */
int uffd_poll_us(int fd, uint32_t timeout_us);

/* What became of the pages of one piece of memory. Counts are pages. */
typedef struct {
    uint32_t copied;   /* put in place from the image */
    uint32_t zeroed;   /* put in place as zeros */
    uint32_t present;  /* EEXIST: were there already */
    uint32_t gone;     /* ENOENT: no longer a registered mapping */
    uint32_t wanted;   /* bitmap of pages that are still to do, 0 when all are done */
} uffd_filled;
/* Fills up to 16 pages at dst (page aligned): page i when bit i of `wanted` is set, from src +
 * 4096 * i when bit i of `present` is set and with zeros otherwise. Runs of like pages go in one
 * ioctl each. Waiters are woken also for pages that were there already. Returns 0 when all wanted
 * pages are dealt with; -EAGAIN when an event must be read first, -ESRCH when the process is
 * gone, or another -errno; `filled` then says how far it came and can be continued from. */
int uffd_fill(int fd, uint64_t dst, const void *src, uint32_t wanted, uint32_t present,
              uffd_filled *filled);
/* The same for `chunks` pieces of 16 pages, one behind the other at dst and src, each with its two
 * bitmaps. After `least` of them the userfaultfd is looked at between two: when a message waits there it
 * returns early. *done: pieces that are dealt with; `filled` sums up all. */
int uffd_fill_run(int fd, uint64_t dst, const void *src, uint32_t chunks, uint32_t least,
                  const uint16_t *wanted, const uint16_t *present, uint32_t *done, uffd_filled *filled);

#endif
