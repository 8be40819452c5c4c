/* What every victim shares: a status file that tests read, readiness, faults found by the program
 * itself, a limit on its life.
 *
 * The status file is a regular file, written whole with pwrite(2): such a descriptor survives a
 * restore, a pipe to the test would not. tests/harness/victims.py reads the same layout. */
#ifndef VICTIM_H
#define VICTIM_H

#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stddef.h>
#include <stdbool.h>
#include <stdatomic.h>

#define PAGE 4096UL
#define MIB (1024UL * 1024UL)
#define LANES 64
#define VALUES 32

struct status {
    uint64_t magic;
    uint64_t sequence;          /* of this write; equal at both ends of a whole one */
    int64_t pid;
    uint64_t errors;            /* faults that the program found in itself */
    uint64_t verified;          /* complete checks of everything, so far */
    uint64_t lanes;             /* how many of `progress` are used */
    uint64_t progress[LANES];   /* each grows as long as its thread lives well */
    uint64_t values[VALUES];    /* the program's own: addresses, sizes */
    char first_error[512];
    uint64_t sequence_again;
};

extern _Atomic uint64_t progress[LANES];
extern uint64_t values[VALUES];

/* Options of every victim: --status PATH, --ready FD, --life SECONDS; others are looked up by name:
 * `--name NUMBER` or `--name WORD`. */
void victim_start(int argc, char **argv);
sigset_t block_usr1(void);          /* for this thread and those it makes: it is waited for */
void victim_lanes(unsigned lanes);  /* how many of `progress` are used */
long option(const char *name, long otherwise);
const char *option_text(const char *name, const char *otherwise);

/* Tells the test that the program is set up: one byte down the pipe --ready, which is then closed. */
void victim_ready(void);

/* Writes the status file; ends the program when its life is over. Any thread may call it. */
void publish(void);

/* Counts a fault and keeps the text of the first one. */
void fault(const char *format, ...) __attribute__((format(printf, 1, 2)));
uint64_t faults(void);
void verified(void);            /* one more complete check is done */

/* Ends the program when `ok` is false: for calls that cannot fail in a healthy process. */
void must(bool ok, const char *what);

uint64_t now_ns(void);          /* CLOCK_MONOTONIC */
void sleep_ms(unsigned ms);     /* at least that long; an EINTR is a fault */

/* Has malloc take all of the heap that small requests will need: then brk is the program's own. */
void settle_malloc(void);

/* A 64-bit mixing function: every bit of the result depends on every bit of `x`. */
static inline uint64_t mix(uint64_t x)
{
    x ^= x >> 30; x *= 0xbf58476d1ce4e5b9ULL;
    x ^= x >> 27; x *= 0x94d049bb133111ebULL;
    return x ^ (x >> 31);
}

/* Fill and check memory with words that depend on `key` and their index; check returns the index
 * of the first wrong word, or `words`. */
void fill(uint64_t *memory, size_t words, uint64_t key);
size_t wrong(const uint64_t *memory, size_t words, uint64_t key);
size_t nonzero(const uint64_t *memory, size_t words);

#endif
