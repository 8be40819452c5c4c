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
/* Compares the address spaces of two processes -> SNAP_KCMP_*. */
int snap_kcmp_memory(int pid, int other);
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
/* All of `count` open files, from their beginnings, one after the other: of file i out[ends[i - 1]] up to
 * out[ends[i]], or ends[i] is -errno. -> 0, ENOSPC: `size` bytes do not hold them. */
int snap_read_files(const int *fds, int count, char *out, uint64_t size, int64_t *ends);
/* unshare(CLONE_FS): working directory, root and umask become the calling thread's own. */
int snap_unshare_directory(void);

/* What /proc says of one descriptor; link and fdinfo follow it, unterminated, then padding to a
 * multiple of 8 bytes. Sockets, pipes and anonymous inodes are not stat'ed: `mode` is 0 and
 * `inode` is the number in their link, if there is one. */
typedef struct {
    uint32_t length; /* of the whole record */
    int32_t fd;
    uint32_t link_length;
    uint32_t info_length;
    uint64_t device;
    uint64_t inode;
    uint64_t size;
    uint64_t blocks; /* of 512 bytes */
    uint64_t rdev;
    uint32_t mode;
    uint32_t links;
    uint32_t flags; /* of open(2), as fdinfo has them */
    uint32_t asks;  /* 1: there is more to be asked, while the process stands still, than this record has */
    int64_t file;   /* the lowest descriptor of the same struct file; as long as nobody asked its own number */
} snap_descriptor;

#define SNAP_LINK_MAX 4096

/* A snap_descriptor for every descriptor of the process, in the order of /proc; one that is closed
 * meanwhile is left out. only_files: so are sockets, pipes and anonymous inodes, unread. -> bytes used
 * of `buffer` (8-byte aligned); ENOSPC when it is too small: try again with a larger one. EACCES,
 * ENOENT, ESRCH as open(2) of /proc/PID/fd. */
int64_t snap_descriptors_read(int pid, int only_files, char *buffer, uint64_t size);
/* The same descriptors once more, in half the time: what it takes is looked up and opened before.
 * `buffer` is what snap_descriptors_read found without only_files. -> 0 or -errno; the caller
 * forgets *known. */
typedef struct snap_known_descriptors snap_known_descriptors;
int snap_descriptors_know(int pid, const char *buffer, uint64_t used, snap_known_descriptors **known);
/* As snap_descriptors_read. ESTALE: they are others by now, or this kernel does not tell how many they
 * are. */
int64_t snap_descriptors_read_known(const snap_known_descriptors *known, char *buffer, uint64_t size);
/* NULL is allowed. */
void snap_descriptors_forget(snap_known_descriptors *known);
/* Finds which of those records share a struct file (`file`), by kcmp(2): of one inode. 0 or -errno. */
int snap_descriptors_group(int pid, char *buffer, uint64_t used);

/* An option that sockets of a kind are asked for: at most `size` bytes. */
typedef struct {
    int32_t domain;
    int32_t type;
    int32_t level;
    int32_t option;
    int32_t size;
} snap_socket_option;

#define SNAP_ANSWER_HEAD 4 /* before the bytes of an answer: the number of its row, how many: 16 bits each */

typedef struct {
    int32_t error; /* 0, or -errno: then nothing else is said */
    int32_t domain;
    int32_t type;
    int32_t protocol;
    int32_t listening;
    int32_t state;   /* of TCP: tcpi_state, 0 unknown */
    int32_t backlog; /* of a listening TCP socket */
    int32_t waiting; /* bytes to read (SIOCINQ), -1 unknown */
    int32_t events;  /* POLLIN, POLLHUP, POLLRDHUP now */
    int32_t local_length;
    int32_t peer_length; /* 0 without a peer */
    uint8_t local[128];
    uint8_t peer[128];
    int32_t options_length;
    uint8_t options[1536]; /* of the options that it has */
} snap_socket;

/* Looks at sockets of the process, each through a copy of its descriptor, closed again at once, and asks
 * them for the options of their kind. `error`: ENOTSOCK, and the errors of pidfd_getfd(2). */
void snap_sockets_look(int pidfd, int count, const int *fds, int options, const snap_socket_option *rows,
                       snap_socket *out);

/* inotify_init1, inotify_add_watch, inotify_rm_watch. */
int snap_inotify_create(int flags);
int snap_inotify_add(int fd, const char *path, uint32_t mask);
int snap_inotify_remove(int fd, int watch);
/* open_by_handle_at(2) with O_PATH: the file that a handle (`length` bytes) of the file system of
 * `mount` names. Needs CAP_DAC_READ_SEARCH; ESTALE: there is no such file any more. */
int snap_open_handle(int mount, int type, const char *handle, uint32_t length);
