/* LD_PRELOAD: a machine that fails, for one program.
 *
 * BAD_DISK=FILE: while FILE exists the calls that BAD_CALLS names ("write", "sync") fail with EIO, for
 * regular files but stdout and stderr. BAD_CLOCK: the wall clock jumps an hour back and forth, at every look at it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define JUMP 3600

static int fails(int fd, const char *call)
{
    const char *bad = getenv("BAD_DISK"), *calls = getenv("BAD_CALLS");
    struct stat file;
    if (!bad || !calls || !strstr(calls, call) || access(bad, F_OK))
        return 0;
    if (fd >= 0 && (fd <= STDERR_FILENO || fstat(fd, &file) || !S_ISREG(file.st_mode)))
        return 0;
    errno = EIO;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t pwrite(int fd, const void *bytes, size_t size, off_t offset)
{
    return fails(fd, "write") ? -1 : REAL(pwrite)(fd, bytes, size, offset);
}

ssize_t pwrite64(int fd, const void *bytes, size_t size, off64_t offset)
{
    return fails(fd, "write") ? -1 : REAL(pwrite64)(fd, bytes, size, offset);
}

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset)
{
    return fails(fd, "write") ? -1 : REAL(pwritev)(fd, parts, count, offset);
}

ssize_t write(int fd, const void *bytes, size_t size)
{
    return fails(fd, "write") ? -1 : REAL(write)(fd, bytes, size);
}

int fdatasync(int fd)
{
    return fails(fd, "sync") ? -1 : REAL(fdatasync)(fd);
}

int fsync(int fd)
{
    return fails(fd, "sync") ? -1 : REAL(fsync)(fd);
}

int msync(void *address, size_t length, int flags)
{
    return fails(-1, "sync") ? -1 : REAL(msync)(address, length, flags);
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    static _Atomic(unsigned) looks;
    static const char *bad;
    static int known;
    int result = REAL(clock_gettime)(clock, now);
    if (!known) {
        bad = getenv("BAD_CLOCK");
        known = 1;
    }
    if (bad && result == 0 && clock == CLOCK_REALTIME)
        now->tv_sec += looks++ % 2 ? JUMP : -JUMP;
    return result;
}
