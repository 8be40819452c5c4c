/* edges: what a program does early in a lazily restored life. It fills memory and waits; SIGUSR1
 * has it fork, shrink, move, drop, unmap and share its memory and check every byte of it. After a
 * round everything is filled anew with other words, and it waits again.
 *
 *   --mib M   size of each area, --only NAME does one kind of operation alone
 * status.verified counts the rounds, values[0] tells which operation is under way. */
#define _GNU_SOURCE
#include "victim.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

enum { FORKED, DROPPED, MOVED, GROWN, CUT, GUARDED, SHARED, TOGETHER, BY_KERNEL, PARTLY, AREAS };

static size_t bytes;
static char *area[AREAS], *heap;
static uint64_t key;
extern char **environ;

static void expect(const char *at, size_t size, uint64_t from, const char *when)
{
    size_t words = size / 8, index = wrong((const uint64_t *)at, words, from);
    if (index != words)
        fault("%s: word %zu of %zu at %p is wrong: %#llx", when, index, words,
              (const void *)(at + index * 8), (unsigned long long)((const uint64_t *)at)[index]);
}

static void expect_zero(const char *at, size_t size, const char *when)
{
    size_t words = size / 8, index = nonzero((const uint64_t *)at, words);
    if (index != words)
        fault("%s: word %zu of %zu at %p is not zero: %#llx", when, index, words,
              (const void *)(at + index * 8), (unsigned long long)((const uint64_t *)at)[index]);
}

static char *map(size_t size, int flags)
{
    char *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_ANONYMOUS | flags, -1, 0);
    must(at != MAP_FAILED, "mmap");
    return at;
}

static int child_ends(pid_t child)
{
    int status = -1;
    must(waitpid(child, &status, 0) == child, "waitpid");
    return status;
}

/* fork: a child and a grandchild see every byte, and write to copies of their own */
static void forks(void)
{
    uint64_t before = faults();
    pid_t child = fork();
    must(child >= 0, "fork");
    if (child == 0) {
        expect(area[FORKED], bytes / 2, key + FORKED, "in the child");
        pid_t grandchild = fork();
        if (grandchild == 0) {
            fill((uint64_t *)area[FORKED], bytes / 8, 1);
            expect(area[FORKED], bytes, 1, "in the grandchild");
            _exit(faults() != before);
        }
        int status = grandchild < 0 ? -1 : child_ends(grandchild);
        if (status)
            fault("the grandchild ended with %#x", status);
        expect(area[FORKED], bytes, key + FORKED, "in the child, after its own");
        _exit(faults() != before);
    }
    fill((uint64_t *)area[FORKED], bytes / 4 / 8, 2);
    int status = child_ends(child);
    if (status)
        fault("the child ended with %#x", status);
    expect(area[FORKED], bytes / 4, 2, "in the parent");
    char *rest = map(bytes, MAP_PRIVATE);
    fill((uint64_t *)rest, bytes / 8, key + FORKED);
    if (memcmp(rest + bytes / 4, area[FORKED] + bytes / 4, bytes - bytes / 4) != 0)
        fault("the parent's rest is wrong");
    munmap(rest, bytes);
}

static void spawns(void)
{
    char *arguments[] = { "true", NULL };
    pid_t child;
    must(posix_spawn(&child, "/bin/true", NULL, NULL, arguments, environ) == 0, "posix_spawn");
    int status = child_ends(child);
    if (status)
        fault("/bin/true ended with %#x", status);
}

static void drops(void)
{
    char *at = area[DROPPED];
    size_t quarter = bytes / 4;
    must(madvise(at + quarter, quarter, MADV_DONTNEED) == 0, "MADV_DONTNEED");
    expect_zero(at + quarter, quarter, "after MADV_DONTNEED");
    /* touched first, then dropped */
    expect(at, quarter, key + DROPPED, "beside MADV_DONTNEED");
    must(madvise(at, quarter, MADV_DONTNEED) == 0, "MADV_DONTNEED");
    expect_zero(at, quarter, "after a second MADV_DONTNEED");
    char *whole = map(bytes, MAP_PRIVATE);
    fill((uint64_t *)whole, bytes / 8, key + DROPPED);
    if (memcmp(whole + 2 * quarter, at + 2 * quarter, 2 * quarter) != 0)
        fault("the half that was not dropped is wrong");
    munmap(whole, bytes);
}

static void heap_shrinks(void)
{
    must(sbrk(0) == heap + bytes, "the end of the heap");
    must(brk(heap + bytes / 2) == 0, "brk");
    must(brk(heap + bytes) == 0, "brk");
    expect_zero(heap + bytes / 2, bytes / 2, "heap that grew again");
    expect(heap, bytes / 2, key + AREAS, "heap that stayed");
}

static void moves(void)
{
    char *to = map(bytes, MAP_PRIVATE);
    must(mremap(area[MOVED], bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to, "mremap");
    expect(to, bytes, key + MOVED, "moved");
    /* something else at the old place: the image's bytes must not show there */
    char *old = mmap(area[MOVED], bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (old == area[MOVED]) {
        expect_zero(old, bytes, "new memory at an old address");
        munmap(old, bytes);
    }
    area[MOVED] = to;
}

static void grows(void)
{
    char *at = mremap(area[GROWN], bytes, 2 * bytes, MREMAP_MAYMOVE);
    must(at != MAP_FAILED, "mremap");
    expect_zero(at + bytes, bytes, "the tail");
    expect(at, bytes, key + GROWN, "grown");
    must(mremap(at, 2 * bytes, bytes, 0) == at, "mremap");
    expect(at, bytes, key + GROWN, "shrunk");
    area[GROWN] = at;
}

static void cuts(void)
{
    char *at = area[CUT], *middle = at + bytes / 4;
    must(munmap(middle, bytes / 2) == 0, "munmap");
    must(mmap(middle, bytes / 2, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
              0) == middle, "mmap");
    expect_zero(middle, bytes / 2, "new memory in the middle");
    expect(at, bytes / 4, key + CUT, "before the cut");
    char *whole = map(bytes, MAP_PRIVATE);
    fill((uint64_t *)whole, bytes / 8, key + CUT);
    if (memcmp(whole + bytes / 4 * 3, at + bytes / 4 * 3, bytes / 4) != 0)
        fault("what is behind the cut is wrong");
    munmap(whole, bytes);
}

static void guards(void)
{
    /* it waited with PROT_NONE; a fork-like path reads it only now */
    must(mprotect(area[GUARDED], bytes, PROT_READ) == 0, "mprotect");
    expect(area[GUARDED], bytes, key + GUARDED, "that was PROT_NONE");
    must(mprotect(area[GUARDED], bytes, PROT_READ | PROT_WRITE) == 0, "mprotect");
}

static void shares(void)
{
    uint64_t before = faults();
    expect(area[SHARED], bytes / 2, key + SHARED, "shared");
    pid_t child = fork();
    must(child >= 0, "fork");
    if (child == 0) {
        expect(area[SHARED], bytes, key + SHARED, "shared, in the child");
        fill((uint64_t *)area[SHARED], bytes / 8, 3);
        _exit(faults() != before);
    }
    int status = child_ends(child);
    if (status)
        fault("the child that shares ended with %#x", status);
    expect(area[SHARED], bytes, 3, "written by the child");
    must(madvise(area[SHARED], bytes / 2, MADV_REMOVE) == 0, "MADV_REMOVE");
    expect_zero(area[SHARED], bytes / 2, "after MADV_REMOVE");
}

static void *one_of_many(void *unused)
{
    expect(area[TOGETHER], bytes, key + TOGETHER, "touched by four threads at once");
    return unused;
}

static void together(void)
{
    pthread_t thread[4];
    for (int i = 0; i < 4; i++)
        must(pthread_create(&thread[i], NULL, one_of_many, NULL) == 0, "pthread_create");
    for (int i = 0; i < 4; i++)
        pthread_join(thread[i], NULL);
}

/* missing pages that the kernel touches for the program: write(2), read(2), vectors */
static void by_kernel(void)
{
    char path[] = "/tmp/snap-edges-XXXXXX";
    size_t half = bytes / 2;
    int fd = mkstemp(path);
    must(fd >= 0 && unlink(path) == 0, path);
    ssize_t size = write(fd, area[BY_KERNEL], half);
    if (size != (ssize_t)half)
        fault("write from missing pages: %zd %s", size, strerror(errno));
    char *whole = map(bytes, MAP_PRIVATE);
    fill((uint64_t *)whole, bytes / 8, key + BY_KERNEL);
    size = pread(fd, area[BY_KERNEL] + half, half - PAGE, 0);
    if (size != (ssize_t)(half - PAGE))
        fault("read into missing pages: %zd %s", size, strerror(errno));
    if (memcmp(area[BY_KERNEL] + half, whole, half - PAGE) != 0)
        fault("what was written or read is wrong");
    if (memcmp(area[BY_KERNEL] + bytes - PAGE, whole + bytes - PAGE, PAGE) != 0)
        fault("the page behind a read is wrong");
    munmap(whole, bytes);
    close(fd);
}

/* one word of each page is written before the page was ever read */
static void partly(void)
{
    uint64_t *at = (uint64_t *)area[PARTLY];
    char *whole = map(bytes, MAP_PRIVATE);
    fill((uint64_t *)whole, bytes / 8, key + PARTLY);
    for (size_t i = 0; i < bytes / PAGE; i++)
        at[i * 512 + i % 512] = ((uint64_t *)whole)[i * 512 + i % 512] = i;
    if (memcmp(at, whole, bytes) != 0)
        fault("pages written before they were read are wrong");
    munmap(whole, bytes);
}

static const struct { const char *name; void (*run)(void); } operations[] = {
    { "fork", forks }, { "spawn", spawns }, { "drop", drops }, { "heap", heap_shrinks },
    { "move", moves }, { "grow", grows }, { "cut", cuts }, { "guard", guards },
    { "share", shares }, { "together", together }, { "kernel", by_kernel }, { "partly", partly },
};

static void fill_all(void)
{
    must(mprotect(area[GUARDED], bytes, PROT_READ | PROT_WRITE) == 0, "mprotect");
    for (unsigned i = 0; i < AREAS; i++)
        fill((uint64_t *)area[i], bytes / 8, key + i);
    fill((uint64_t *)heap, bytes / 8, key + AREAS);
    must(mprotect(area[GUARDED], bytes, PROT_NONE) == 0, "mprotect");
}

int main(int argc, char **argv)
{

    sigset_t usr1 = block_usr1();
    victim_start(argc, argv);
    victim_lanes(1);
    bytes = (size_t)option("mib", 4) * MIB;
    /* the heap's end is this program's alone: malloc has all it will need before that */
    settle_malloc();
    heap = (char *)(((uintptr_t)sbrk(0) + PAGE - 1) & ~(PAGE - 1));
    must(brk(heap + bytes) == 0, "brk");
    for (unsigned i = 0; i < AREAS; i++)
        area[i] = map(bytes, i == SHARED ? MAP_SHARED : MAP_PRIVATE);
    for (uint64_t round = 0;; round++) {
        key = (round + 1) * 1000;
        fill_all();
        if (round == 0)
            victim_ready();
        struct timespec often = { 0, 100000000 };
        do
            publish();
        while (sigtimedwait(&usr1, NULL, &often) != SIGUSR1);
        for (size_t i = 0; i < sizeof operations / sizeof *operations; i++) {
            if (*option_text("only", "") && strcmp(option_text("only", ""), operations[i].name))
                continue;
            values[0] = i;
            operations[i].run();
            progress[0]++;
            publish();
        }
        verified();
    }
}
