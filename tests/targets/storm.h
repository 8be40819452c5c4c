/* What storm.c and its operations share. */
#ifndef STORM_H
#define STORM_H

#include "victim.h"

#define HELD 4 /* mappings that live for some rounds */

/* What one thread works on; nobody else writes to it. */
struct lane {
    size_t self;
    char *area;              /* private */
    char *once, *twice;      /* one memfd, mapped twice; NULL with --private, as are the next two */
    char *shared, *alias;    /* anonymous shared memory, mapped twice */
    int memfd, file, pair[2];
    char direct[64];         /* a file that can be read with O_DIRECT */
    char *pool;              /* two huge pages of hugetlbfs, if the machine has any */
    char *held[HELD];
    uint64_t held_key[HELD];
};

enum part {
    MIXED,  /* part of any mix */
    SHARES, /* not of one whose memory is private, in small pages */
    ALONE,  /* of none */
};

struct operation {
    const char *name;
    void (*run)(struct lane *, uint64_t key);
    enum part part;
};

extern const struct operation more_operations[];
extern const size_t more_count;
extern size_t bytes; /* of each area, a multiple of 2 MiB or at least of 64 pages */

void lane_open(struct lane *l, size_t self);
char *map(size_t size);
void expect(const char *at, size_t size, uint64_t key, const char *when);
void expect_zero(const char *at, size_t size, const char *when);
/* Pages [from, from + *count) of `bytes`, chosen by key. -> from */
size_t some_pages(uint64_t key, size_t *count);
/* Main's: its stack grows by up to 4 MiB. */
void grow_stack(uint64_t key);
/* Main's: children whose parents ended first have become its own. */
void reap_orphans(void);

#endif
