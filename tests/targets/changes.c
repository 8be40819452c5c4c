/* changes: memory with a known pattern, and commands that change its shape, each of which checks that
 * every page reads as it must. For restores whose pages are still missing when the commands come.
 *
 * Commands: one line in the file `do`, the answer in the file `done` ("ok" or what is wrong), both in
 * the working directory; `do` is removed when it was read. Usage: changes MIB [READY-FD] */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
static char *area;
static size_t pages;
static char *heap;
#define HEAP_PAGES 512UL
static char wrong[512];

static void answer(const char *text)
{
    int fd = open("done.new", O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (fd < 0 || write(fd, text, strlen(text)) < 0)
        abort();
    close(fd);
    rename("done.new", "done");
}

static __attribute__((format(printf, 1, 2))) int bad(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    if (!wrong[0])
        vsnprintf(wrong, sizeof wrong, format, list);
    va_end(list);
    return 1;
}

/* page n holds n + 1 in its first word and its complement in the last one; every third page was never
 * touched and is zero */
static uint64_t word_of(size_t n) { return n % 3 == 2 ? 0 : n + 1; }

static void fill(char *at, size_t first, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        uint64_t *page = (uint64_t *)(at + i * PAGE);
        if (word_of(first + i)) {
            page[0] = word_of(first + i);
            page[511] = ~word_of(first + i);
        }
    }
}

static int check(const char *what, const char *at, size_t first, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        const uint64_t *page = (const uint64_t *)(at + i * PAGE);
        uint64_t want = word_of(first + i);
        if (page[0] != want || page[511] != (want ? ~want : 0) || page[100])
            return bad("%s: page %zu holds %lx, not %lx", what, first + i, page[0], want);
    }
    return 0;
}

static int zeros(const char *what, const char *at, size_t count)
{
    for (size_t i = 0; i < count * PAGE; i += 8)
        if (*(const uint64_t *)(at + i))
            return bad("%s: byte %zu of a page %zu that was given up", what, i % PAGE, i / PAGE);
    return 0;
}

static size_t quarter(void) { return pages / 4; }

static int dontneed(void)
{
    size_t q = quarter();
    if (madvise(area + q * PAGE, q * PAGE, MADV_DONTNEED))
        return bad("madvise: %m");
    return zeros("dontneed", area + q * PAGE, q) || check("before", area, 0, q) ||
           check("behind", area + 2 * q * PAGE, 2 * q, q);
}

static int give_up_free(void)
{
    /* MADV_FREE may keep the bytes: pages that were missing must be zeros, others either */
    size_t q = quarter();
    if (madvise(area, q * PAGE, MADV_FREE))
        return bad("madvise: %m");
    for (size_t i = 0; i < q; i++) {
        uint64_t now = *(volatile uint64_t *)(area + i * PAGE);
        if (now && now != word_of(i))
            return bad("free: page %zu holds %lx", i, now);
    }
    return check("behind", area + q * PAGE, q, q);
}

static int move(void)
{
    /* an odd number of pages away, so that chunks of the image are no chunks here */
    size_t q = quarter();
    char *room = mmap(NULL, (q + 8) * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *to = room + 3 * PAGE;
    if (mremap(area + q * PAGE, q * PAGE, q * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
        return bad("mremap: %m");
    char *fresh = mmap(area + q * PAGE, q * PAGE, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (fresh != area + q * PAGE)
        return bad("mmap: %m");
    return check("moved", to, q, q) || zeros("left behind", fresh, q) ||
           check("before", area, 0, q) || check("behind", area + 2 * q * PAGE, 2 * q, q);
}

static int grow(void)
{
    /* the last quarter shrinks, moves and grows */
    size_t q = quarter(), start = 3 * q;
    char *part = area + start * PAGE;
    if (mremap(part, q * PAGE, q / 2 * PAGE, 0) != part)
        return bad("mremap shrinks: %m");
    char *to = mremap(part, q / 2 * PAGE, 2 * q * PAGE, MREMAP_MAYMOVE);
    if (to == MAP_FAILED)
        return bad("mremap grows: %m");
    return check("grown", to, start, q / 2) ||
           zeros("new", to + q / 2 * PAGE, 2 * q - q / 2) || check("before", area, 0, q);
}

static int unmap(void)
{
    size_t q = quarter();
    if (munmap(area + q * PAGE, q * PAGE))
        return bad("munmap: %m");
    char *fresh = mmap(area + q * PAGE, q * PAGE, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    return zeros("mapped anew", fresh, q) || check("before", area, 0, q) ||
           check("behind", area + 2 * q * PAGE, 2 * q, q);
}

static int brk_moves(void)
{
    size_t half = HEAP_PAGES / 2;
    if (sbrk(-(long)(half * PAGE)) == (void *)-1 || sbrk(half * PAGE) == (void *)-1)
        return bad("sbrk: %m");
    return check("heap", heap, 7, half) || zeros("heap grown", heap + half * PAGE, half);
}

static int protect(void)
{
    size_t q = quarter();
    if (mprotect(area + (q + 5) * PAGE, 7 * PAGE, PROT_READ))
        return bad("mprotect: %m");
    if (check("protected", area, 0, pages))
        return 1;
    if (mprotect(area + (q + 5) * PAGE, 7 * PAGE, PROT_READ | PROT_WRITE))
        return bad("mprotect: %m");
    return 0;
}

static int child_status(pid_t child)
{
    int status;
    if (waitpid(child, &status, 0) != child)
        return bad("waitpid: %m");
    return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 0 : bad("child: status %x", status);
}

/* The child reads what the parent has overwritten, given up and moved since, and forks itself. */
static int forks(void)
{
    size_t q = quarter();
    int go[2];
    if (pipe(go))
        return bad("pipe: %m");
    pid_t child = fork();
    if (child == 0) {
        char byte;
        close(go[1]);
        if (read(go[0], &byte, 1) != 0)
            _exit(3);
        if (check("child", area, 0, 2 * q)) {
            answer(wrong);
            _exit(1);
        }
        if (madvise(area + 2 * q * PAGE, q / 2 * PAGE, MADV_DONTNEED))
            _exit(4);
        pid_t grandchild = fork();
        if (grandchild == 0)
            _exit(check("grandchild", area + 3 * q * PAGE, 3 * q, q) ||
                  zeros("grandchild", area + 2 * q * PAGE, q / 2));
        _exit(child_status(grandchild) || check("child", area, 0, 2 * q));
    }
    if (child < 0)
        return bad("fork: %m");
    memset(area, 0xAA, q / 2 * PAGE);
    if (madvise(area + q * PAGE, q * PAGE, MADV_DONTNEED))
        return bad("madvise: %m");
    close(go[0]);
    close(go[1]);
    if (child_status(child))
        return 1;
    for (size_t i = 0; i < q / 2 * PAGE; i++)
        if (area[i] != (char)0xAA)
            return bad("the parent lost what it wrote at %zu", i);
    return zeros("parent", area + q * PAGE, q) || check("parent", area + 2 * q * PAGE, 2 * q, q);
}

/* A child that is still there, with pages missing, when the parent is complete. */
static int orphan(void)
{
    pid_t child = fork();
    if (child == 0) {
        nanosleep(&(struct timespec){.tv_nsec = 300000000}, NULL);
        if (!check("orphan", area, 0, pages))
            answer("orphan ok");
        else
            answer(wrong);
        _exit(0);
    }
    return child < 0 ? bad("fork: %m") : 0;
}

/* In two steps, so that something can happen in between: nothing is touched in the first one. */
static char *moved;

static int change(void)
{
    size_t q = quarter();
    char *room = mmap(NULL, (q + 8) * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    moved = room + 5 * PAGE;
    if (madvise(area + PAGE, (q - 1) * PAGE, MADV_DONTNEED))
        return bad("madvise: %m");
    if (mremap(area + q * PAGE, q * PAGE, q * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, moved) != moved)
        return bad("mremap: %m");
    if (munmap(area + 2 * q * PAGE, q / 2 * PAGE))
        return bad("munmap: %m");
    return 0;
}

static int changed(void)
{
    size_t q = quarter();
    return zeros("given up", area + PAGE, q - 1) || check("kept", area, 0, 1) ||
           check("moved", moved, q, q) ||
           check("behind", area + (2 * q + q / 2) * PAGE, 2 * q + q / 2, q - q / 2) ||
           check("last", area + 3 * q * PAGE, 3 * q, q);
}

static int spawns(void)
{
    int status = system("exit 7");
    return WIFEXITED(status) && WEXITSTATUS(status) == 7 ? 0 : bad("system: %x", status);
}

static void *reader(void *seed)
{
    uint64_t state = (uintptr_t)seed * 2654435761u + 1;
    for (int i = 0; i < 4000; i++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        size_t page = state % pages;
        if (check("thread", area + page * PAGE, page, 1))
            return (void *)1;
    }
    return NULL;
}

static int many_threads(void)
{
    pthread_t threads[8];
    int failed = 0;
    for (uintptr_t i = 0; i < 8; i++)
        if (pthread_create(&threads[i], NULL, reader, (void *)(i + 1)))
            return bad("pthread_create");
    for (int i = 0; i < 8; i++) {
        void *result;
        pthread_join(threads[i], &result);
        failed |= result != NULL;
    }
    return failed;
}

/* The kernel itself reads missing pages. */
static int writes_out(void)
{
    int fd = open("/dev/null", O_WRONLY), file = open("copy", O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (write(file, area, pages * PAGE) != (ssize_t)(pages * PAGE))
        return bad("write: %m");
    char *copy = mmap(NULL, pages * PAGE, PROT_READ, MAP_SHARED, file, 0);
    int result = check("written", copy, 0, pages);
    munmap(copy, pages * PAGE);
    close(fd);
    close(file);
    return result;
}

static int all(void) { return check("all", area, 0, pages) || check("heap", heap, 7, HEAP_PAGES); }

static int becomes(void)
{
    execl("/bin/sh", "sh", "-c", "echo ok > done.new; mv done.new done; exec sleep 60", NULL);
    return bad("exec: %m");
}

static int ends(void) { _exit(5); }

static const struct {
    const char *name;
    int (*run)(void);
} commands[] = {
    {"dontneed", dontneed}, {"free", give_up_free}, {"move", move}, {"grow", grow},
    {"unmap", unmap}, {"brk", brk_moves}, {"protect", protect}, {"fork", forks},
    {"orphan", orphan}, {"spawn", spawns}, {"threads", many_threads}, {"write", writes_out},
    {"all", all}, {"change", change}, {"changed", changed}, {"exec", becomes}, {"exit", ends},
};

int main(int argc, char **argv)
{
    pages = (argc > 1 ? (size_t)atoi(argv[1]) : 16) * 256;
    area = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (area == MAP_FAILED)
        return 1;
    madvise(area, pages * PAGE, MADV_NOHUGEPAGE);
    fill(area, 0, pages);
    heap = sbrk(0);
    heap += -(uintptr_t)heap % PAGE;
    if (brk(heap + HEAP_PAGES * PAGE))
        return 1;
    fill(heap, 7, HEAP_PAGES);
    answer("ready");
    for (;;) {
        char line[64] = "";
        int fd = open("do", O_RDONLY);
        if (fd < 0 || read(fd, line, sizeof line - 1) <= 0) {
            if (fd >= 0)
                close(fd);
            nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
            continue;
        }
        close(fd);
        unlink("do");
        for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
            if (!strcmp(line, commands[i].name)) {
                wrong[0] = 0;
                answer(commands[i].run() ? wrong : "ok");
            }
    }
}
