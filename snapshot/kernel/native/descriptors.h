/* What a descriptor table needs and Python's os module lacks: another process's descriptors
 * (pidfd_getfd, kcmp), looking into a pipe (tee), timerfd and signalfd. Each is one system call.
 * Every function returns a number >= 0 or -errno. */
#pragma once
#include <stdint.h>

/* order of two struct files, as kcmp(2) says it */
#define SNAP_KCMP_SAME 0
#define SNAP_KCMP_LESS 1
#define SNAP_KCMP_GREATER 2

/* -> a descriptor of the caller (close-on-exec) for descriptor fd of the process. Needs ptrace
 * access (EPERM); EBADF: not open there; ESRCH: the process is gone. The caller closes it. */
int snap_pidfd_getfd(int pidfd, int fd);
/* Compares the struct files of descriptor a and b of a process -> SNAP_KCMP_*. Needs ptrace
 * access; ENOSYS: a kernel without CONFIG_KCMP. */
int snap_kcmp_file(int pid, int a, int b);
/* Is the file of descriptor fd what epoll descriptor efd watches as the `nth` (from 0, in the
 * order of fdinfo) of its registrations numbered tfd? -> SNAP_KCMP_*; ENOENT: no such one. */
int snap_kcmp_epoll(int pid, int fd, int efd, uint32_t tfd, uint32_t nth);
/* Duplicates up to length bytes of pipe `from` into pipe `to` without consuming or waiting.
 * -> bytes, 0 for an empty pipe without writers, EAGAIN for an empty one with. */
int64_t snap_tee(int from, int to, uint64_t length);
/* flags: TFD_NONBLOCK (O_NONBLOCK) or 0. -> a descriptor, close-on-exec. */
int snap_timerfd_create(int clock, int flags);
/* flags: TFD_TIMER_ABSTIME 1, TFD_TIMER_CANCEL_ON_SET 2; times in ns, value 0 disarms. */
int snap_timerfd_settime(int fd, int flags, int64_t value_ns, int64_t interval_ns);
/* Sets the expirations that the next read returns, not 0. ENOTTY: a kernel without it. */
int snap_timerfd_set_ticks(int fd, uint64_t ticks);
/* mask: bit n-1 is signal n. -> a descriptor, close-on-exec. */
int snap_signalfd(uint64_t mask, int flags);
/* f_type of fstatfs(2). */
int64_t snap_filesystem_type(int fd);
/* unshare(CLONE_FS): working directory, root and umask become the calling thread's own. */
int snap_unshare_directory(void);
