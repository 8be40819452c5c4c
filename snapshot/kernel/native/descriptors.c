#define _GNU_SOURCE
#include "descriptors.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kcmp.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
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
#define MOST_OPEN 64 /* of fdinfo, at once: of 1,024 descriptors that a process may have by default */

int snap_pidfd_getfd(int pidfd, int fd) {
    long got = syscall(SYS_pidfd_getfd, pidfd, fd, 0);
    return got < 0 ? -errno : (int)got;
}

int snap_kcmp_file(int pid, int a, int b) {
    long order = syscall(SYS_kcmp, pid, pid, KCMP_FILE, (unsigned long)a, (unsigned long)b);
    return order < 0 ? -errno : (int)order;
}

int snap_kcmp_memory(int pid, int other) {
    long order = syscall(SYS_kcmp, pid, other, KCMP_VM, 0, 0);
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

static int open_directory(int pid, const char *name) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", pid, name);
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

static int open_in(int directory, const char *name) {
    int fd = openat(directory, name, O_RDONLY | O_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

/* -> bytes read, or -errno */
static int64_t read_from_start(int fd, char *to, uint64_t room) {
    uint64_t have = 0;
    ssize_t got = 1;
    while (got > 0 && have < room) {
        got = pread(fd, to + have, room - have, (off_t)have);
        if (got > 0)
            have += (uint64_t)got;
    }
    return got < 0 ? -errno : (int64_t)have;
}

static int64_t read_whole(int directory, const char *name, char *to, uint64_t room) {
    int fd = open_in(directory, name);
    if (fd < 0)
        return fd;
    int64_t have = read_from_start(fd, to, room);
    close(fd);
    return have;
}

static size_t count_records(const char *buffer, uint64_t used) {
    size_t count = 0;
    for (uint64_t at = 0; at < used; at += ((const snap_descriptor *)(buffer + at))->length)
        count++;
    return count;
}

static int has_no_file(const char *link) {
    return !strncmp(link, "socket:[", 8) || !strncmp(link, "pipe:[", 6) ||
           !strncmp(link, "anon_inode:", 11);
}

/* The flags in "pos:\t0\nflags:\t0100002\n…": seq_show, fs/proc/fd.c */
static uint32_t flags_in(const char *info, uint64_t length) {
    const char *at = memmem(info, length, "flags:\t", 7), *end = info + length;
    uint32_t flags = 0;
    for (at = at ? at + 7 : end; at < end && *at >= '0' && *at <= '7'; at++)
        flags = flags * 8 + (uint32_t)(*at - '0');
    return flags;
}

/* Of a file with a name the record tells all, and of two others; not which signals it sends (FASYNC), nor
 * what is in a pipe. */
static uint32_t asks(const snap_descriptor *one, const char *link) {
    if (one->flags & FASYNC)
        return 1;
    if (!one->mode)
        return strcmp(link, "anon_inode:[eventfd]") && strcmp(link, "anon_inode:[signalfd]");
    return !one->links || S_ISFIFO(one->mode);
}

/* Fills one record. info: its fdinfo, open, or -1. -> its length, 0 when the descriptor is gone or not
 * wanted, or -errno. */
static int64_t read_one(int links, int infos, const char *name, int info, int only_files, char *to,
                        uint64_t room) {
    snap_descriptor *one = (snap_descriptor *)to;
    if (room < sizeof *one + SNAP_LINK_MAX + 8)
        return -ENOSPC;
    memset(one, 0, sizeof *one);
    one->fd = one->file = atoi(name);
    char *link = to + sizeof *one;
    ssize_t length = readlinkat(links, name, link, SNAP_LINK_MAX - 1);
    if (length < 0)
        return errno == ENOENT ? 0 : -errno;
    link[length] = 0;
    one->link_length = (uint32_t)length;
    if (has_no_file(link)) {
        if (only_files)
            return 0;
        const char *number = strchr(link, '[');
        one->inode = number ? strtoull(number + 1, NULL, 10) : 0;
    } else {
        struct stat st;
        if (fstatat(links, name, &st, 0) < 0)
            return errno == ENOENT ? 0 : -errno;
        one->device = st.st_dev;
        one->inode = st.st_ino;
        one->size = (uint64_t)st.st_size;
        one->blocks = (uint64_t)st.st_blocks;
        one->rdev = st.st_rdev;
        one->mode = st.st_mode;
        one->links = (uint32_t)st.st_nlink;
    }
    room -= sizeof *one + (uint64_t)length + 1 + 8; /* a record is padded with at most 7 bytes */
    char *told = link + length + 1;
    int64_t got = info < 0 ? read_whole(infos, name, told, room) : read_from_start(info, told, room);
    if (got < 0)
        return got == -ENOENT ? 0 : got;
    if ((uint64_t)got == room)
        return -ENOSPC; /* there may be more */
    one->flags = flags_in(told, (uint64_t)got);
    one->asks = asks(one, link);
    memmove(link + length, told, (size_t)got);
    one->info_length = (uint32_t)got;
    one->length = (uint32_t)(sizeof *one + (uint64_t)length + (uint64_t)got + 7) & ~7u;
    return one->length;
}

int64_t snap_descriptors_read(int pid, int only_files, char *buffer, uint64_t size) {
    int links = open_directory(pid, "fd");
    if (links < 0)
        return links;
    int infos = open_directory(pid, "fdinfo");
    DIR *list = infos < 0 ? NULL : fdopendir(links);
    int64_t result = infos < 0 ? infos : list ? 0 : -errno;
    uint64_t used = 0;
    while (result >= 0) {
        struct dirent *entry = readdir(list);
        if (!entry)
            break;
        if (entry->d_name[0] == '.')
            continue;
        result = read_one(links, infos, entry->d_name, -1, only_files, buffer + used, size - used);
        if (result > 0)
            used += (uint64_t)result;
    }
    if (list)
        closedir(list); /* and with it `links` */
    else
        close(links);
    if (infos >= 0)
        close(infos);
    return result < 0 ? result : (int64_t)used;
}

typedef struct {
    char name[12];
    int info; /* its fdinfo, open, or -1: it is opened each time */
} known_descriptor;

struct snap_known_descriptors {
    int links;
    int infos;
    int count;
    known_descriptor at[];
};

int snap_descriptors_know(int pid, const char *buffer, uint64_t used, snap_known_descriptors **known) {
    size_t count = count_records(buffer, used);
    snap_known_descriptors *k = malloc(sizeof *k + count * sizeof *k->at);
    if (!k)
        return -ENOMEM;
    k->count = 0;
    k->links = open_directory(pid, "fd");
    k->infos = open_directory(pid, "fdinfo");
    int failed = k->links < 0 ? k->links : k->infos < 0 ? k->infos : 0;
    for (uint64_t at = 0; !failed && at < used; at += ((const snap_descriptor *)(buffer + at))->length) {
        known_descriptor *one = &k->at[k->count];
        snprintf(one->name, sizeof one->name, "%d", ((const snap_descriptor *)(buffer + at))->fd);
        one->info = k->count++ < MOST_OPEN ? open_in(k->infos, one->name) : -1;
    }
    *known = k;
    if (failed) {
        snap_descriptors_forget(k);
        *known = NULL;
    }
    return failed;
}

int64_t snap_descriptors_read_known(const snap_known_descriptors *known, char *buffer, uint64_t size) {
    struct stat directory; /* its size: how many there are, since Linux 6.2 */
    if (fstat(known->links, &directory) < 0)
        return -errno;
    if (directory.st_size != known->count)
        return -ESTALE;
    uint64_t used = 0;
    for (int i = 0; i < known->count; i++) {
        const known_descriptor *one = &known->at[i];
        int64_t length = read_one(known->links, known->infos, one->name, one->info, 0, buffer + used, size - used);
        if (length <= 0)
            return length ? length : -ESTALE;
        used += (uint64_t)length;
    }
    return (int64_t)used;
}

void snap_descriptors_forget(snap_known_descriptors *known) {
    if (!known)
        return;
    for (int i = 0; i < known->count; i++)
        if (known->at[i].info >= 0)
            close(known->at[i].info);
    if (known->infos >= 0)
        close(known->infos);
    if (known->links >= 0)
        close(known->links);
    free(known);
}

/* Whether two descriptors may share a struct file: 0, or their order. */
static int by_likeness(const snap_descriptor *a, const snap_descriptor *b) {
    if (a->inode != b->inode)
        return a->inode < b->inode ? -1 : 1;
    if (a->device != b->device)
        return a->device < b->device ? -1 : 1;
    if (a->link_length != b->link_length)
        return a->link_length < b->link_length ? -1 : 1;
    return memcmp(a + 1, b + 1, a->link_length);
}

typedef struct {
    int pid;
    int error; /* -errno of the first comparison that failed, 0: none */
} comparing;

/* By struct file, those of one by their numbers: the kernel has an order of them (kcmp(2)). */
static int by_file(const void *a, const void *b, void *of) {
    const snap_descriptor *x = *(snap_descriptor *const *)a, *y = *(snap_descriptor *const *)b;
    comparing *c = of;
    int order = by_likeness(x, y);
    if (order)
        return order;
    order = c->error ? SNAP_KCMP_SAME : snap_kcmp_file(c->pid, x->fd, y->fd);
    if (order < 0)
        c->error = order;
    if (order == SNAP_KCMP_LESS || order == SNAP_KCMP_GREATER)
        return order == SNAP_KCMP_LESS ? -1 : 1;
    return (x->fd > y->fd) - (x->fd < y->fd);
}

int snap_descriptors_group(int pid, char *buffer, uint64_t used) {
    size_t count = count_records(buffer, used);
    snap_descriptor **records = malloc((count + 1) * sizeof *records);
    if (!records)
        return -ENOMEM;
    count = 0;
    for (uint64_t at = 0; at < used; at += records[count++]->length)
        records[count] = (snap_descriptor *)(buffer + at);
    comparing c = {.pid = pid};
    qsort_r(records, count, sizeof *records, by_file, &c);
    for (size_t i = 1; i < count && !c.error; i++) {
        const snap_descriptor *before = records[i - 1];
        int order = by_likeness(before, records[i]) ? SNAP_KCMP_LESS
                                                    : snap_kcmp_file(pid, before->fd, records[i]->fd);
        if (order == SNAP_KCMP_SAME)
            records[i]->file = before->file;
        c.error = order < 0 ? order : 0;
    }
    free(records);
    return c.error;
}

static int32_t option(int fd, int name) {
    int value = 0;
    socklen_t length = sizeof value;
    return getsockopt(fd, SOL_SOCKET, name, &value, &length) < 0 ? 0 : value;
}

/* The answers to those of `rows` that are of this kind of socket. */
static void ask_options(int fd, int count, const snap_socket_option *rows, snap_socket *out) {
    for (int i = 0; i < count; i++) {
        const snap_socket_option *row = &rows[i];
        if (row->domain != out->domain || row->type != out->type)
            continue;
        uint8_t *answer = out->options + out->options_length;
        socklen_t length = row->size;
        if (out->options_length + SNAP_ANSWER_HEAD + row->size > (int32_t)sizeof out->options)
            return;
        if (getsockopt(fd, row->level, row->option, answer + SNAP_ANSWER_HEAD, &length) < 0)
            continue;
        const uint16_t head[2] = {(uint16_t)i, (uint16_t)length};
        memcpy(answer, head, sizeof head);
        out->options_length += SNAP_ANSWER_HEAD + (int32_t)length;
    }
}

static int look(int copy, int options, const snap_socket_option *rows, snap_socket *out) {
    memset(out, 0, offsetof(snap_socket, options));
    socklen_t length = sizeof out->local;
    if (getsockname(copy, (struct sockaddr *)out->local, &length) < 0)
        return -errno;
    out->local_length = (int32_t)length;
    length = sizeof out->peer;
    if (getpeername(copy, (struct sockaddr *)out->peer, &length) == 0)
        out->peer_length = (int32_t)length;
    out->domain = option(copy, SO_DOMAIN);
    out->type = option(copy, SO_TYPE);
    out->protocol = option(copy, SO_PROTOCOL);
    out->listening = option(copy, SO_ACCEPTCONN);
    if ((out->domain == AF_INET || out->domain == AF_INET6) && out->type == SOCK_STREAM) {
        struct tcp_info info;
        length = sizeof info;
        if (getsockopt(copy, IPPROTO_TCP, TCP_INFO, &info, &length) == 0) {
            out->state = info.tcpi_state;
            out->backlog = (int32_t)info.tcpi_sacked; /* so tcp_get_info, net/ipv4/tcp.c */
        }
    }
    int waiting = 0;
    out->waiting = ioctl(copy, SIOCINQ, &waiting) < 0 ? -1 : waiting;
    struct pollfd now = {.fd = copy, .events = POLLIN | POLLRDHUP};
    if (poll(&now, 1, 0) == 1)
        out->events = now.revents;
    ask_options(copy, options, rows, out);
    return 0;
}

void snap_sockets_look(int pidfd, int count, const int *fds, int options, const snap_socket_option *rows,
                       snap_socket *out) {
    for (int i = 0; i < count; i++) {
        int copy = snap_pidfd_getfd(pidfd, fds[i]);
        int result = copy < 0 ? copy : look(copy, options, rows, &out[i]);
        out[i].error = result;
        if (copy >= 0)
            close(copy);
    }
}

int snap_inotify_create(int flags) {
    int fd = inotify_init1(flags | IN_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

int snap_inotify_add(int fd, const char *path, uint32_t mask) {
    int watch = inotify_add_watch(fd, path, mask);
    return watch < 0 ? -errno : watch;
}

int snap_inotify_remove(int fd, int watch) {
    return inotify_rm_watch(fd, watch) < 0 ? -errno : 0;
}

int snap_open_handle(int mount, int type, const char *handle, uint32_t length) {
    union {
        struct file_handle handle;
        char room[sizeof(struct file_handle) + MAX_HANDLE_SZ];
    } it;
    if (length > MAX_HANDLE_SZ)
        return -EINVAL;
    it.handle.handle_bytes = length;
    it.handle.handle_type = type;
    memcpy(it.handle.f_handle, handle, length);
    int fd = open_by_handle_at(mount, &it.handle, O_PATH | O_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

int snap_read_files(const int *fds, int count, char *out, uint64_t size, int64_t *ends)
{
    uint64_t used = 0;
    for (int i = 0; i < count; i++) {
        const int64_t got = read_from_start(fds[i], out + used, size - used);
        used += got < 0 ? 0 : (uint64_t)got;
        ends[i] = got < 0 ? got : (int64_t)used;
        if (used == size)
            return -ENOSPC;
    }
    return 0;
}
