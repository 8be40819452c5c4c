/*
 * The kernel's BTF is understood, and what is none of it is refused: whole copies of it with pieces cut
 * off or overwritten are read under the sanitizers.
 *
 *   btf_test ROUNDS SEED
 */
#define _GNU_SOURCE
#include "check.h"
#include "btf_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define BTF_PATH "/sys/kernel/btf/vmlinux"

static unsigned char *whole;
static size_t size;

static void read_whole(void)
{
    int fd = open(BTF_PATH, O_RDONLY);
    CHECK(fd >= 0);
    size_t room = 64 << 20;
    whole = malloc(room);
    for (ssize_t n; (n = read(fd, whole + size, room - size)) > 0;)
        size += (size_t)n;
    close(fd);
    CHECK(size > 1000 && size < room);
}

static void ask(const snap_btf *btf, int right)
{
    const int64_t pid = snap_btf_offset(btf, "task_struct", "pid");
    const int64_t tgid = snap_btf_offset(btf, "task_struct", "tgid");
    const int64_t brk = snap_btf_offset(btf, "mm_struct", "brk"); /* in a struct without a name */
    const int64_t bit = snap_btf_offset(btf, "signal_struct", "is_child_subreaper"); /* a bit field */
    const uint32_t function = snap_btf_function(btf, "bpf_iter_task");
    if (right) {
        CHECK(pid > 0 && tgid == pid + 4);
        CHECK(brk > 0 && bit > 0 && bit % 4 == 0);
        CHECK(snap_btf_offset(btf, "mm_struct", "start_brk") + 8 == brk);
        CHECK(function > 0 && function < btf->count);
        CHECK(snap_btf_offset(btf, "task_struct", "no such member") == -1);
        CHECK(snap_btf_offset(btf, "no such struct", "pid") == -1);
        CHECK(snap_btf_function(btf, "no such function") == 0);
    }
}

/* -> what loading such a file says. */
static int load(const unsigned char *bytes, size_t length, int right)
{
    char path[64];
    int fd = memfd_create("btf", MFD_CLOEXEC);
    CHECK(fd >= 0 && write(fd, bytes, length) == (ssize_t)length);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    snap_btf btf;
    int result = snap_btf_load(path, &btf);
    close(fd);
    if (result == 0) {
        ask(&btf, right);
        snap_btf_free(&btf);
    }
    return result;
}

int main(int argc, char **argv)
{
    CHECK(argc > 2);
    if (access(BTF_PATH, R_OK) < 0) {
        puts("this kernel has no BTF");
        return 0;
    }
    snap_btf btf;
    CHECK(snap_btf_load("/nonexistent", &btf) == -ENOENT && !btf.bytes);
    read_whole();
    CHECK(load(whole, size, 1) == 0);
    CHECK(load(whole, 0, 0) == -EPROTO);
    CHECK(load((const unsigned char *)"no BTF, but long enough to be a header", 38, 0) == -EPROTO);
    srand((unsigned)atoi(argv[2]));
    for (int round = 0; round < atoi(argv[1]); round++) {
        CHECK(load(whole, (size_t)rand() % size, 0) == -EPROTO); /* its strings come last */
        unsigned char *copy = malloc(size);
        memcpy(copy, whole, size);
        for (int i = 0; i < 100; i++)
            copy[i < 50 ? rand() % 1000 : rand() % (int)size] = (unsigned char)rand();
        load(copy, size, 0);
        free(copy);
    }
    free(whole);
    return 0;
}
