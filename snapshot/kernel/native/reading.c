#define _GNU_SOURCE
#include "reading.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

void snap_read_outline(snap_reading *r)
{
    static const char *const names[] = {"exe", "cwd", "root"};
    char path[64];
    r->error = snap_read_files(r->files, r->count, r->room, r->size, r->ends);
    for (int i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "/proc/%d/%s", r->pid, names[i]);
        ssize_t length = readlink(path, r->links + i * SNAP_LINK_MAX, SNAP_LINK_MAX);
        r->link_lengths[i] = length < 0 ? -errno : (int)length;
    }
}

static int is_told(const char *table, uint64_t used)
{
    const snap_descriptor *one;
    for (uint64_t at = 0; at < used; at += one->length) {
        one = (const snap_descriptor *)(table + at);
        if (one->asks || one->flags & O_DIRECT)
            return 0;
    }
    return 1;
}

void snap_read_table(void *reading)
{
    snap_reading *r = reading;
    int64_t used = r->known ? snap_descriptors_read_known(r->known, r->table, r->table_size) : -ESTALE;
    if (used < 0)
        used = snap_descriptors_read(r->pid, 0, r->table, r->table_size);
    if (used > 0) {
        int grouped = snap_descriptors_group(r->pid, r->table, (uint64_t)used);
        r->told = is_told(r->table, (uint64_t)used);
        used = grouped < 0 ? grouped : used;
    }
    r->table_used = used;
    r->listed = 1;
}

int snap_know_table(snap_reading *r)
{
    snap_forget_table(r);
    return r->table_used < 0 ? (int)r->table_used
                             : snap_descriptors_know(r->pid, r->table, (uint64_t)r->table_used, &r->known);
}

void snap_forget_table(snap_reading *r)
{
    snap_descriptors_forget(r->known);
    r->known = NULL;
}
