#define _GNU_SOURCE
#include "descriptors.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kcmp.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/vfs.h>
#include <unistd.h>

#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif
#ifndef TFD_IOC_SET_TICKS
#define TFD_IOC_SET_TICKS _IOW('T', 0, uint64_t)
#endif

#define NS_PER_SECOND 1000000000

int snap_pidfd_getfd(int pidfd, int fd) {
    long got = syscall(SYS_pidfd_getfd, pidfd, fd, 0);
    return got < 0 ? -errno : (int)got;
}

int snap_kcmp_file(int pid, int a, int b) {
    long order = syscall(SYS_kcmp, pid, pid, KCMP_FILE, (unsigned long)a, (unsigned long)b);
    return order < 0 ? -errno : (int)order;
}

int snap_kcmp_epoll(int pid, int fd, int efd, uint32_t tfd, uint32_t nth) {
    struct kcmp_epoll_slot slot = {.efd = (uint32_t)efd, .tfd = tfd, .toff = nth};
    long order = syscall(SYS_kcmp, pid, pid, KCMP_EPOLL_TFD, (unsigned long)fd, &slot);
    return order < 0 ? -errno : (int)order;
}

int64_t snap_tee(int from, int to, uint64_t length) {
    ssize_t got = tee(from, to, length, SPLICE_F_NONBLOCK);
    return got < 0 ? -errno : (int64_t)got;
}

int snap_timerfd_create(int clock, int flags) {
    int fd = timerfd_create(clock, flags | TFD_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

int snap_timerfd_settime(int fd, int flags, int64_t value_ns, int64_t interval_ns) {
    struct itimerspec timer = {
        .it_value = {value_ns / NS_PER_SECOND, value_ns % NS_PER_SECOND},
        .it_interval = {interval_ns / NS_PER_SECOND, interval_ns % NS_PER_SECOND},
    };
    return timerfd_settime(fd, flags, &timer, NULL) < 0 ? -errno : 0;
}

int snap_timerfd_set_ticks(int fd, uint64_t ticks) {
    return ioctl(fd, TFD_IOC_SET_TICKS, &ticks) < 0 ? -errno : 0;
}

int snap_signalfd(uint64_t mask, int flags) {
    /* The system call itself: glibc's sigset_t is larger, its wrapper hides signals 32 and 33. */
    long fd = syscall(SYS_signalfd4, -1, &mask, sizeof mask, flags | SFD_CLOEXEC);
    return fd < 0 ? -errno : (int)fd;
}

int64_t snap_filesystem_type(int fd) {
    struct statfs what;
    return fstatfs(fd, &what) < 0 ? -errno : (int64_t)(uint32_t)what.f_type;
}

int snap_unshare_directory(void) {
    return unshare(CLONE_FS) < 0 ? -errno : 0;
}
