/* storm: memory operations without pause, each checked by the program itself; more of them are in
 * storm_more.c.
 *
 *   --what munmap    threads map, fill, check and unmap areas of all sizes (and MAP_FIXED over some)
 *          madvise   MADV_DONTNEED: zeros after it; the pages around it keep their words
 *          fork      children that write to their copy while the parent writes to its own
 *          brk       the heap grows and shrinks
 *          mremap    areas grow, shrink and move
 *          protect   mprotect to read-only, none and back
 *          threads   threads are born and end all the time
 *          mix       one after the other at random, by --seed N (printed); those of storm_more.c too
 *          or the name of one in storm_more.c
 *   --threads N, --mib M (for each thread), --pause MS between rounds
 *   --private 1: no memory is shared, and none in huge pages
 *   --alone 1: once restored, a child that was there at T0 may be missing
 * Beside it one area of M MiB keeps its words throughout; SIGUSR1 has it checked. */
#define _GNU_SOURCE
#include "storm.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

size_t bytes;
static unsigned pause_ms;
static char *kept;

void expect(const char *at, size_t size, uint64_t key, const char *when)
{
    size_t words = size / 8, index = wrong((const uint64_t *)at, words, key);
    if (index != words)
        fault("%s: word %zu of %zu at %p is wrong: %#llx", when, index, words,
              (const void *)(at + index * 8), (unsigned long long)((const uint64_t *)at)[index]);
}

void expect_zero(const char *at, size_t size, const char *when)
{
    size_t words = size / 8, index = nonzero((const uint64_t *)at, words);
    if (index != words)
        fault("%s: word %zu of %zu at %p is not zero: %#llx", when, index, words,
              (const void *)(at + index * 8), (unsigned long long)((const uint64_t *)at)[index]);
}

char *map(size_t size)
{
    char *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(at != MAP_FAILED, "mmap");
    return at;
}

static void storm_munmap(struct lane *l, uint64_t key)
{
    (void)l;
    size_t size = (1 + mix(key) % (bytes / PAGE)) * PAGE;
    char *at = map(size);
    fill((uint64_t *)at, size / 8, key);
    size_t half = size / PAGE / 2 * PAGE;
    if (half && key % 2) {
        must(mmap(at, half, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
                  0) == at, "MAP_FIXED");
        expect_zero(at, half, "mapped over");
    } else if (half) {
        expect(at, size, key, "before munmap");
    }
    must(munmap(at, size) == 0, "munmap");
}

static void storm_madvise(struct lane *l, uint64_t key)
{
    char *area = l->area;
    size_t pages = bytes / PAGE, from = mix(key) % pages, count = 1 + mix(key + 1) % (pages - from);
    char *hole = area + from * PAGE;

    fill((uint64_t *)area, bytes / 8, key);
    must(madvise(hole, count * PAGE, MADV_DONTNEED) == 0, "MADV_DONTNEED");
    expect_zero(hole, count * PAGE, "after MADV_DONTNEED");
    fill((uint64_t *)hole, count * PAGE / 8, key + 7);
    expect(hole, count * PAGE, key + 7, "filled after MADV_DONTNEED");
    expect(area, from * PAGE, key, "before the hole");
}

static void storm_fork(struct lane *l, uint64_t key)
{
    char *area = l->area;
    fill((uint64_t *)area, bytes / 8, key);
    uint64_t before = faults();
    pid_t child = fork();
    must(child >= 0, "fork");
    if (child == 0) {
        expect(area, bytes, key, "in the child");
        fill((uint64_t *)area, bytes / 8, key + 1);
        expect(area, bytes, key + 1, "written by the child");
        _exit(faults() != before);
    }
    fill((uint64_t *)area, bytes / 16, key + 2);
    int status = -1;
    pid_t ended = waitpid(child, &status, 0);
    /* a restored process is alone: a child that lived at T0 is of another life */
    if (ended < 0 && errno == ECHILD && option("alone", 0))
        status = 0;
    else
        must(ended == child, "waitpid");
    if (status != 0)
        fault("the child ended with %#x", status);
    expect(area, bytes / 2, key + 2, "written by the parent");
}

static void storm_brk(struct lane *l, uint64_t key)
{
    (void)l;
    size_t size = (1 + mix(key) % (bytes / PAGE)) * PAGE;
    char *start = sbrk(0);
    must(brk(start + size) == 0, "brk");
    expect_zero((char *)(((uintptr_t)start + PAGE - 1) & ~(PAGE - 1)), size - PAGE, "new heap");
    fill((uint64_t *)(((uintptr_t)start + 7) & ~7UL), size / 8 - 1, key);
    expect((char *)(((uintptr_t)start + 7) & ~7UL), size - 8, key, "heap");
    must(brk(start + size / 2) == 0, "brk");
    expect((char *)(((uintptr_t)start + 7) & ~7UL), (size / 2 - 8) & ~7UL, key, "heap shrunk");
    must(brk(start) == 0, "brk");
}

static void storm_mremap(struct lane *l, uint64_t key)
{
    (void)l;
    size_t size = (2 + mix(key) % (bytes / PAGE)) * PAGE, half = size / PAGE / 2 * PAGE;
    char *at = map(size), *wall;
    fill((uint64_t *)at, size / 8, key);
    at = mremap(at, size, 2 * size, MREMAP_MAYMOVE);
    must(at != MAP_FAILED, "mremap");
    expect(at, size, key, "grown");
    expect_zero(at + size, size, "tail");
    wall = map(2 * size);
    must(mremap(at, 2 * size, 2 * size, MREMAP_MAYMOVE | MREMAP_FIXED, wall) == wall, "mremap");
    expect(wall, size, key, "moved");
    must(mremap(wall, 2 * size, half, 0) == wall, "mremap");
    expect(wall, half, key, "shrunk");
    munmap(wall, half);
}

static void storm_protect(struct lane *l, uint64_t key)
{
    char *area = l->area;
    fill((uint64_t *)area, bytes / 8, key);
    must(mprotect(area, bytes, PROT_READ) == 0, "PROT_READ");
    expect(area, bytes, key, "read-only");
    must(mprotect(area, bytes / 2 & ~(PAGE - 1), PROT_NONE) == 0, "PROT_NONE");
    must(mprotect(area, bytes, PROT_READ | PROT_WRITE) == 0, "PROT_WRITE");
    expect(area, bytes, key, "writable again");
}

static void *short_life(void *argument)
{
    uint64_t own[64];
    fill(own, 64, (uint64_t)argument);
    sched_yield();
    expect((char *)own, sizeof own, (uint64_t)argument, "on a thread's stack");
    return argument;
}

static void storm_threads(struct lane *l, uint64_t key)
{
    (void)l;
    pthread_t born[8];
    for (size_t i = 0; i < 8; i++)
        must(pthread_create(&born[i], NULL, short_life, (void *)(key + i)) == 0, "pthread_create");
    for (size_t i = 0; i < 8; i++) {
        void *result;
        must(pthread_join(born[i], &result) == 0, "pthread_join");
        if (result != (void *)(key + i))
            fault("a thread's result is lost");
    }
}

static const struct operation operations[] = {
    { "munmap", storm_munmap, MIXED }, { "madvise", storm_madvise, MIXED },
    { "fork", storm_fork, MIXED },     { "mremap", storm_mremap, MIXED },
    { "protect", storm_protect, MIXED }, { "threads", storm_threads, MIXED },
    { "brk", storm_brk, MIXED }, /* last: see choose */
};
#define OPERATIONS (sizeof operations / sizeof *operations)

static const struct operation *find(const char *name)
{
    for (size_t i = 0; i < OPERATIONS; i++)
        if (strcmp(name, operations[i].name) == 0)
            return &operations[i];
    for (size_t i = 0; i < more_count; i++)
        if (strcmp(name, more_operations[i].name) == 0)
            return &more_operations[i];
    must(false, name);
    return NULL;
}

/* The heap has one end: brk is the first thread's alone. */
static const struct operation *choose(size_t self, uint64_t random)
{
    size_t first = OPERATIONS - (self != 0);
    for (;; random = mix(random + 1)) {
        size_t i = random % (first + more_count);
        const struct operation *one = i < first ? &operations[i] : &more_operations[i - first];
        if (one->part == MIXED || (one->part == SHARES && !option("private", 0)))
            return one;
    }
}

static void *run(void *argument)
{
    size_t self = (size_t)argument;
    const char *what = option_text("what", "munmap");
    const struct operation *only = strcmp(what, "mix") == 0 ? NULL : find(what);
    uint64_t seed = (uint64_t)option("seed", 1);
    struct lane lane = { 0 };

    if (only >= operations && only < operations + OPERATIONS)
        lane.area = map(bytes);
    else
        lane_open(&lane, self);
    for (uint64_t round = 0;; round++) {
        uint64_t key = self << 40 | (round + 1) * 16;
        (only ? only : choose(self, mix(seed << 32 ^ key)))->run(&lane, key);
        progress[1 + self]++;
        if (pause_ms)
            sleep_ms(pause_ms);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    size_t threads;
    pthread_t thread;

    sigset_t usr1 = block_usr1();
    victim_start(argc, argv);
    bytes = (size_t)option("mib", 4) * MIB;
    settle_malloc();
    pause_ms = (unsigned)option("pause", 0);
    bool mixed = strcmp(option_text("what", ""), "mix") == 0;
    if (mixed)
        printf("storm: seed %ld\n", option("seed", 1));
    if (mixed || strcmp(option_text("what", ""), "forks") == 0)
        prctl(PR_SET_CHILD_SUBREAPER, 1); /* see reap_orphans */
    /* the heap has one end: a storm of brk is one thread's, and malloc must not join it */
    threads = strcmp(option_text("what", ""), "brk") == 0 ? 1 : (size_t)option("threads", 2);
    victim_lanes(1 + (unsigned)threads);
    kept = map(bytes);
    fill((uint64_t *)kept, bytes / 8, 424242);
    values[0] = (uint64_t)(uintptr_t)kept;
    values[1] = bytes;
    for (size_t i = 0; i < threads; i++)
        must(pthread_create(&thread, NULL, run, (void *)i) == 0, "pthread_create");
    victim_ready();
    for (;;) {
        struct timespec often = { 0, 5000000 };
        if (sigtimedwait(&usr1, NULL, &often) == SIGUSR1) {
            expect(kept, bytes, 424242, "the area that is never written");
            verified();
        }
        if (mixed && progress[0] % 16 == 0)
            grow_stack(mix(progress[0]) % 64);
        reap_orphans();
        progress[0]++;
        publish();
    }
}
