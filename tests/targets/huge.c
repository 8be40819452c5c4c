/* huge: memory of hugetlbfs, partly touched, which several threads write to all the time.
 *
 *   --pages N     huge pages of each kind (at least 4); of each the second half is never touched
 *   --kind WORD   private | reserveless (MAP_NORESERVE) | readonly (filled, then PROT_READ) | shared
 *                 (anonymous) | memfd | all
 *   --churn 1     one more thread maps, moves, discards and unmaps huge pages of its own, discards
 *                 and reads others that stay, and forks children that write to all of the private
 *
 * Each writing thread has a 64-byte lane in every 4 KiB page of the touched half of every writable
 * kind: a counter and its mix(), so that a torn page is seen. values: address, bytes of each kind,
 * bytes touched. */
#define _GNU_SOURCE
#include "victim.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define HUGE (2 * MIB)
enum { THREADS = 3, KINDS = 5, LANE = 8 /* words */, WORDS = PAGE / 8, CHURNED = 2 };

static const char *const names[KINDS] = { "private", "reserveless", "shared", "memfd", "readonly" };
static char *memory[KINDS];
static size_t touched; /* bytes of each kind */
static _Atomic int asked;

static bool wanted(const char *name)
{
    const char *kind = option_text("kind", "private");
    return strcmp(kind, "all") == 0 || strcmp(kind, name) == 0;
}

static char *map(size_t bytes, int flags, int fd)
{
    void *got = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
    must(got != MAP_FAILED, "mmap of huge pages");
    return got;
}

static char *make(const char *name, size_t bytes)
{
    int huge = MAP_ANONYMOUS | MAP_HUGETLB;
    if (strcmp(name, "reserveless") == 0)
        huge |= MAP_NORESERVE;
    if (strcmp(name, "shared") == 0)
        return map(bytes, MAP_SHARED | huge, -1);
    if (strcmp(name, "memfd") != 0)
        return map(bytes, MAP_PRIVATE | huge, -1);
    int fd = memfd_create("huge", MFD_HUGETLB | MFD_ALLOW_SEALING);
    must(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0, "a memfd in huge pages");
    return map(bytes, MAP_SHARED, fd);
}

static uint64_t *lane(int kind, size_t page, unsigned thread)
{
    return (uint64_t *)(memory[kind] + page * PAGE) + thread * LANE;
}

static void *writer(void *own)
{
    unsigned thread = (unsigned)(uintptr_t)own;
    for (uint64_t turn = 1;; turn++) {
        for (int kind = 0; kind < KINDS - 1; kind++)
            for (size_t page = 0; memory[kind] && page < touched / PAGE; page++) {
                uint64_t *at = lane(kind, page, thread);
                if (at[1] != mix(at[0]))
                    fault("%s page %zu lane %u: %lx", names[kind], page, thread, at[0]);
                at[0]++;
                at[1] = mix(at[0]);
            }
        progress[1 + thread] = turn;
    }
    return NULL;
}

/* The child has the memory to itself: nothing of it is protected there. */
static void fork_one(void)
{
    pid_t child = fork();
    must(child >= 0, "fork");
    if (child == 0) {
        for (size_t page = 0; page < touched / PAGE; page++)
            *lane(0, page, THREADS) ^= 1;
        _exit(0);
    }
    int status;
    pid_t ended = waitpid(child, &status, 0);
    must(ended == child || errno == ECHILD, "waitpid"); /* a restore brings no children back */
    if (ended == child && status != 0)
        fault("a child that writes to huge pages: %x", (unsigned)status);
}

/* Room for a huge page at some aligned address. */
static char *reserve(char *at, int flags)
{
    void *got = mmap(at, at ? HUGE : 2 * HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    must(got != MAP_FAILED, "mmap");
    return got;
}

static void *churn(void *unused)
{
    (void)unused;
    char *room = reserve(NULL, 0);
    room += -(uintptr_t)room % HUGE;
    char *stays = map(CHURNED * HUGE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1);
    for (uint64_t turn = 1;; turn++) {
        fill((uint64_t *)stays, WORDS, turn);
        must(madvise(stays, HUGE, MADV_DONTNEED) == 0, "MADV_DONTNEED");
        if (nonzero((uint64_t *)stays, WORDS) != WORDS) /* reads it: now it is there again */
            fault("a discarded huge page that stays is not empty");
        if (turn % 8 == 0)
            fork_one();
        char *one = map(CHURNED * HUGE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1);
        fill((uint64_t *)one, WORDS, turn);
        fill((uint64_t *)(one + HUGE), WORDS, turn + 1);
        char *two = mremap(one + HUGE, HUGE, HUGE, MREMAP_MAYMOVE | MREMAP_FIXED, room);
        must(two == room, "mremap of a huge page");
        if (wrong((uint64_t *)two, WORDS, turn + 1) != WORDS)
            fault("a moved huge page is wrong");
        must(madvise(one, HUGE, MADV_DONTNEED) == 0, "MADV_DONTNEED");
        if (nonzero((uint64_t *)one, WORDS) != WORDS)
            fault("a discarded huge page is not empty");
        must(munmap(one, HUGE) == 0, "munmap");
        reserve(room, MAP_FIXED);
        progress[1 + THREADS] = turn;
    }
    return NULL;
}

static void check(void)
{
    for (int kind = 0; kind < KINDS; kind++)
        for (size_t page = 0; memory[kind] && page < touched / PAGE; page++) {
            uint64_t *rest = lane(kind, page, THREADS);
            size_t words = WORDS - THREADS * LANE;
            if (wrong(rest, words, (uint64_t)kind << 32 | page) != words)
                fault("%s page %zu is wrong", names[kind], page);
        }
    verified();
}

static void ask(int signal)
{
    (void)signal;
    asked = 1;
}

int main(int argc, char **argv)
{
    victim_start(argc, argv);
    size_t bytes = (size_t)option("pages", 4) * HUGE;
    touched = bytes / 2;
    values[0] = bytes;
    values[1] = touched;
    for (int kind = 0; kind < KINDS; kind++) {
        if (!wanted(names[kind]))
            continue;
        memory[kind] = make(names[kind], bytes);
        values[2 + kind] = (uintptr_t)memory[kind];
        for (size_t page = 0; page < touched / PAGE; page++) {
            for (unsigned thread = 0; thread < THREADS; thread++)
                lane(kind, page, thread)[1] = mix(0);
            fill(lane(kind, page, THREADS), WORDS - THREADS * LANE, (uint64_t)kind << 32 | page);
        }
        /* One that was touched and discarded is as one that never was. */
        if (kind < 2) {
            memory[kind][bytes - 1] = 1;
            must(madvise(memory[kind] + bytes - HUGE, HUGE, MADV_DONTNEED) == 0, "MADV_DONTNEED");
        }
    }
    if (memory[KINDS - 1])
        must(mprotect(memory[KINDS - 1], bytes, PROT_READ) == 0, "mprotect");
    signal(SIGUSR1, ask);
    bool churning = option("churn", 0);
    victim_lanes(churning ? 2 + THREADS : 1 + THREADS);
    pthread_t thread;
    for (uintptr_t i = 0; i < THREADS; i++)
        must(pthread_create(&thread, NULL, writer, (void *)i) == 0, "pthread_create");
    if (churning)
        must(pthread_create(&thread, NULL, churn, NULL) == 0, "pthread_create");
    victim_ready();
    for (;;) {
        if (asked) {
            asked = 0;
            check();
        }
        progress[0]++;
        publish();
        struct timespec pause = { 0, 2000000 };
        nanosleep(&pause, NULL);
    }
}
