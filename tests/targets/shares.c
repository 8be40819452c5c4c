/* shares: has shared memory, and at each SIGUSR1 writes to it in a way that nothing may tell of.
 *
 *   --how fork    --children N are forked and each writes its part of it; they --stay 1, then have it
 *                 elsewhere with --move 1, or end
 *         vfork   a child that shares the address space writes to all of it
 *         grow    a mapping of its first half grows over its second half, and is written there
 *         shrink  the same, and shrinks again
 *         open    its file is opened for writing, and written
 *         time    (without a signal) one child after the other is forked, every --pause MS, and writes
 *                 a page of each kind; a line of --times PATH has when (CLOCK_MONOTONIC), how long
 *                 fork took, and how long it was until the child had written, all in ns
 *   --mib M (0: none), --private M of memory, --file PATH (a new file of a tmpfs; otherwise it is
 *   anonymous)
 * values: address, bytes, how often it has been written. */
#define _GNU_SOURCE
#include "victim.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static char *shared;
static size_t bytes;
static const char *file;
static int round_number;

static void fork_writers(void)
{
    int children = (int)option("children", 1), pipes[2];
    bool stay = option("stay", 0);
    size_t part = bytes / (size_t)children / PAGE * PAGE;
    void *room = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(room != MAP_FAILED && pipe2(pipes, O_CLOEXEC) == 0, "room, a pipe");
    for (int i = 0; i < children; i++) {
        pid_t child = fork();
        must(child >= 0, "fork");
        if (child == 0) {
            memset(shared + (size_t)i * part, 'b' + round_number, part);
            if (option("move", 0))
                must(mremap(shared, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, room) == room, "mremap");
            must(write(pipes[1], "w", 1) == 1, "write");
            while (stay)
                pause();
            _exit(0);
        }
    }
    char byte;
    for (int i = 0; i < children; i++)
        must(read(pipes[0], &byte, 1) == 1, "read");
    while (!stay && children--)
        must(wait(NULL) > 0, "wait");
    close(pipes[0]);
    close(pipes[1]);
    munmap(room, bytes);
}

static int write_all(void *argument)
{
    (void)argument;
    memset(shared, 'b' + round_number, bytes);
    return 0;
}

/* A compiler may not let a child of vfork(2) do so much. */
static void vfork_writer(void)
{
    char *stack = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(stack != MAP_FAILED, "mmap");
    pid_t child = clone(write_all, stack + 16 * PAGE, CLONE_VM | CLONE_VFORK | SIGCHLD, NULL);
    must(child > 0 && waitpid(child, NULL, 0) == child, "clone");
    munmap(stack, 16 * PAGE);
}

static void grow(bool shrink)
{
    size_t half = bytes / 2;
    must(mremap(shared, half, bytes, 0) == shared, "mremap to grow");
    memset(shared + half, 'b' + round_number, half);
    if (shrink)
        must(mremap(shared, bytes, half, 0) == shared, "mremap to shrink");
}

static void open_and_write(void)
{
    int fd = open(file, O_WRONLY | O_CLOEXEC);
    must(fd >= 0, "open");
    char *block = malloc(bytes);
    memset(block, 'b' + round_number, bytes);
    must(write(fd, block, bytes) == (ssize_t)bytes, "write");
}

static void time_forks(char *own)
{
    FILE *times = fopen(option_text("times", "/dev/null"), "w");
    int pipes[2];
    must(times != NULL && pipe2(pipes, O_CLOEXEC) == 0, "a file, a pipe");
    for (;; progress[0]++) {
        uint64_t began = now_ns(), written;
        pid_t child = fork();
        uint64_t forked = now_ns();
        must(child >= 0, "fork");
        if (child == 0) {
            own[0]++;
            shared[0]++;
            written = now_ns();
            must(write(pipes[1], &written, sizeof written) == sizeof written, "write");
            _exit(0);
        }
        must(read(pipes[0], &written, sizeof written) == sizeof written, "read");
        must(wait(NULL) == child, "wait");
        fprintf(times, "%lu %lu %lu\n", began, forked - began, written - began);
        fflush(times);
        publish();
        sleep_ms((unsigned)option("pause", 5));
    }
}

int main(int argc, char **argv)
{
    int number;

    sigset_t usr1 = block_usr1();
    victim_start(argc, argv);
    victim_lanes(1);
    const char *how = option_text("how", "fork");
    file = option_text("file", "");
    bytes = (size_t)option("mib", 64) * MIB;
    int fd = *file ? open(file, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600) : -1;
    must(!*file || (fd >= 0 && ftruncate(fd, (off_t)bytes) == 0), "a new file");
    size_t own_bytes = (size_t)option("private", 1) * MIB;
    char *own = mmap(NULL, own_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(own != MAP_FAILED && madvise(own, own_bytes, MADV_NOHUGEPAGE) == 0, "mmap");
    memset(own, 'p', own_bytes);
    shared = !bytes ? own : mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                                 MAP_SHARED | (*file ? 0 : MAP_ANONYMOUS), fd, 0);
    must(shared != MAP_FAILED, "mmap");
    if (*file)
        close(fd);
    memset(shared, 'a', bytes);
    bool grows = strcmp(how, "grow") == 0, shrinks = strcmp(how, "shrink") == 0;
    if (grows || shrinks) { /* the second half elsewhere, so that the first has room */
        char *room = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        must(room != MAP_FAILED && mremap(shared + bytes / 2, bytes / 2, bytes / 2,
                                          MREMAP_MAYMOVE | MREMAP_FIXED, room) == room, "mremap");
    }
    values[0] = (uint64_t)(uintptr_t)shared;
    values[1] = bytes;
    victim_ready();
    if (strcmp(how, "time") == 0)
        time_forks(own);
    for (;; round_number++) {
        publish();
        sigwait(&usr1, &number);
        if (strcmp(how, "fork") == 0)
            fork_writers();
        else if (strcmp(how, "vfork") == 0)
            vfork_writer();
        else if (strcmp(how, "open") == 0)
            open_and_write();
        else
            grow(shrinks);
        values[2]++;
        progress[0]++;
    }
}
