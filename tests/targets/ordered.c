/* ordered: counters on K pages, incremented in a fixed order, again and again. At every instant
 *     c[0] >= c[1] >= ... >= c[K-1] >= c[0] - 1
 * holds, and an image in which it does not is of no single instant.
 *
 *   --rings R     as many threads, each with K counters of its own
 *   --pages K     counters of a ring, one to a page
 *   --spread M    the pages are picked at random from M MiB, else they lie side by side
 *   --relay 1     one ring, its counters handed from thread to thread
 *   --table PATH  gets the addresses: R rows of K times 8 bytes */
#define _GNU_SOURCE
#include "victim.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

typedef volatile uint64_t counter;

static size_t rings, pages, threads;
static counter **table;

static void *run_ring(void *argument)
{
    size_t self = (size_t)argument;
    counter **ring = table + self * pages;

    for (uint64_t lap = 0;; lap++) {
        for (size_t k = 0; k < pages; k++) {
            if (*ring[k] != lap)
                fault("ring %zu, counter %zu at %p: %llu where %llu was written", self, k,
                      (void *)ring[k], (unsigned long long)*ring[k], (unsigned long long)lap);
            *ring[k] = lap + 1;
        }
        progress[1 + self] = lap;
    }
    return NULL;
}

static void *run_relay(void *argument)
{
    size_t self = (size_t)argument;

    for (uint64_t lap = 0;; lap++) {
        for (size_t k = self; k < pages; k += threads) {
            counter *before = table[k ? k - 1 : pages - 1];
            uint64_t wanted = k ? lap + 1 : lap;
            for (unsigned spins = 0; *before != wanted; spins++)
                if (spins > 100)
                    sched_yield();
            if (*table[k] != lap)
                fault("counter %zu at %p: %llu where %llu was written", k, (void *)table[k],
                      (unsigned long long)*table[k], (unsigned long long)lap);
            *table[k] = lap + 1;
        }
        progress[1 + self] = lap;
    }
    return NULL;
}

static void place(size_t spread)
{
    size_t room = spread * MIB / PAGE, wanted = rings * pages;
    room = room > wanted ? room : wanted;
    char *memory = mmap(NULL, room * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                        -1, 0);
    uint32_t *order = malloc(room * sizeof *order);

    table = malloc(wanted * sizeof *table);
    must(memory != MAP_FAILED && order && table, "memory");
    for (size_t i = 0; i < room; i++) {
        order[i] = (uint32_t)i;
        fill((uint64_t *)(memory + i * PAGE), PAGE / 8, i);
    }
    for (size_t i = 0; spread && i < wanted; i++) {
        size_t other = i + mix(i + 77) % (room - i);
        uint32_t kept = order[i];
        order[i] = order[other];
        order[other] = kept;
    }
    for (size_t i = 0; i < wanted; i++) {
        table[i] = (counter *)(memory + order[i] * PAGE + mix(i) % (PAGE / 8) * 8);
        *table[i] = 0;
    }
    free(order);
    values[0] = rings;
    values[1] = pages;
    values[2] = (uint64_t)(uintptr_t)memory;
    values[3] = room * PAGE;
}

static void tell(const char *path)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    ssize_t size = (ssize_t)(rings * pages * sizeof *table);
    must(fd >= 0 && write(fd, table, (size_t)size) == size, path);
    close(fd);
}

int main(int argc, char **argv)
{
    pthread_t thread;
    victim_start(argc, argv);
    victim_lanes(1 + (unsigned)option("rings", 1));
    bool relay = option("relay", 0) != 0;
    threads = (size_t)option("rings", 1);
    rings = relay ? 1 : threads;
    pages = (size_t)option("pages", 1024);
    place((size_t)option("spread", 0));
    tell(option_text("table", "/dev/null"));
    for (size_t i = 0; i < threads; i++)
        must(pthread_create(&thread, NULL, relay ? run_relay : run_ring, (void *)i) == 0, "thread");
    victim_ready();
    for (;;) {
        sleep_ms(5);
        progress[0]++;
        publish();
    }
}
