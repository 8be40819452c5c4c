#define _GNU_SOURCE
#include "uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kcmp.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* struct uffdio_* of the kernel's uapi, laid out as there */
struct api { uint64_t api, features, ioctls; };
struct range { uint64_t start, len; };
struct reg { struct range range; uint64_t mode, ioctls; };
struct copy { uint64_t dst, src, len, mode; int64_t copied; };
struct zeropage { struct range range; uint64_t mode; int64_t zeroed; };
struct writeprotect { struct range range; uint64_t mode; };

#define IOC_NEW _IO(0xAA, 0x00)
#define IOC_API _IOWR(0xAA, 0x3F, struct api)
#define IOC_REGISTER _IOWR(0xAA, 0x00, struct reg)
#define IOC_UNREGISTER _IOR(0xAA, 0x01, struct range)
#define IOC_WAKE _IOR(0xAA, 0x02, struct range)
#define IOC_COPY _IOWR(0xAA, 0x03, struct copy)
#define IOC_ZEROPAGE _IOWR(0xAA, 0x04, struct zeropage)
#define IOC_WRITEPROTECT _IOWR(0xAA, 0x06, struct writeprotect)

#define PAGE_BYTES 4096u
#define CHUNK_PAGES 16u

static int call(int fd, unsigned long request, void *argument)
{
    return ioctl(fd, request, argument) < 0 ? -errno : 0;
}

int uffd_open(int flags)
{
    int fd = (int)syscall(SYS_userfaultfd, flags);
    if (fd >= 0)
        return fd;
    int first = -errno;
    if (first != -EPERM && first != -EACCES && first != -ENOSYS)
        return first;
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device < 0)
        return first;
    fd = ioctl(device, IOC_NEW, flags);
    int second = -errno;
    close(device);
    return fd >= 0 ? fd : second;
}

int uffd_api(int fd, uint64_t *features, uint64_t *ioctls)
{
    struct api api = {.api = UFFD_API_VERSION, .features = *features};
    int error = call(fd, IOC_API, &api);
    if (error)
        return error;
    *features = api.features;
    if (ioctls)
        *ioctls = api.ioctls;
    return 0;
}

int uffd_register(int fd, uint64_t start, uint64_t len, uint64_t mode, uint64_t *ioctls)
{
    struct reg reg = {.range = {start, len}, .mode = mode};
    int error = call(fd, IOC_REGISTER, &reg);
    if (!error && ioctls)
        *ioctls = reg.ioctls;
    return error;
}

int uffd_unregister(int fd, uint64_t start, uint64_t len)
{
    struct range range = {start, len};
    return call(fd, IOC_UNREGISTER, &range);
}

int uffd_writeprotect(int fd, uint64_t start, uint64_t len, uint64_t mode)
{
    struct writeprotect wp = {.range = {start, len}, .mode = mode};
    return call(fd, IOC_WRITEPROTECT, &wp);
}

int uffd_copy(int fd, uint64_t dst, const void *src, uint64_t len, uint64_t mode, int64_t *copied)
{
    struct copy copy = {.dst = dst, .src = (uint64_t)(uintptr_t)src, .len = len, .mode = mode};
    int error = call(fd, IOC_COPY, &copy);
    /* the kernel puts -errno there when nothing was copied */
    *copied = copy.copied > 0 ? copy.copied : 0;
    return error;
}

int uffd_zeropage(int fd, uint64_t start, uint64_t len, uint64_t mode, int64_t *zeroed)
{
    struct zeropage zero = {.range = {start, len}, .mode = mode};
    int error = call(fd, IOC_ZEROPAGE, &zero);
    *zeroed = zero.zeroed > 0 ? zero.zeroed : 0;
    return error;
}

int uffd_wake(int fd, uint64_t start, uint64_t len)
{
    struct range range = {start, len};
    return call(fd, IOC_WAKE, &range);
}

int uffd_read_msgs(int fd, uffd_message *messages, int n)
{
    ssize_t got = read(fd, messages, sizeof *messages * (size_t)n);
    if (got < 0)
        return errno == EAGAIN ? 0 : -errno;
    return (int)((size_t)got / sizeof *messages);
}

int uffd_is(int fd, int pid, int number)
{
    long order = syscall(SYS_kcmp, getpid(), pid, KCMP_FILE, fd, number);
    return order < 0 ? -errno : order == 0;
}

static int polled(int ready, const struct pollfd *poller)
{
    if (ready < 0)
        return -errno;
    if (ready > 0 && !(poller->revents & POLLIN))
        return -EBADF;
    return ready;
}

int uffd_poll(int fd, int timeout_ms)
{
    struct pollfd poller = {.fd = fd, .events = POLLIN};
    return polled(poll(&poller, 1, timeout_ms), &poller);
}

int uffd_poll_us(int fd, uint32_t timeout_us)
{
    struct pollfd poller = {.fd = fd, .events = POLLIN};
    struct timespec timeout = {timeout_us / 1000000, timeout_us % 1000000 * 1000};
    return polled(ppoll(&poller, 1, &timeout, NULL), &poller);
}

static int fill_run(int fd, uint64_t dst, const char *src, uint64_t len, int data, int64_t *done)
{
    if (data)
        return uffd_copy(fd, dst, src, len, 0, done);
    return uffd_zeropage(fd, dst, len, 0, done);
}

int uffd_fill(int fd, uint64_t dst, const void *src, uint32_t wanted, uint32_t present,
              uffd_filled *filled)
{
    *filled = (uffd_filled){.wanted = wanted};
    uint32_t single = 0; /* pages to try alone: their run crossed the border of a mapping */
    for (uint32_t i = 0; i < CHUNK_PAGES;) {
        if (!(filled->wanted & (1u << i))) {
            i++;
            continue;
        }
        int data = (present >> i) & 1;
        uint32_t end = i + 1;
        while (!(single & (1u << i)) && end < CHUNK_PAGES && (filled->wanted & (1u << end)) &&
               ((present >> end) & 1) == (uint32_t)data)
            end++;
        int64_t done = 0;
        uint64_t at = (uint64_t)i * PAGE_BYTES;
        int error = fill_run(fd, dst + at, (const char *)src + at,
                             (uint64_t)(end - i) * PAGE_BYTES, data, &done);
        uint32_t pages = (uint32_t)(done / PAGE_BYTES);
        for (uint32_t page = i; page < i + pages; page++)
            filled->wanted &= ~(1u << page);
        if (data)
            filled->copied += pages;
        else
            filled->zeroed += pages;
        i += pages;
        if (!error || (error == -EAGAIN && pages))
            continue; /* EAGAIN after some pages: the next try tells the real reason */
        if (error == -ENOENT && end - i > 1) {
            for (uint32_t page = i; page < end; page++)
                single |= 1u << page;
        } else if (error == -EEXIST || error == -ENOENT) {
            if (error == -EEXIST)
                filled->present++;
            else
                filled->gone++;
            filled->wanted &= ~(1u << i);
            /* A thread may wait for a page that came or went between its fault and our turn. */
            error = uffd_wake(fd, dst + (uint64_t)i * PAGE_BYTES, PAGE_BYTES);
            if (error == -ESRCH)
                return error;
            i++;
        } else {
            return error;
        }
    }
    return 0;
}

int uffd_fill_run(int fd, uint64_t dst, const void *src, uint32_t chunks, uint32_t least,
                  const uint16_t *wanted, const uint16_t *present, uint32_t *done, uffd_filled *filled)
{
    uint64_t bytes = (uint64_t)CHUNK_PAGES * PAGE_BYTES;
    *filled = (uffd_filled){0};
    for (*done = 0; *done < chunks; ++*done) {
        if (*done >= least && uffd_poll(fd, 0) > 0)
            return 0;
        uffd_filled one;
        int error = uffd_fill(fd, dst + *done * bytes, (const char *)src + *done * bytes,
                              wanted[*done], present[*done], &one);
        filled->copied += one.copied;
        filled->zeroed += one.zeroed;
        filled->present += one.present;
        filled->gone += one.gone;
        filled->wanted = one.wanted;
        if (error)
            return error;
    }
    return 0;
}
