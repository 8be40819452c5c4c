/* The order in which copies of chunks reach the consumers: of one chunk one at a time and in the order
 * in which they were made, whatever the consumers do; a copy that a newer one replaces may be left out.
 *
 * queue_test ROUNDS SEED: ROUNDS times 20,000 random steps of a producer and its consumers. */
#define _GNU_SOURCE
#include "check.h"
#include "pump_internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>


#define CHUNKS 4
#define STEPS 20000
#define FLYING 8

/* What has been made of a chunk: patches count up, a whole copy starts a new series. `place` would be
 * where the bytes are: here it is the number of the copy, counted from 1, which NO slot stands for. */
typedef struct {
    int64_t newest, whole, stored;
    bool out;
} history;

static snap_pump *pump;

static void make(uint64_t address, int64_t number, bool patch)
{
    snap_saved saved = {.address = address, .place = -number, .pages = 3};
    saved.patch = patch ? SNAP_PATCH | 1 : 0;
    CHECK(enqueue(pump, &saved) == 0);
}

static snap_saved next(void)
{
    snap_saved out = {0};
    CHECK(snap_pump_next(pump, &out, 1, 0) == 1);
    return out;
}

static void nothing_comes(void)
{
    snap_saved out;
    CHECK(snap_pump_next(pump, &out, 1, 0) == 0);
}

static void done(snap_saved saved)
{
    snap_pump_done(pump, &saved, 1);
}

static void begin(void)
{
    CHECK(snap_pump_new(0, -1, -1, -1, NULL, 0, &pump) == 0);
    for (uint64_t i = 0; i < CHUNKS; i++)
        CHECK(ledger_make(pump, 0, i * CHUNK));
}

/* The copy that waits for its elder goes before its own patch. */
static void patch_stays_behind(void)
{
    begin();
    make(0, 1, false);
    snap_saved first = next();
    make(0, 2, false);
    nothing_comes(); /* the second waits for the first */
    make(0, 3, true);
    done(first);
    snap_saved second = next();
    CHECK(second.place == -2);
    nothing_comes();
    done(second);
    snap_saved third = next();
    CHECK(third.place == -3);
    done(third);
    nothing_comes();
    snap_pump_free(pump);
}

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static void receive(history *of, const snap_saved *saved)
{
    history *h = &of[saved->address / CHUNK];
    int64_t number = -saved->place;
    CHECK(!h->out);
    CHECK(number > h->stored);
    CHECK(!saved->patch || h->stored >= h->whole); /* what it patches is there */
    CHECK(!saved->patch || number == h->stored + 1);
    h->stored = number;
    h->out = true;
}

static void random_steps(uint64_t seed)
{
    history of[CHUNKS] = {0};
    snap_saved flying[FLYING];
    int out = 0;
    uint64_t state = seed * 0x9e3779b97f4a7c15u + 1;
    begin();
    for (int i = 0; i < STEPS; i++) {
        uint64_t r = next_random(&state);
        uint64_t c = r >> 8 & (CHUNKS - 1);
        history *h = &of[c];
        if (r % 4 < 2 && i < STEPS - 200) {
            bool patch = h->newest && r >> 16 & 1;
            make(c * CHUNK, ++h->newest, patch);
            h->whole = patch ? h->whole : h->newest;
        } else if (r % 4 == 2 && out < FLYING) {
            int most = 1 + (int)(r >> 16 & 0xff) % (FLYING - out);
            int got = snap_pump_next(pump, &flying[out], most, 0);
            CHECK(got >= 0);
            for (int k = 0; k < got; k++)
                receive(of, &flying[out + k]);
            out += got;
        } else if (r % 4 == 3 && out) {
            int k = (int)(r >> 16 & 0xff) % out;
            of[flying[k].address / CHUNK].out = false;
            done(flying[k]);
            flying[k] = flying[--out];
        }
    }
    snap_pump_end(pump);
    for (;;) {
        while (out) {
            of[flying[--out].address / CHUNK].out = false;
            done(flying[out]);
        }
        out = snap_pump_next(pump, flying, FLYING, 0);
        if (out == -EPIPE)
            break;
        CHECK(out > 0);
        for (int k = 0; k < out; k++)
            receive(of, &flying[k]);
    }
    for (int c = 0; c < CHUNKS; c++)
        CHECK(of[c].stored == of[c].newest);
    snap_pump_free(pump);
}

int main(int argc, char **argv)
{
    int rounds = argc > 1 ? atoi(argv[1]) : 1;
    uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 0) : 1;
    patch_stays_behind();
    for (int i = 0; i < rounds; i++)
        random_steps(seed + (uint64_t)i);
    printf("%d rounds of %d steps: every copy in its order\n", rounds, STEPS);
    return 0;
}
