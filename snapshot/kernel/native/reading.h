/* What /proc says of a process that stands still, into memory that was touched before. Two threads can read a
 * part each: nothing here needs to be the tracer. Mechanism without policy. */
#ifndef SNAP_READING_H
#define SNAP_READING_H
#include "descriptors.h"

#include <stdint.h>

typedef struct {
    /* Where to; the memory stays the caller's. */
    int pid;
    int count;
    const int *files;    /* of /proc, open */
    char *room;          /* for them, one after the other, */
    uint64_t size;
    int64_t *ends;       /* see snap_read_files */
    char *links;         /* SNAP_LINK_MAX bytes for each of exe, cwd, root */
    char *table;         /* 8-byte aligned */
    uint64_t table_size;
    snap_known_descriptors *known; /* since snap_know_table, or NULL */

    /* snap_read_outline: */
    int error;           /* 0 or -errno, of the files */
    int link_lengths[3]; /* or -errno */
    /* snap_read_table: */
    int listed;          /* it is done */
    int told;            /* of no descriptor there is more to be asked, and none is O_DIRECT */
    int64_t table_used;  /* bytes, or -errno */
} snap_reading;

/* The files and links. */
void snap_read_outline(snap_reading *reading);
/* The descriptors, as snap_descriptors_read and snap_descriptors_group have them. Of a snap_reading. fdinfo of
 * an epoll waits for a thread in epoll_wait(2) that waits for its page. */
void snap_read_table(void *reading);
/* After it: it takes half the time from now on, if they are still the same. 0 or -errno. */
int snap_know_table(snap_reading *reading);
void snap_forget_table(snap_reading *reading);

#endif
