/* The pump against a hostile target, without Python and ptrace: built with ASan and UBSan.
 *
 * A child process writes, discards and moves its memory from several threads at full speed. The
 * parent parks the threads (they wait at a flag), reads all memory as the oracle, arms, lets go
 * and compares what the pump saved with the oracle, byte for byte, many times over.
 *
 * usage: pump_test ROUNDS SEED [OPERATIONS]   operations: w write, d discard, m move (default wdm)
 */
#define _GNU_SOURCE
#include "pump.h"
#include "uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ul
#define CHUNK 65536ul
#define REGION (24ul << 20) /* of one thread */
#define THREADS 3
#define SLOTS 64
#define CHECK(condition)                                                              \
    do {                                                                              \
        if (!(condition)) {                                                           \
            fprintf(stderr, "%s:%d: %s (errno %d)\n", __FILE__, __LINE__, #condition, errno); \
            exit(1);                                                                  \
        }                                                                             \
    } while (0)

typedef struct {
    atomic_int park, parked, leave;
    _Atomic(uint64_t) base[THREADS]; /* where each thread's region is now */
} control;

static control *shared;
static const char *operations = "wdm";

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

/* ---- the target -------------------------------------------------------------------------------- */

static void *mutate(void *arg)
{
    int me = (int)(intptr_t)arg;
    uint64_t random = 88172645463325252u + (uint64_t)me * 7919 + (uint64_t)getpid();
    /* A place of twice the size, so that the region can move to its other half. */
    char *place = mmap(NULL, 2 * REGION, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(place != MAP_FAILED);
    char *base = mmap(place, REGION, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    CHECK(base == place);
    shared->base[me] = (uint64_t)(uintptr_t)base;
    while (!shared->leave) {
        if (shared->park) {
            shared->parked++;
            while (shared->park)
                sched_yield();
            shared->parked--;
        }
        uint64_t r = next_random(&random);
        uint64_t page = r % (REGION / PAGE), kind = (r >> 32) % 100000;
        if (kind < 3 && strchr(operations, 'd')) {
            uint64_t pages = 1 + (r >> 44) % 200;
            if (page + pages > REGION / PAGE)
                pages = REGION / PAGE - page;
            CHECK(!madvise(base + page * PAGE, pages * PAGE, (r >> 56) & 1 ? MADV_DONTNEED : MADV_FREE));
        } else if (kind == 3 && strchr(operations, 'm')) {
            char *to = base == place ? place + REGION : place;
            char *moved = mremap(base, REGION, REGION, MREMAP_MAYMOVE | MREMAP_FIXED, to);
            CHECK(moved == to);
            CHECK(mmap(base, REGION, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE,
                       -1, 0) == base);
            base = moved;
            shared->base[me] = (uint64_t)(uintptr_t)base;
        } else {
            *(uint64_t *)(void *)(base + page * PAGE + (r >> 40) % 500 * 8) = r;
        }
    }
    return NULL;
}

static void target(int channel)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    pthread_t threads[THREADS];
    for (intptr_t i = 0; i < THREADS; i++)
        CHECK(!pthread_create(&threads[i], NULL, mutate, (void *)i));
    char byte;
    while (read(channel, &byte, 1) == 1) {
        int fd = uffd_open(O_CLOEXEC | O_NONBLOCK);
        CHECK(fd >= 0);
        char space[CMSG_SPACE(sizeof fd)] = {0};
        struct iovec vector = {&byte, 1};
        struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1,
                                 .msg_control = space, .msg_controllen = sizeof space};
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(header), &fd, sizeof fd);
        CHECK(sendmsg(channel, &message, 0) == 1);
        close(fd);
    }
    shared->leave = 1;
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    _exit(0);
}

static int receive_uffd(int channel)
{
    char byte = 'u';
    CHECK(write(channel, &byte, 1) == 1);
    char space[CMSG_SPACE(sizeof(int))];
    struct iovec vector = {&byte, 1};
    struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1,
                             .msg_control = space, .msg_controllen = sizeof space};
    CHECK(recvmsg(channel, &message, MSG_CMSG_CLOEXEC) == 1);
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    CHECK(header && header->cmsg_type == SCM_RIGHTS);
    int fd;
    memcpy(&fd, CMSG_DATA(header), sizeof fd);
    uint64_t features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_EVENT_REMAP |
                        UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP;
    CHECK(!uffd_api(fd, &features, NULL));
    return fd;
}

/* ---- one T0 ------------------------------------------------------------------------------------ */

static char *oracle, *image;
static uint64_t starts[THREADS];

static void *consume(void *arg)
{
    void **parts = arg;
    snap_pump *pump = parts[0];
    char *staging = parts[1];
    int spill = *(int *)parts[2];
    snap_saved saved[16];
    for (;;) {
        int n = snap_pump_next(pump, saved, 16, 100);
        if (n == -EPIPE)
            return NULL;
        CHECK(n >= 0);
        for (int i = 0; i < n; i++) {
            int k = 0;
            while (saved[i].address < starts[k] || saved[i].address >= starts[k] + REGION)
                CHECK(++k < THREADS);
            char *to = image + (uint64_t)k * REGION + (saved[i].address - starts[k]);
            if (saved[i].place >= 0)
                memcpy(to, staging + (uint64_t)saved[i].place * CHUNK, CHUNK);
            else
                CHECK(pread(spill, to, CHUNK, (-saved[i].place - 1) * (off_t)CHUNK) == (ssize_t)CHUNK);
        }
        CHECK(!snap_pump_done(pump, saved, n));
    }
}

static int by_value(const void *l, const void *r)
{
    const uint64_t *a = l, *b = r;
    return *a < *b ? -1 : *a > *b;
}

/* Returns 0 when the image was exact, 1 when the pump said that it could not be. */
static int one_instant(int pid, int channel, char *staging, int spill, int round)
{
    char path[64];
    int uffd = receive_uffd(channel);
    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", uffd);
    int info = open(path, O_RDONLY | O_CLOEXEC);
    snprintf(path, sizeof path, "/proc/%d/pagemap", pid);
    int pagemap = open(path, O_RDONLY | O_CLOEXEC);
    snprintf(path, sizeof path, "/proc/%d/mem", pid);
    int mem = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(info >= 0 && pagemap >= 0 && mem >= 0);

    shared->park = 1;
    while (shared->parked < THREADS)
        sched_yield();
    for (int k = 0; k < THREADS; k++)
        starts[k] = shared->base[k];
    qsort(starts, THREADS, sizeof *starts, by_value);

    snap_pump *pump;
    CHECK(!snap_pump_new(pid, uffd, info, pagemap, mem, spill, staging, SLOTS, &pump));
    for (int k = 0; k < THREADS; k++) {
        uint64_t low = starts[k] & ~(CHUNK - 1), high = (starts[k] + REGION + CHUNK - 1) & ~(CHUNK - 1);
        int area = snap_pump_add_area(pump, 0, low, high);
        CHECK(area >= 0);
        CHECK(!snap_pump_add_window(pump, area, starts[k], starts[k] + REGION, starts[k], 1, -1, PAGE));
    }
    uint64_t where;
    CHECK(!snap_pump_ready(pump));
    CHECK(!snap_pump_register(pump, &where));
    CHECK(!snap_pump_scan(pump));
    CHECK(!snap_pump_save_stopped(pump, 0));
    CHECK(!snap_pump_arm(pump));
    for (int k = 0; k < THREADS; k++) {
        struct iovec local = {oracle + (uint64_t)k * REGION, REGION};
        struct iovec remote = {(void *)(uintptr_t)starts[k], REGION};
        CHECK(process_vm_readv(pid, &local, 1, &remote, 1, 0) == (ssize_t)REGION);
    }
    memset(image, 0, THREADS * REGION);
    void *parts[] = {pump, staging, &spill};
    pthread_t consumer;
    CHECK(!pthread_create(&consumer, NULL, consume, parts));
    shared->park = 0;
    int r = snap_pump_run(pump);
    pthread_join(consumer, NULL);
    snap_pump_counters counters;
    snap_pump_stats(pump, &counters);
    close(uffd);
    snap_pump_free(pump);
    close(info);
    close(pagemap);
    close(mem);
    while (shared->parked)
        sched_yield();
    if (r) {
        fprintf(stderr, "round %d: run %d, reason %u, %llu bytes from %llx\n", round, r,
                counters.lost_reason, (unsigned long long)counters.lost_bytes,
                (unsigned long long)counters.lost_address);
        return 1;
    }
    for (uint64_t at = 0; at < THREADS * REGION; at += PAGE)
        if (memcmp(oracle + at, image + at, PAGE)) {
            fprintf(stderr, "round %d: page %llx differs\n", round,
                    (unsigned long long)(starts[at / REGION] + at % REGION));
            exit(1);
        }
    printf("round %d: %llu faults, %llu + %llu chunks, %llu spilled, %llu events\n", round,
           (unsigned long long)counters.faults, (unsigned long long)counters.fault_chunks,
           (unsigned long long)counters.sweep_chunks, (unsigned long long)counters.spilled_chunks,
           (unsigned long long)counters.events);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    setvbuf(stdout, NULL, _IOLBF, 0);
    int rounds = atoi(argv[1]);
    srand((unsigned)atoi(argv[2]));
    if (argc > 3)
        operations = argv[3];
    shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(shared != MAP_FAILED);
    int pair[2];
    CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair));
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (!pid) {
        close(pair[0]);
        target(pair[1]);
    }
    close(pair[1]);
    for (int k = 0; k < THREADS; k++)
        while (!shared->base[k])
            sched_yield();
    oracle = malloc(THREADS * REGION);
    image = malloc(THREADS * REGION);
    char *staging = mmap(NULL, SLOTS * CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int spill = open("/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    CHECK(oracle && image && staging != MAP_FAILED && spill >= 0);
    int refused = 0;
    for (int i = 0; i < rounds; i++)
        refused += one_instant(pid, pair[0], staging, spill, i);
    close(pair[0]);
    int status;
    CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && !WEXITSTATUS(status));
    free(oracle);
    free(image);
    printf("%d exact, %d refused\n", rounds - refused, refused);
    return refused * 2 > rounds; /* a refusal is honest, but it must be rare */
}
