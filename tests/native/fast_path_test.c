/* The fast path on memory of this process: threads read all of it in any order, and give some of it up,
 * while pages come to who waits and from decoders, some of which end. Each page must hold what the image
 * has, or zeros once it was given up. */
#define _GNU_SOURCE
#include "fast_path.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"

enum { PAGE = 4096, CHUNK = 16 * PAGE, CHUNKS = 120, READERS = 3, DECODERS = 2, EACH = 2, ENTRY = 32 };

static char *area, *image, *memory;
static uint64_t addresses[CHUNKS];
static btree_place places[CHUNKS];
static char entries[CHUNKS * ENTRY];
static const snap_chunks chunks = {addresses, places, entries, CHUNKS, ENTRY}, none;
static int store, uffd, finished, pipes[DECODERS][2][2];
static unsigned seed;
static int sound; /* all chunks are to be had */

static void put16(char *at, unsigned x)
{
    at[0] = (char)(x >> 8), at[1] = (char)x;
}

/* Every fourth chunk has pages of zeros, some are not to be had, and some are damaged. */
static void make_chunk(snap_blocks *blocks, uint32_t i, uint64_t *end)
{
    static char room[SNAP_BLOCKS_HEADS + CHUNK], payload[CHUNK];
    char header[24] = {0}, *chunk = image + i * CHUNK;
    uint32_t nonzero = i % 4 ? 0xffff : (uint32_t)rand_r(&seed) & 0xffff, bytes = 0, length;
    for (uint32_t page = 0; page < 16; page++)
        if (nonzero >> page & 1) {
            for (uint32_t at = 0; at < PAGE; at += 16)
                memcpy(chunk + page * PAGE + at, &(uint64_t[]){i * 16 + page + 1, at}, 16);
            memcpy(payload + bytes, chunk + page * PAGE, PAGE);
            bytes += PAGE;
        }
    put16(header, 0xffff);
    put16(header + 2, nonzero);
    for (int at = 8; at < 24; at++)
        header[at] = (char)rand_r(&seed);
    const char *payloads[] = {payload};
    uint8_t plain = i % 5 == 0;
    CHECK(snap_blocks_encode(blocks, 1, header, payloads, &bytes, &plain, -2, room, &length) == 0);
    if (!sound && i % 11 == 3)
        room[length - 1] ^= 1;
    CHECK(pwrite(store, room, length, (off_t)*end) == (ssize_t)length);
    places[i] = (btree_place){.offset = *end, .bytes = !sound && i % 13 == 5 ? 0 : length};
    memcpy(entries + i * ENTRY + 16, header + 8, 16);
    addresses[i] = (uint64_t)(uintptr_t)area + i * CHUNK;
    *end += length;
}

static void *decode(void *argument)
{
    size_t number = (size_t)argument;
    snap_stored *stored = snap_stored_new(store, &chunks, &none);
    struct { uint32_t slot, chunks; uint64_t address; } asked;
    unsigned own = seed + (unsigned)number;
    CHECK(stored);
    while (read(pipes[number][0][0], &asked, sizeof asked) == sizeof asked) {
        struct { uint32_t slot, good; uint16_t present[SNAP_FAST_RUN]; } answer = {asked.slot, 0, {0}};
        CHECK(asked.slot & SNAP_FAST_OWN);
        uint32_t slot = asked.slot & ~SNAP_FAST_OWN;
        CHECK(slot / EACH == number);
        if (number && rand_r(&own) % 20 == 0)
            break;
        answer.good = snap_stored_run(stored, asked.address, asked.chunks,
                                      memory + (size_t)slot * SNAP_FAST_RUN * CHUNK, answer.present);
        CHECK(write(pipes[number][1][1], &answer, sizeof answer) == sizeof answer);
    }
    close(pipes[number][1][1]);
    snap_stored_free(stored);
    return NULL;
}

static void compare(uint32_t page, int gone)
{
    static const char zeros[PAGE];
    CHECK(!memcmp(area + (size_t)page * PAGE, gone ? zeros : image + (size_t)page * PAGE, PAGE));
}

/* A third of the pages each, in pieces of eight. */
static void *work(void *argument)
{
    uint32_t number = (uint32_t)(size_t)argument, pages = CHUNKS * 16;
    unsigned own = seed * 7 + number;
    char *gone = calloc(pages, 1);
    for (int i = 0; i < 400; i++) {
        uint32_t page = (uint32_t)rand_r(&own) % pages;
        if (page / 8 % READERS != number)
            continue;
        if (rand_r(&own) % 4 == 0) {
            CHECK(!madvise(area + (size_t)page * PAGE, PAGE, MADV_DONTNEED));
            gone[page] = 1;
        }
        compare(page, gone[page]);
        page ^= (uint32_t)rand_r(&own) % 8; /* in the same chunk, while the rest of that is on its way */
        if (i % 2 && !madvise(area + (size_t)page * PAGE, PAGE, MADV_DONTNEED))
            gone[page] = 1;
    }
    for (uint32_t page = 0; page < pages; page++)
        if (page / 8 % READERS == number)
            compare(page, gone[page]);
    free(gone);
    uint64_t one = 1;
    CHECK(write(finished, &one, sizeof one) == sizeof one);
    return NULL;
}

/* What is left to the caller: as its ledger would have it. */
static void handle(snap_fast_path *fast, const uffd_message *message, uint8_t *given_up)
{
    uint64_t start = (uint64_t)(uintptr_t)area;
    if (message->event == UFFD_EVENT_REMOVE) {
        memset(given_up + (message->arg[0] - start) / PAGE, 1, (message->arg[1] - message->arg[0]) / PAGE);
        snap_fast_path_forbid(fast, message->arg[0], message->arg[1]);
        return;
    }
    CHECK(message->event == UFFD_EVENT_PAGEFAULT);
    uint64_t at = message->arg[1] & ~(uint64_t)(PAGE - 1);
    uffd_filled filled;
    int error;
    /* EAGAIN: an event is to be read first, after which it faults again. */
    if (given_up[(at - start) / PAGE])
        error = uffd_fill(uffd, at, image, 1, 0, &filled);
    else
        error = uffd_fill(uffd, at, image + (at - start), 1, 1, &filled);
    CHECK(!error || error == -EAGAIN);
    if (error)
        CHECK(!uffd_wake(uffd, at, PAGE));
}

static uint64_t run(snap_fast_path *fast, uint32_t *lost)
{
    static snap_fast_turn turn;
    static uint8_t given_up[CHUNKS * 16];
    uffd_message messages[64];
    uint64_t faults = 0, count = 0, ended = 0;
    memset(given_up, 0, sizeof given_up);
    for (; ended < READERS; ended += count) {
        uint32_t left = snap_fast_path_turn(fast, 1000, messages, 64, 50, &turn);
        CHECK(!turn.error);
        CHECK(turn.count <= sizeof turn.ranges / sizeof *turn.ranges);
        for (uint32_t i = 0; i < turn.count; i++)
            CHECK(turn.ranges[i].start < turn.ranges[i].end);
        for (uint32_t i = 0; i < left; i++)
            handle(fast, &messages[i], given_up);
        faults += turn.faults;
        *lost |= turn.lost;
        count = 0;
        if (turn.others)
            CHECK(read(finished, &count, sizeof count) == sizeof count);
    }
    return faults;
}

/* With nobody who waits all comes from decoders. */
static void stream_all(snap_fast_path *fast, uint32_t *lost)
{
    static snap_fast_turn turn;
    uffd_message messages[64];
    uint32_t filled = 0;
    do {
        CHECK(!snap_fast_path_turn(fast, 10000, messages, 64, 50, &turn) && !turn.error && !turn.faults);
        filled += turn.filled;
        *lost |= turn.lost;
    } while (turn.streams);
    CHECK(filled == CHUNKS * 16);
}

static void round_of(void)
{
    sound = seed / 1000 % 2;
    uint64_t end = 0, features = UFFD_FEATURE_EVENT_REMOVE;
    pthread_t readers[READERS], decoders[DECODERS];
    snap_blocks *blocks = snap_blocks_new();
    area = mmap(NULL, CHUNKS * CHUNK + CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(blocks && area != MAP_FAILED);
    area += -(uintptr_t)area % CHUNK;
    CHECK(!madvise(area, CHUNKS * CHUNK, MADV_NOHUGEPAGE));
    image = calloc(CHUNKS, CHUNK);
    memory = malloc(DECODERS * EACH * SNAP_FAST_RUN * CHUNK);
    store = memfd_create("store", MFD_CLOEXEC);
    finished = eventfd(0, EFD_CLOEXEC);
    for (uint32_t i = 0; i < CHUNKS; i++)
        make_chunk(blocks, i, &end);
    CHECK((uffd = uffd_open(O_CLOEXEC | O_NONBLOCK)) >= 0 && !uffd_api(uffd, &features, NULL));
    CHECK(!uffd_register(uffd, addresses[0], CHUNKS * CHUNK, UFFDIO_REGISTER_MODE_MISSING, NULL));
    snap_stored *stored = snap_stored_new(store, &chunks, &none);
    snap_fast_path *fast = snap_fast_path_new(stored, uffd);
    CHECK(stored && fast && !snap_fast_path_watch(fast, &finished, 1));
    snap_fast_path_allow(fast, addresses[0], addresses[0] + CHUNKS * CHUNK);
    int requests[DECODERS], answers[DECODERS];
    for (size_t i = 0; i < DECODERS; i++) {
        CHECK(!pipe2(pipes[i][0], O_CLOEXEC) && !pipe2(pipes[i][1], O_CLOEXEC));
        CHECK(!fcntl(pipes[i][1][0], F_SETFL, O_NONBLOCK));
        requests[i] = pipes[i][0][1], answers[i] = pipes[i][1][0];
        pthread_create(&decoders[i], NULL, decode, (void *)i);
    }
    CHECK(!snap_fast_path_stream(fast, memory, DECODERS, EACH, requests, answers));
    CHECK(!snap_fast_path_first(fast, (uint64_t[]){addresses[50], addresses[51], addresses[7], 1}, 4));
    uint32_t lost = 0;
    if (sound)
        stream_all(fast, &lost);
    for (size_t i = 0; i < READERS; i++)
        pthread_create(&readers[i], NULL, work, (void *)i);
    CHECK((run(fast, &lost) > 0 || sound) && !(lost & 1));
    for (int i = 0; i < READERS; i++)
        pthread_join(readers[i], NULL);
    snap_fast_path_alone(fast);
    for (int i = 0; i < DECODERS; i++) {
        close(pipes[i][0][1]);
        pthread_join(decoders[i], NULL);
        close(pipes[i][0][0]), close(pipes[i][1][0]);
    }
    snap_fast_path_free(fast);
    snap_stored_free(stored);
    snap_blocks_free(blocks);
    close(uffd), close(store), close(finished);
    munmap(area, CHUNKS * CHUNK);
    free(image), free(memory);
}

int main(int argc, char **argv)
{
    int rounds = argc > 1 ? atoi(argv[1]) : 5;
    seed = argc > 2 ? (unsigned)atoi(argv[2]) : 1;
    signal(SIGPIPE, SIG_IGN); /* as Python has it */
    for (int round = 0; round < rounds; round++, seed += 1000)
        round_of();
    return 0;
}
