/* LD_PRELOAD: a disk that has stopped answering, for one program. fdatasync(2) does not return while the
 * file $STUCK_DISK exists; files without a name (what spills) cannot be written at all. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

int fdatasync(int fd)
{
    static int (*real)(int);
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "fdatasync");
    const char *stuck = getenv("STUCK_DISK");
    while (stuck && access(stuck, F_OK) == 0)
        usleep(1000);
    return real(fd);
}

ssize_t pwrite(int fd, const void *bytes, size_t size, off_t offset)
{
    static ssize_t (*real)(int, const void *, size_t, off_t);
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "pwrite");
    struct stat file;
    if (getenv("STUCK_DISK") && fstat(fd, &file) == 0 && S_ISREG(file.st_mode) && file.st_nlink == 0) {
        errno = ENOSPC;
        return -1;
    }
    return real(fd, bytes, size, offset);
}
