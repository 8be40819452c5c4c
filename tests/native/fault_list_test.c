/* Which writes of a process are listed, and which of its children are counted as forks. */
#define _GNU_SOURCE
#include "check.h"
#include "fault_list.h"
#include "fault_list_internal.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ul
#define PAGES 256ul

static char *memory;

static bool is_listed(const snap_fault_ring *ring, uint64_t from, const char *page)
{
    for (uint64_t i = from; i < ring->count; i++)
        if ((ring->at[i % SNAP_RING_SIZE] & ~(PAGE - 1)) == (uint64_t)(uintptr_t)page)
            return true;
    return false;
}

static void write_all(void)
{
    for (size_t i = 0; i < PAGES; i++)
        memory[i * PAGE + i] = 1;
}

static void *run(void *of)
{
    return of;
}

static void await(pid_t child)
{
    int status;
    CHECK(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && !WEXITSTATUS(status));
}

/* Of its own memory, which has its addresses. */
static void child_writes(void)
{
    pid_t child = fork();
    if (!child) {
        write_all();
        _exit(0);
    }
    await(child);
}

int main(void)
{
    snap_task_program *program;
    snap_fault_list *list;
    int r = snap_task_program_load(&program);
    if (r) {
        printf("skipped: %s\n", strerror(-r));
        return 0;
    }
    memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED && !madvise(memory, PAGES * PAGE, MADV_NOHUGEPAGE));
    CHECK(!snap_fault_list_open(program, getpid(), &list));
    const snap_fault_ring *ring = snap_fault_list_ring(list);

    for (size_t i = 0; i < PAGES / 2; i++) /* reads are none */
        CHECK(memory[i * PAGE] == 0);
    CHECK(!is_listed(ring, 0, memory));
    uint64_t from = ring->count;
    write_all();
    for (size_t i = 0; i < PAGES; i++)
        CHECK(is_listed(ring, from, memory + i * PAGE));
    from = ring->count;
    write_all(); /* they do not fault again */
    CHECK(!is_listed(ring, from, memory));

    CHECK(!madvise(memory, PAGES * PAGE, MADV_DONTNEED)); /* and by the kernel on its behalf */
    int ends[2];
    CHECK(!pipe(ends) && write(ends[1], "x", 1) == 1 && read(ends[0], memory + PAGE, 1) == 1);
    CHECK(is_listed(ring, from, memory + PAGE));
    struct iovec here = {ends, 1}, there = {memory + 2 * PAGE, 1};
    CHECK(process_vm_writev(getpid(), &here, 1, &there, 1, 0) == 1); /* without a fault */
    CHECK(!is_listed(ring, from, memory + 2 * PAGE));

    CHECK(ring->forks == 0);
    pthread_t thread;
    CHECK(!pthread_create(&thread, NULL, run, NULL) && !pthread_join(thread, NULL));
    CHECK(ring->forks == 0);
    CHECK(!madvise(memory, PAGES * PAGE, MADV_DONTNEED));
    from = ring->count;
    child_writes();
    CHECK(ring->forks == 1);
    CHECK(!is_listed(ring, from, memory + 5 * PAGE));

    snap_fault_list_end(list);
    from = ring->count;
    child_writes();
    write_all();
    CHECK(ring->forks == 1 && ring->count == from);
    snap_fault_list_close(list);
    CHECK(snap_fault_list_open(program, 4000000, &list) == -ESRCH && !list);
    snap_task_program_free(program);
    return 0;
}
