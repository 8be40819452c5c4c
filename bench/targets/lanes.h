/* A lane is what one thread of `pages` does all the time, with what it felt: how often it got round,
 * and every time that took longer than a limit, with who else had the CPU meanwhile. */
#ifndef LANES_H
#define LANES_H

#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>

#define GAPS 16384 /* on an unquiet host there are 400 a second, and a restore of 8 GiB takes 20 */

/* Both switches zero: neither the thread nor the kernel of this machine knows of a reason. */
struct gap {
    uint64_t begin, end;    /* ns, CLOCK_MONOTONIC */
    uint64_t waited;        /* voluntary switches: it was stopped, or waited in a fault */
    uint64_t preempted;     /* involuntary ones: somebody else had its CPU */
};

struct lane {
    const char *name;
    _Atomic uint64_t operations;
    _Atomic uint64_t count;     /* of gaps ever; the newest GAPS are kept */
    uint64_t marked;            /* count at the last mark */
    struct gap gaps[GAPS];
};

/* Only its own thread calls this: a round that began at `begin` and is over now. Takes note of it
 * when it was too long. -> the time from which the next round counts. */
uint64_t lane_round(struct lane *lane, uint64_t begin);
void lane_mark(struct lane *lane);
void lane_print(struct lane *lane, FILE *to);   /* as JSON, the gaps since the mark */

#endif
