/* The pump against a hostile target, without Python and ptrace: built with ASan and UBSan.
 *
 * A child process writes, discards and moves its memory from several threads at full speed, and has
 * children that write to what it shares with them. The
 * parent copies it ahead in some rounds (or in none), parks the threads (they wait at a flag), reads
 * all memory as the oracle, settles, lets go and compares what the pump saved with the oracle, byte
 * for byte, many times over.
 *
 * usage: pump_test ROUNDS SEED [OPERATIONS]   operations: w write, d discard, m move, f fork (default wdmf)
 *        h: all of it in huge pages of hugetlbfs, which are also read; needs HUGE_PAGES free ones
 *        p: writers wait for nobody; what they share is copied at T0; where BPF programs can be loaded a list of
 *           their faults is used
 *        g: with p, another process writes to the target just before T0: no fault tells of that
 */
#define _GNU_SOURCE
#include "check.h"
#include "fault_list.h"
#include "pagemap.h"
#include "pump.h"
#include "uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
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
#define SHARED (8ul << 20) /* of all threads, and of their children */
#define TOTAL (THREADS * 2 * REGION + SHARED)
#define OBJECT_SPACE 65536
#define HUGE (2ul << 20)
#define HUGE_PAGES (THREADS * REGION / HUGE)
#define SLOTS 64

typedef struct {
    atomic_int park, parked, leave;
    atomic_int local; /* writers keep to a few pages at a time: what was copied ahead mostly stays */
    _Atomic(uint64_t) base[THREADS];  /* where each thread's region is now */
    _Atomic(uint64_t) place[THREADS]; /* it lies in [place, place + 2 * REGION) */
    _Atomic(uint64_t) object;         /* where the shared memory is */
} control;

static control *shared;
static const char *operations = "wdmf";
static int object; /* a memfd */
static bool told;  /* of forks */
static bool empties; /* what is empty can be protected too, and told from what is swapped out */
static bool huge, passes;
static snap_task_program *tasks; /* NULL: nobody can list faults */
static bool pokes;
static int by_list;              /* instants for which the list was used */
static int unproved;             /* that were refused because of it: */
static int unlisted;             /* it was not complete */

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

/* ---- the target -------------------------------------------------------------------------------- */

static void write_shared(uint64_t r)
{
    *(uint64_t *)(uintptr_t)(shared->object + (r >> 20) % (SHARED / 8) * 8) = r;
}

static void fork_writer(uint64_t *random)
{
    pid_t child = fork();
    CHECK(child >= 0);
    if (!child) {
        for (int i = 0; i < 200; i++)
            write_shared(next_random(random));
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && !WEXITSTATUS(status));
}

static void *mutate(void *arg)
{
    int me = (int)(intptr_t)arg;
    uint64_t random = 88172645463325252u + (uint64_t)me * 7919 + (uint64_t)getpid();
    /* A place of twice the size, so that the region can move to its other half. */
    char *place = mmap(NULL, 2 * REGION + HUGE, PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(place != MAP_FAILED);
    place += -(uintptr_t)place % (huge ? HUGE : CHUNK);
    shared->place[me] = (uint64_t)(uintptr_t)place;
    char *base = mmap(place, REGION, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | (huge ? MAP_HUGETLB : 0), -1, 0);
    CHECK(base == place);
    shared->base[me] = (uint64_t)(uintptr_t)base;
    uint64_t writes = 0;
    bool forks = me == 0 && strchr(operations, 'f');
    while (!shared->leave) {
        if (shared->park) {
            shared->parked++;
            while (shared->park)
                sched_yield();
            shared->parked--;
            if (forks) /* right after T0 */
                fork_writer(&random);
        }
        uint64_t r = next_random(&random);
        uint64_t page = r % (REGION / PAGE), kind = (r >> 32) % (shared->local ? 10000000 : 100000);
        if (shared->local && kind > 3) /* 32 pages, other ones from time to time, or never */
            page = (shared->local > 1 ? 0 : writes++ >> 14) * 331 % (REGION / PAGE / 32) * 32 + r % 32;
        if (kind < 3 && strchr(operations, 'd')) {
            uint64_t pages = 1 + (r >> 44) % 200;
            if (page + pages > REGION / PAGE)
                pages = REGION / PAGE - page;
            if (huge) {
                char *at = base + page * PAGE / HUGE * HUGE;
                CHECK(!madvise(at, HUGE, MADV_DONTNEED));
                if ((r >> 57) & 1) /* it is there again then, and empty */
                    CHECK(*(volatile char *)(at + (r >> 40) % HUGE) == 0);
                continue;
            }
            CHECK(!madvise(base + page * PAGE, pages * PAGE, (r >> 56) & 1 ? MADV_DONTNEED : MADV_FREE));
        } else if (kind == 3 && strchr(operations, 'm')) {
            char *to = base == place ? place + REGION : place;
            char *moved = mremap(base, REGION, REGION, MREMAP_MAYMOVE | MREMAP_FIXED, to);
            CHECK(moved == to);
            CHECK(mmap(base, REGION, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE,
                       -1, 0) == base);
            base = moved;
            shared->base[me] = (uint64_t)(uintptr_t)base;
        } else if (kind < 8 && forks) {
            fork_writer(&random);
        } else if (r >> 60 == 0) {
            write_shared(r);
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
    void *at = mmap(NULL, SHARED, PROT_READ | PROT_WRITE, MAP_SHARED, object, 0);
    CHECK(at != MAP_FAILED);
    memset(at, 1, SHARED);
    shared->object = (uint64_t)(uintptr_t)at;
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
    empties = snap_pagemap_tells();
    uint64_t features = (empties ? UFFD_FEATURE_WP_UNPOPULATED : 0) | UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_EVENT_REMAP |
                        UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP | (passes ? UFFD_FEATURE_WP_ASYNC : 0);
    uint64_t with_forks = features | UFFD_FEATURE_EVENT_FORK;
    told = !passes && !uffd_api(fd, &with_forks, NULL);
    CHECK(told || !uffd_api(fd, &features, NULL));
    return fd;
}

/* ---- one T0 ------------------------------------------------------------------------------------ */

static char *oracle, *image; /* of each thread's place: twice its region */

/* Of a chunk, which lies in the place of a thread, in `image`. */
static uint64_t offset_of(uint64_t address)
{
    int k = 0;
    while (address < shared->place[k] || address >= shared->place[k] + 2 * REGION)
        CHECK(++k < THREADS);
    return (uint64_t)k * 2 * REGION + (address - shared->place[k]);
}

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
            bool of_object = saved[i].space == OBJECT_SPACE;
            char *to = image + (of_object ? THREADS * 2 * REGION + saved[i].address
                                          : offset_of(saved[i].address));
            char from[CHUNK] = {0};
            if (saved[i].pages && saved[i].place >= 0)
                memcpy(from, staging + (uint64_t)saved[i].place * CHUNK, CHUNK);
            else if (saved[i].pages)
                CHECK(pread(spill, from, CHUNK, (-saved[i].place - 1) * (off_t)CHUNK) == (ssize_t)CHUNK);
            for (unsigned page = 0; page < CHUNK / PAGE; page++) {
                bool here = (saved[i].patch ? saved[i].patch : saved[i].pages) >> page & 1;
                if (here)
                    memcpy(to + page * PAGE, from + page * PAGE, PAGE);
                else if (!(saved[i].pages >> page & 1))
                    memset(to + page * PAGE, 0, PAGE);
            }
        }
        snap_pump_done(pump, saved, n);
    }
}

static void *run(void *arg)
{
    void **parts = arg;
    *(int *)parts[1] = snap_pump_run(parts[0]);
    return NULL;
}

static void await(snap_pump *pump, snap_pump_round *round)
{
    int r;
    while ((r = snap_pump_await(pump, 100, round)) == -ETIMEDOUT)
        continue;
    CHECK(!r);
}

/* The windows as they are; the target is parked. */
static void plan_windows(snap_window *windows)
{
    for (int k = 0; k < THREADS; k++) {
        uint64_t base = shared->base[k];
        windows[k] = (snap_window){.start = base, .end = base + REGION, .at = base, .object = -1,
                                   .armed = 1, .huge = huge ? HUGE : 0};
    }
    windows[THREADS] = (snap_window){.start = shared->object, .end = shared->object + SHARED,
                                     .space = OBJECT_SPACE, .object = object, .armed = told};
}

static void park(void)
{
    shared->park = 1;
    while (shared->parked < THREADS)
        sched_yield();
}

static void plan_anew(snap_pump *pump)
{
    snap_window windows[THREADS + 1];
    uint64_t where;
    plan_windows(windows);
    CHECK(!snap_pump_plan(pump, windows, THREADS + 1, 0, &where));
}

static void hold(snap_pump *pump)
{
    CHECK(!snap_pump_order_hold(pump));
    await(pump, NULL);
}

static void hold_and_plan(snap_pump *pump)
{
    hold(pump);
    plan_anew(pump);
}

static void count_errand(void *of)
{
    ++*(int *)of;
}

/* What was written is looked for before T0, by an order that need not be done when the next one is given; others
 * may help. */
static void look_and_hold(snap_pump *pump)
{
    int errands = 0, how = rand() % 4;
    snap_pump_release(pump);
    snap_pump_errand(pump, count_errand, &errands);
    CHECK(!snap_pump_order_look(pump, (uint64_t)(rand() % 4) * REGION / 4));
    if (how == 0)
        snap_pump_assist(pump);
    if (how == 1) {
        snap_pump_await_errand(pump);
        CHECK(errands == 1);
    }
    if (how == 2) {
        snap_pump_forget_errand(pump);
        CHECK(errands <= 1);
    }
    hold(pump);
    CHECK(errands == 1 || how == 2);
}

static void unpark(void)
{
    shared->park = 0;
    while (shared->parked)
        sched_yield();
}

static int order_one(snap_pump *pump, int i)
{
    if (passes && i % 3)
        return i % 3 == 1 ? snap_pump_order_last_round(pump) : snap_pump_order_written(pump);
    return i % 3 == 1 ? snap_pump_order_arm(pump, i % 2) : snap_pump_order_round(pump, i % 2);
}

static void copy_ahead(snap_pump *pump, int rounds)
{
    snap_pump_round round;
    for (int i = 0; i < rounds; i++) {
        bool plan = i % 2 == 0;
        if (plan) {
            park();
            hold_and_plan(pump);
            snap_pump_release(pump); /* an order right behind it must be taken */
        }
        CHECK(!order_one(pump, i));
        if (plan)
            unpark();
        await(pump, &round);
        uint64_t open[THREADS];
        for (int k = 0; k < THREADS; k++) /* not all of them are mapped */
            open[k] = shared->base[k] + (uint64_t)(i * 37 + k * 11) % (REGION / PAGE) * PAGE + 8;
        if (passes)
            continue;
        CHECK(!snap_pump_order_open(pump, open, THREADS));
        await(pump, NULL);
    }
}

/* What the image should be: at the same offsets. */
static void read_oracle(int pid)
{
    memset(oracle, 0, TOTAL);
    CHECK(pread(object, oracle + THREADS * 2 * REGION, SHARED, 0) == (ssize_t)SHARED);
    for (int k = 0; k < THREADS; k++) {
        struct iovec local = {oracle + offset_of(shared->base[k]), REGION};
        struct iovec remote = {(void *)(uintptr_t)shared->base[k], REGION};
        CHECK(process_vm_readv(pid, &local, 1, &remote, 1, 0) == (ssize_t)REGION);
    }
}

/* Where no thread of the target writes. */
static void poke(int pid, uint64_t value)
{
    uint64_t page = (uint64_t)rand() % (REGION / PAGE);
    struct iovec local = {&value, sizeof value};
    struct iovec remote = {(void *)(uintptr_t)(shared->base[0] + page * PAGE + 4000), sizeof value};
    CHECK(process_vm_writev(pid, &local, 1, &remote, 1, 0) == (ssize_t)sizeof value);
}

/* Returns 0 when the image was exact, 1 when the pump said that it could not be. */
static int one_instant(int pid, int channel, char *staging, int spill, int number)
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
    memset(image, 0, TOTAL);

    snap_pump *pump;
    CHECK(!snap_pump_new(pid, pagemap, mem, spill, staging, SLOTS, &pump));
    snap_pump_attach(pump, uffd, info);
    if (passes || (empties && number % 5 != 4))
        snap_pump_cover(pump, !pokes);
    if (passes)
        snap_pump_pass(pump);
    snap_fault_list *list = NULL;
    if (tasks && number % 8) {
        CHECK(!snap_fault_list_open(tasks, pid, &list));
        snap_pump_list(pump, snap_fault_list_ring(list), 1, 0);
    }
    snap_pump_release(pump); /* also before it stands */
    int result = 0, rounds = passes ? number % 7 : number % 4;
    void *runner_parts[] = {pump, &result}, *parts[] = {pump, staging, &spill};
    pthread_t consumer, runner;
    CHECK(!pthread_create(&consumer, NULL, consume, parts));
    CHECK(!pthread_create(&runner, NULL, run, runner_parts));
    shared->local = pokes ? 2 : number / 4 % 2;
    copy_ahead(pump, rounds);
    for (int i = 0; passes && i < number % 3; i++) { /* as before T0; right after one another, too */
        CHECK(!snap_pump_order_listed_round(pump));
        await(pump, NULL);
    }
    if (pokes && rand() % 2)
        poke(pid, (uint64_t)number + 1);
    park();
    hold_and_plan(pump);
    if (passes && number % 2)
        look_and_hold(pump);
    CHECK(!snap_pump_order_settle(pump, passes || number % 2 ? UINT64_MAX : 0, SNAP_TRUST_COPIES | SNAP_TRUST_COVER));
    int unsaved = snap_pump_await_settled(pump);
    CHECK(unsaved == 0 || (unsaved == 1 && (passes ? list != NULL : number % 2 == 0)));
    read_oracle(pid);
    snap_pump_go(pump);
    unpark();
    pthread_join(runner, NULL);
    pthread_join(consumer, NULL);
    snap_pump_counters counters;
    snap_pump_stats(pump, &counters);
    CHECK(!counters.missed_pages);
    by_list += counters.listed && !result;
    unproved += counters.listed && result;
    unlisted += result && counters.lost_reason == SNAP_LOST_UNLISTED;
    snap_fault_list_close(list);
    close(uffd);
    snap_pump_free(pump);
    close(info);
    close(pagemap);
    close(mem);
    if (result) {
        fprintf(stderr, "round %d: run %d, reason %u, %llu bytes from %llx\n", number, result,
                counters.lost_reason, (unsigned long long)counters.lost_bytes,
                (unsigned long long)counters.lost_address);
        return 1;
    }
    for (uint64_t at = 0; at < TOTAL; at += PAGE)
        if (memcmp(oracle + at, image + at, PAGE)) {
            int k = (int)(at / (2 * REGION));
            uint64_t place = (k < THREADS ? shared->place[k] : shared->object) + at % (2 * REGION);
            fprintf(stderr, "round %d: page %llx differs\n", number, (unsigned long long)place);
            exit(1);
        }
    printf("round %d: %d ahead, %llu chunks looked at, remainder %llu KiB; %llu faults, %llu + %llu chunks, %llu spilled, "
           "%llu events, %llu forks, %llu early\n", number, rounds, (unsigned long long)counters.looked_chunks, (unsigned long long)counters.remainder_bytes / 1024,
           (unsigned long long)counters.faults, (unsigned long long)counters.fault_chunks,
           (unsigned long long)counters.sweep_chunks, (unsigned long long)counters.spilled_chunks,
           (unsigned long long)counters.events, (unsigned long long)counters.forks,
           (unsigned long long)counters.fault_pages);
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
    huge = strchr(operations, 'h');
    passes = strchr(operations, 'p');
    pokes = strchr(operations, 'g');
    if (passes && !snap_pagemap_tells()) {
        printf("skipped: needs CAP_SYS_ADMIN\n");
        return 0;
    }
    if (huge) {
        void *all = mmap(NULL, HUGE_PAGES * HUGE, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
        if (all == MAP_FAILED) {
            printf("skipped: echo %lu > /proc/sys/vm/nr_hugepages\n", HUGE_PAGES);
            return 0;
        }
        munmap(all, HUGE_PAGES * HUGE);
    }
    if (passes && snap_task_program_load(&tasks))
        printf("no list of faults: no BPF\n");
    shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(shared != MAP_FAILED);
    object = memfd_create("shared", MFD_CLOEXEC);
    CHECK(object >= 0 && !ftruncate(object, (off_t)SHARED));
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
    oracle = malloc(TOTAL);
    image = malloc(TOTAL);
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
    if (tasks)
        printf("%d with a list of faults, %d refused because of it\n", by_list, unproved);
    CHECK(!tasks || !pokes || unlisted || rounds < 8);
    CHECK(!tasks || by_list || rounds < 8);
    snap_task_program_free(tasks);
    printf("%d exact, %d refused\n", rounds - refused, refused);
    return (refused - unproved) * 2 > rounds; /* a refusal is honest, but it must be rare */
}
