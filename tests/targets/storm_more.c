/* Operations of storm beyond those of storm.c. Each fills what it works on with words of its own key
 * and checks them afterwards: none depends on what ran before it. */
#define _GNU_SOURCE
#include "storm.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#define HUGE (2 * MIB)

size_t some_pages(uint64_t key, size_t *count)
{
    size_t pages = bytes / PAGE, from = mix(key) % pages;
    *count = 1 + mix(key + 1) % (pages - from);
    return from;
}

static void fill_all(char *at, uint64_t key)
{
    fill((uint64_t *)at, bytes / 8, key);
}

/* The area holds the words of `key`, but pages [from, from + count) those of `inner` (0: zeros). */
static void expect_but(const char *area, uint64_t key, size_t from, size_t count, uint64_t inner,
                       const char *when)
{
    const uint64_t *word = (const uint64_t *)area;
    expect(area, from * PAGE, key, when);
    if (inner)
        expect(area + from * PAGE, count * PAGE, inner, when);
    else
        expect_zero(area + from * PAGE, count * PAGE, when);
    for (size_t i = (from + count) * PAGE / 8; i < bytes / 8; i += 61)
        if (word[i] != mix(key * 0x9e3779b97f4a7c15ULL + i + 1)) {
            fault("%s: word %zu behind the hole is wrong: %#llx", when, i, (unsigned long long)word[i]);
            return;
        }
}

static void fixed(struct lane *l, uint64_t key)
{
    size_t count, from = some_pages(key, &count);
    char *over = l->area + from * PAGE;
    fill_all(l->area, key);
    must(mmap(over, count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
              0) == over, "MAP_FIXED");
    expect_but(l->area, key, from, count, 0, "mapped over");
    fill((uint64_t *)over, count * PAGE / 8, key + 3);
    expect_but(l->area, key, from, count, key + 3, "filled after it was mapped over");
}

/* Onto another mapping that holds something, and away from under its own address. */
static void onto(struct lane *l, uint64_t key)
{
    (void)l;
    char *from = map(bytes), *to = map(bytes);
    fill_all(from, key);
    fill_all(to, key + 1);
    must(mremap(from, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to, "mremap onto");
    expect(to, bytes, key, "moved onto another");
    from = mremap(to, bytes, bytes, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
    must(from != MAP_FAILED, "MREMAP_DONTUNMAP");
    expect(from, bytes, key, "moved, the old place kept");
    expect_zero(to, bytes, "the old place");
    fill_all(to, key + 2);
    expect(from, bytes, key, "after the old place was written");
    expect(to, bytes, key + 2, "the old place, written");
    munmap(from, bytes);
    munmap(to, bytes);
}

static void freed(struct lane *l, uint64_t key)
{
    size_t count, from = some_pages(key, &count);
    char *hole = l->area + from * PAGE;
    fill_all(l->area, key);
    must(madvise(hole, count * PAGE, MADV_FREE) == 0, "MADV_FREE");
    for (size_t i = 0; i < count; i++) {
        uint64_t found = *(volatile uint64_t *)(hole + i * PAGE);
        if (found && found != mix(key * 0x9e3779b97f4a7c15ULL + (from + i) * PAGE / 8 + 1))
            fault("page %zu given up by MADV_FREE is neither old nor zero: %#llx", i,
                  (unsigned long long)found);
    }
    fill((uint64_t *)hole, count * PAGE / 8, key + 1);
    expect_but(l->area, key, from, count, key + 1, "written after MADV_FREE");
}

static void removed(struct lane *l, uint64_t key)
{
    size_t count, from = some_pages(key, &count);
    fill_all(l->once, key);
    must(madvise(l->once + from * PAGE, count * PAGE, MADV_REMOVE) == 0, "MADV_REMOVE");
    expect_but(l->twice, key, from, count, 0, "removed through the other mapping");
    fill((uint64_t *)(l->twice + from * PAGE), count * PAGE / 8, key + 1);
    expect_but(l->once, key, from, count, key + 1, "written after MADV_REMOVE");
}

static void cold(struct lane *l, uint64_t key)
{
    fill_all(l->area, key);
    must(madvise(l->area, bytes, MADV_COLD) == 0, "MADV_COLD");
    must(madvise(l->area, bytes, MADV_PAGEOUT) == 0, "MADV_PAGEOUT");
    expect(l->area, bytes / 2, key, "paged out");
    fill((uint64_t *)l->area, bytes / 4 / 8, key + 2);
    expect(l->area, bytes / 4, key + 2, "written after it was paged out");
    if (!l->once)
        return;
    fill_all(l->once, key + 1);
    must(madvise(l->once, bytes, MADV_PAGEOUT) == 0, "MADV_PAGEOUT");
    expect(l->twice, bytes, key + 1, "shared, paged out");
}

static void huge(struct lane *l, uint64_t key)
{
    (void)l;
    char *place = map(3 * HUGE), *at = (char *)(((uintptr_t)place + HUGE - 1) & ~(HUGE - 1));
    must(madvise(at, HUGE, key % 2 ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) == 0, "MADV_HUGEPAGE");
    fill((uint64_t *)at, HUGE / 8, key);
    must(madvise(at, HUGE, MADV_HUGEPAGE) == 0, "MADV_HUGEPAGE");
    (void)!madvise(at, HUGE, MADV_COLLAPSE); /* it may find no huge page, or one already */
    expect(at, HUGE, key, "collapsed");
    must(madvise(at + HUGE / 2, 16 * PAGE, MADV_DONTNEED) == 0, "MADV_DONTNEED");
    expect_zero(at + HUGE / 2, 16 * PAGE, "a hole in a huge page");
    (void)!madvise(at, HUGE, MADV_COLLAPSE);
    expect(at, HUGE / 2, key, "collapsed again");
    expect_zero(at + HUGE / 2, 16 * PAGE, "a hole, collapsed over");
    munmap(place, 3 * HUGE);
}

static void merged(struct lane *l, uint64_t key)
{
    uint64_t *word = (uint64_t *)l->area;
    must(madvise(l->area, bytes, MADV_MERGEABLE) == 0, "MADV_MERGEABLE");
    for (size_t i = 0; i < bytes / 8; i++)
        word[i] = key; /* every page the same */
    word[0] = key + 1;
    if (key / 16 % 2)
        must(madvise(l->area, bytes, MADV_UNMERGEABLE) == 0, "MADV_UNMERGEABLE");
    for (size_t i = 1; i < bytes / 8; i++)
        if (word[i] != key)
            fault("word %zu of mergeable memory is %#llx", i, (unsigned long long)word[i]);
    if (word[0] != key + 1)
        fault("the word that was written in mergeable memory is lost");
}

static void locked(struct lane *l, uint64_t key)
{
    size_t count, from = some_pages(key, &count);
    fill_all(l->area, key);
    must(mlock(l->area + from * PAGE, count * PAGE) == 0, "mlock");
    fill((uint64_t *)l->area, bytes / 16, key + 1);
    expect(l->area, bytes / 2, key + 1, "locked and written");
    must(mlock2(l->area, bytes, MLOCK_ONFAULT) == 0, "mlock2");
    must(munlock(l->area, bytes) == 0, "munlock");
    expect(l->area, bytes / 2, key + 1, "unlocked");
}

static void fresh(struct lane *l, uint64_t key)
{
    size_t slot = key / 16 % HELD;
    if (l->held[slot]) {
        expect(l->held[slot], bytes, l->held_key[slot], "a mapping of some rounds ago");
        munmap(l->held[slot], bytes);
    }
    l->held[slot] = map(bytes);
    fill_all(l->held[slot], l->held_key[slot] = key);
}

/* Huge pages of hugetlbfs: discarded and read again, moved, unmapped. Nothing where there are none. */
static void hugetlb(struct lane *l, uint64_t key)
{
    enum { BOTH = 2 * HUGE };
    if (!l->pool) {
        void *got = mmap(NULL, BOTH, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
        if (got == MAP_FAILED)
            return;
        l->pool = got;
    }
    fill((uint64_t *)l->pool, BOTH / 8, key);
    must(madvise(l->pool, HUGE, MADV_DONTNEED) == 0, "madvise");
    expect_zero(l->pool, HUGE, "a discarded huge page");
    fill((uint64_t *)l->pool, BOTH / 8, key + 1);
    if (key / 16 % 2) {
        char *room = mmap(NULL, BOTH + HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        must(room != MAP_FAILED, "mmap");
        char *to = room + -(uintptr_t)room % HUGE;
        must(mremap(l->pool, BOTH, BOTH, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to, "mremap");
        munmap(room, (size_t)(to - room));
        munmap(to + BOTH, (size_t)(room + HUGE - to));
        l->pool = to;
    }
    expect(l->pool, BOTH, key + 1, "huge pages that were moved");
    if (key / 16 % 8 == 0) {
        munmap(l->pool, BOTH);
        l->pool = NULL;
    }
}

/* A mapping that grows downwards, one page at a time, far from everything else. */
static void downwards(struct lane *l, uint64_t key)
{
    size_t pages = 16 + mix(key) % 200;
    char *top = (char *)0x200000000000UL + (l->self << 32);
    char *at = mmap(top, PAGE, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_FIXED_NOREPLACE, -1, 0);
    must(at == top, "MAP_GROWSDOWN");
    for (size_t i = 0; i < pages; i++)
        fill((uint64_t *)(top - i * PAGE), PAGE / 8, key + i);
    for (size_t i = 0; i < pages; i++)
        expect(top - i * PAGE, PAGE, key + i, "a stack that grew");
    must(munmap(top - (pages - 1) * PAGE, pages * PAGE) == 0, "munmap");
}

void grow_stack(uint64_t key)
{
    char *deep = __builtin_alloca(16 * PAGE);
    fill((uint64_t *)deep, 16 * PAGE / 8, key);
    if (key % 64)
        grow_stack(key - 1);
    expect(deep, 16 * PAGE, key, "main's stack");
}

static void child_ends(pid_t child)
{
    int status = -1;
    must(waitpid(child, &status, 0) == child, "waitpid");
    if (status)
        fault("a child ended with %#x", status);
}

/* Children that write and call exec, and such whose parent ends before them. */
static void forks(struct lane *l, uint64_t key)
{
    fill_all(l->area, key);
    pid_t child = fork();
    must(child >= 0, "fork");
    if (child == 0) {
        fill((uint64_t *)l->area, bytes / 16, key + 1);
        if (key / 16 % 2) {
            execl("/bin/true", "true", (char *)NULL);
            _exit(99);
        }
        pid_t orphan = fork();
        if (orphan == 0) {
            expect(l->area, bytes / 2, key + 1, "in an orphan");
            fill_all(l->area, key + 2);
            expect(l->area, bytes, key + 2, "written by an orphan");
            _exit(0);
        }
        _exit(orphan < 0);
    }
    fill((uint64_t *)l->area, bytes / 32, key + 3);
    child_ends(child);
    expect(l->area, bytes / 4, key + 3, "written by the parent");
}

void reap_orphans(void)
{
    int status;
    while (waitpid(-1, &status, WNOHANG | __WNOTHREAD) > 0)
        if (status)
            fault("an orphan ended with %#x", status);
}

static void vforks(struct lane *l, uint64_t key)
{
    fill_all(l->area, key);
    pid_t child = vfork();
    if (child == 0) {
        ((volatile uint64_t *)l->area)[3] = key; /* the parent's own memory */
        if (key / 16 % 2)
            execl("/bin/true", "true", (char *)NULL);
        _exit(0);
    }
    must(child > 0, "vfork");
    if (((volatile uint64_t *)l->area)[3] != key)
        fault("what a vfork child wrote is lost");
    child_ends(child);
}

static void reads(struct lane *l, uint64_t key)
{
    size_t half = bytes / 2;
    fill_all(l->area, key);
    must(pwrite(l->file, l->area, bytes, 0) == (ssize_t)bytes, "pwrite");
    fill_all(l->area, key + 1);
    must(pread(l->file, l->area, half, 0) == (ssize_t)half, "pread");
    struct iovec parts[2] = { { l->area + half, half / 2 }, { l->area + half + half / 2, half / 2 } };
    must(preadv(l->file, parts, 2, (off_t)half) == (ssize_t)half, "preadv");
    expect(l->area, bytes, key, "read");
    char message[2 * PAGE];
    fill((uint64_t *)message, sizeof message / 8, key + 2);
    must(send(l->pair[0], message, sizeof message, 0) == sizeof message, "send");
    must(recv(l->pair[1], l->area + PAGE / 2, sizeof message, MSG_WAITALL) == sizeof message, "recv");
    expect(l->area + PAGE / 2, sizeof message, key + 2, "received");
}

static void direct(struct lane *l, uint64_t key)
{
    int fd = open(l->direct, O_RDWR | O_DIRECT | O_CLOEXEC);
    must(fd >= 0, "O_DIRECT");
    fill_all(l->area, key);
    must(pwrite(fd, l->area, bytes, 0) == (ssize_t)bytes, "pwrite, O_DIRECT");
    fill_all(l->area, key + 1);
    must(pread(fd, l->area, bytes, 0) == (ssize_t)bytes, "pread, O_DIRECT");
    expect(l->area, bytes, key, "read with O_DIRECT");
    close(fd);
}

static void zeros(struct lane *l, uint64_t key)
{
    (void)l;
    char *at = map(bytes);
    expect_zero(at, bytes, "a new mapping"); /* maps the page of zeros everywhere */
    size_t count, from = some_pages(key, &count);
    fill((uint64_t *)(at + from * PAGE), count * PAGE / 8, key);
    expect_zero(at, from * PAGE, "pages of zeros");
    expect(at + from * PAGE, count * PAGE, key, "written in pages of zeros");
    munmap(at, bytes);
}

static void twice(struct lane *l, uint64_t key)
{
    size_t half = bytes / 2;
    fill_all(l->once, key);
    fill((uint64_t *)(l->twice + half), half / 8, key + 1);
    expect(l->twice, half, key, "a memfd, through its other mapping");
    expect(l->once + half, half, key + 1, "a memfd, through its first mapping");
    fill_all(l->alias, key + 2);
    fill((uint64_t *)l->shared, half / 8, key + 3);
    expect(l->alias, half, key + 3, "shared memory, through its other mapping");
    char *third = mremap(l->shared, 0, bytes, MREMAP_MAYMOVE);
    must(third != MAP_FAILED, "mremap of no size");
    fill((uint64_t *)third, half / 8, key + 4);
    expect(l->shared, half, key + 4, "shared memory, through a third mapping");
    munmap(third, bytes);
}

static void holes(struct lane *l, uint64_t key)
{
    size_t count, from = some_pages(key, &count);
    fill_all(l->once, key);
    must(fallocate(l->memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(from * PAGE),
                   (off_t)(count * PAGE)) == 0, "fallocate");
    expect_but(l->twice, key, from, count, 0, "a hole punched in a memfd");
    must(pwrite(l->memfd, l->area, PAGE, (off_t)(from * PAGE)) == PAGE, "pwrite to a memfd");
    if (memcmp(l->once + from * PAGE, l->area, PAGE) != 0)
        fault("what was written to a memfd is not in its mapping");
}

const struct operation more_operations[] = {
    { "fixed", fixed, MIXED },     { "onto", onto, MIXED },       { "free", freed, MIXED },
    { "remove", removed, SHARES }, { "cold", cold, MIXED },       { "huge", huge, MIXED },
    { "merge", merged, MIXED },    { "lock", locked, MIXED },     { "new", fresh, MIXED },
    { "stack", downwards, MIXED }, { "forks", forks, MIXED },     { "vfork", vforks, MIXED },
    { "read", reads, MIXED },      { "zero", zeros, MIXED },      { "twice", twice, SHARES },
    { "holes", holes, SHARES },    { "hugetlb", hugetlb, SHARES }, { "direct", direct, ALONE },
};
const size_t more_count = sizeof more_operations / sizeof *more_operations;

static void open_shared(struct lane *l)
{
    l->memfd = memfd_create("storm", MFD_CLOEXEC);
    must(l->memfd >= 0 && ftruncate(l->memfd, (off_t)bytes) == 0, "memfd");
    l->once = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, l->memfd, 0);
    l->twice = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, l->memfd, 0);
    l->shared = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    must(l->once != MAP_FAILED && l->twice != MAP_FAILED && l->shared != MAP_FAILED, "mmap");
    l->alias = mremap(l->shared, 0, bytes, MREMAP_MAYMOVE);
    must(l->alias != MAP_FAILED, "mremap of no size");
}

void lane_open(struct lane *l, size_t self)
{
    l->self = self;
    l->area = map(bytes);
    if (!option("private", 0))
        open_shared(l);
    must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, l->pair) == 0, "socketpair");
    snprintf(l->direct, sizeof l->direct, "storm-%zu", self);
    l->file = open(l->direct, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    must(l->file >= 0, l->direct);
}
