/* writer: N threads write at full speed, at random, through memory of every kind; all of it can be
 * checked by the program itself.
 *
 * A page belongs to one thread. Its 512 words each hold (generation << 32 | check of page, slot and
 * generation). A write to a page: ledger[page] = g, one word chosen by (page, g), then word 0. So a
 * single page that comes back from another instant than the ledger's is found.
 *
 *   --threads N --mib M --kind anon|thp|many|memfd|shm|brk|stack|data|file|ro|mixed
 *   --sparse 1     every eighth page is left empty until it is first written
 *   --rate N       writes per thread and second, 0 = without pause
 * SIGUSR1: every thread checks all of its pages, then status.verified grows by one. */
#define _GNU_SOURCE
#include "victim.h"

#include <alloca.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define SLOTS (PAGE / 8)
#define MAX_SPANS 256
#define STATIC_PAGES 256

enum { CONSTANT = 1, NEVER_EMPTY = 2, STARTS_EMPTY = 4 };
struct span { char *start; size_t first, pages; unsigned flags; };

/* .data with a value that makes it part of the file, and .bss behind it */
static char in_data[STATIC_PAGES * PAGE] __attribute__((aligned(4096))) = { 1 };
static char in_bss[STATIC_PAGES * PAGE] __attribute__((aligned(4096)));

static struct span spans[MAX_SPANS];
static size_t span_count, page_count;
static uint32_t *ledger;
static char **page_at;          /* page number -> address */
static uint8_t *page_flags;
static bool sparse;
static size_t writers;
static long rate;
static _Atomic uint64_t check_wanted, check_done;

static uint64_t word(size_t page, size_t slot, uint32_t generation)
{
    uint64_t key = (uint64_t)page << 42 ^ (uint64_t)slot << 32 ^ generation;
    return (uint64_t)generation << 32 | (uint32_t)mix(key + 0x5bd1e995);
}

static size_t slot_of(size_t page, uint32_t generation)
{
    return 1 + mix((uint64_t)page << 32 ^ generation) % (SLOTS - 1);
}

static void add(void *start, size_t pages, unsigned flags)
{
    must(start != MAP_FAILED && span_count < MAX_SPANS, "a mapping");
    spans[span_count++] = (struct span){ start, page_count, pages, flags };
    page_count += pages;
}

static void *anonymous(size_t bytes, int flags)
{
    return mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_ANONYMOUS | MAP_NORESERVE | flags, -1, 0);
}

static void *of_file(size_t bytes)
{
    char path[512];
    snprintf(path, sizeof path, "%s.private", option_text("status", "/tmp/writer"));
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    must(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0, path);
    char *page = malloc(bytes);
    must(page != NULL, "malloc");
    memset(page, 0x5a, bytes);
    must(pwrite(fd, page, bytes, 0) == (ssize_t)bytes, path);
    free(page);
    void *start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    close(fd);
    return start;
}

static void add_kind(const char *kind, size_t pages, char *stack)
{
    size_t bytes = pages * PAGE;

    if (strcmp(kind, "anon") == 0) {
        add(anonymous(bytes, MAP_PRIVATE), pages, 0);
    } else if (strcmp(kind, "thp") == 0) {
        char *start = anonymous(bytes + 2 * MIB, MAP_PRIVATE);
        start = (char *)(((uintptr_t)start + 2 * MIB - 1) & ~(2 * MIB - 1));
        must(madvise(start, bytes, MADV_HUGEPAGE) == 0, "MADV_HUGEPAGE");
        add(start, pages, 0);
    } else if (strcmp(kind, "many") == 0) {
        size_t each = pages / 64 ? pages / 64 : 1;
        char *start = mmap(NULL, 64 * (each + 1) * PAGE, PROT_NONE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        must(start != MAP_FAILED, "a reservation");
        for (size_t i = 0; i < 64; i++) {
            char *at = start + i * (each + 1) * PAGE;
            must(mprotect(at, each * PAGE, PROT_READ | PROT_WRITE) == 0, "mprotect");
            add(at, each, 0);
        }
    } else if (strcmp(kind, "memfd") == 0) {
        int fd = memfd_create("writer", MFD_CLOEXEC);
        must(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0, "memfd");
        add(mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), pages, 0);
    } else if (strcmp(kind, "shm") == 0) {
        add(anonymous(bytes, MAP_SHARED), pages, 0);
    } else if (strcmp(kind, "brk") == 0) {
        char *start = sbrk((intptr_t)(bytes + PAGE));
        must(start != (void *)-1, "sbrk");
        add((char *)(((uintptr_t)start + PAGE - 1) & ~(PAGE - 1)), pages, 0);
    } else if (strcmp(kind, "stack") == 0) {
        add(stack, STATIC_PAGES, NEVER_EMPTY);  /* main was not the first there */
    } else if (strcmp(kind, "data") == 0) {
        add(in_data, STATIC_PAGES, 0);
        add(in_bss, STATIC_PAGES, 0);
    } else if (strcmp(kind, "file") == 0) {
        add(of_file(bytes), pages, NEVER_EMPTY);
    } else if (strcmp(kind, "ro") == 0) {
        add(anonymous(bytes, MAP_PRIVATE), pages, CONSTANT);
    } else {
        must(false, kind);
    }
}

static void initialise(void)
{
    page_at = anonymous((page_count + 1) * sizeof *page_at, MAP_PRIVATE);
    ledger = anonymous((page_count + 1) * sizeof *ledger, MAP_PRIVATE);
    page_flags = anonymous(page_count + 1, MAP_PRIVATE);
    must(page_at != MAP_FAILED && ledger != MAP_FAILED && page_flags != MAP_FAILED, "the ledger");
    for (size_t i = 0; i < span_count; i++)
        for (size_t k = 0; k < spans[i].pages; k++) {
            size_t page = spans[i].first + k;
            page_at[page] = spans[i].start + k * PAGE;
            uint64_t *at = (uint64_t *)page_at[page];
            page_flags[page] = (uint8_t)spans[i].flags;
            if (sparse && page % 8 == 7 && !(spans[i].flags & NEVER_EMPTY))
                page_flags[page] |= STARTS_EMPTY;
            else
                for (size_t slot = 0; slot < SLOTS; slot++)
                    at[slot] = word(page, slot, 0);
        }
    for (size_t i = 0; i < span_count; i++)
        if (spans[i].flags & CONSTANT)
            must(mprotect(spans[i].start, spans[i].pages * PAGE, PROT_READ) == 0, "mprotect");
}

static void check_page(size_t page)
{
    const volatile uint64_t *at = (const volatile uint64_t *)page_at[page];
    uint32_t last = ledger[page];

    for (size_t slot = 0; slot < SLOTS; slot++) {
        uint64_t found = at[slot];
        uint32_t generation = (uint32_t)(found >> 32);
        if (found == 0 && (page_flags[page] & STARTS_EMPTY) && (slot || last == 0))
            continue;
        if (found != word(page, slot, generation) || generation > last)
            fault("page %zu at %p, word %zu: %#llx is not of generation 0..%u", page,
                  (void *)page_at[page], slot, (unsigned long long)found, last);
        else if (slot == 0 && generation != last)
            fault("page %zu at %p is of generation %u, the ledger says %u", page,
                  (void *)page_at[page], generation, last);
    }
    size_t slot = slot_of(page, last);
    if (last && at[slot] != word(page, slot, last))
        fault("page %zu at %p lacks its last write, word %zu of generation %u", page,
              (void *)page_at[page], slot, last);
}

static void write_page(size_t page)
{
    volatile uint64_t *at = (volatile uint64_t *)page_at[page];
    uint32_t last = ledger[page], generation = last + 1;
    size_t slot = slot_of(page, generation);

    /* before it is written over: a page of another instant would heal within microseconds */
    if (at[0] != word(page, 0, last) && !(last == 0 && (page_flags[page] & STARTS_EMPTY)))
        fault("page %zu at %p is of generation %u, the ledger says %u", page,
              (void *)page_at[page], (uint32_t)(at[0] >> 32), last);
    *(volatile uint32_t *)&ledger[page] = generation;
    at[slot] = word(page, slot, generation);
    at[0] = word(page, 0, generation);
}

static void *write_on(void *argument)
{
    size_t self = (size_t)argument, own = (page_count - self + writers - 1) / writers;
    uint64_t random = mix(self + 1), checked = 0;

    for (uint64_t n = 1;; n++) {
        random += 0x9e3779b97f4a7c15ULL;
        size_t page = self + mix(random) % own * writers;
        if (!(page_flags[page] & CONSTANT))
            write_page(page);
        if (rate && n % (uint64_t)((rate + 99) / 100) == 0)
            sleep_ms(10);
        if (n % 64)
            continue;
        progress[1 + self] = n;
        if (check_wanted != checked) {
            checked++;
            for (size_t page = self; page < page_count; page += writers)
                check_page(page);
            atomic_fetch_add(&check_done, 1);
        }
    }
    return NULL;
}

int main(int argc, char **argv)
{
    const char *kinds[] = { "anon", "thp", "many", "memfd", "shm", "brk", "stack", "data", "file",
                            "ro" };
    char *stack = alloca((STATIC_PAGES + 1) * PAGE);
    pthread_t thread;

    stack = (char *)(((uintptr_t)stack + PAGE - 1) & ~(PAGE - 1));
    sigset_t usr1 = block_usr1();
    victim_start(argc, argv);
    victim_lanes(1 + (unsigned)option("threads", 2));
    writers = (size_t)option("threads", 2);
    sparse = option("sparse", 0) != 0;
    rate = option("rate", 0);
    size_t pages = (size_t)option("mib", 64) * MIB / PAGE;
    const char *kind = option_text("kind", "anon");
    if (strcmp(kind, "mixed") != 0)
        add_kind(kind, pages, stack);
    else
        for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
            add_kind(kinds[i], pages / 8 < 512 ? 512 : pages / 8 & ~511UL, stack);
    initialise();
    values[0] = page_count;
    values[1] = (uint64_t)(uintptr_t)spans[0].start;
    values[2] = spans[0].pages * PAGE;
    for (size_t i = 0; i < writers; i++)
        must(pthread_create(&thread, NULL, write_on, (void *)i) == 0, "pthread_create");
    victim_ready();
    for (uint64_t checks = 0;;) {
        struct timespec often = { 0, 5000000 };
        if (sigtimedwait(&usr1, NULL, &often) == SIGUSR1)
            check_wanted++;
        progress[0]++;
        if (check_done == (checks + 1) * writers) {
            checks++;
            verified();
        }
        publish();
    }
}
