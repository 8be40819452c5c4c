/* Events that wait to be read: what their callers are about to do, or have done, is seen by looking
 * at their system calls, and what would be lost by it is saved before they are let go on. */
#define _GNU_SOURCE
#include "pump_internal.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MOST_LOOKS 20 /* for the thread that has posted an event */

/* Saves what is unsaved of the run-time range [start, end). */
static int save_range(snap_pump *p, uint64_t start, uint64_t end)
{
    int later = 0;
    for (size_t k = ledger_above(p, start); k < p->windows.count; k++) {
        const snap_window *w = &p->windows.at[p->by_start[k]].is;
        if (w->start >= end)
            break;
        uint64_t low = w->start > start ? w->start : start, high = w->end < end ? w->end : end;
        int r = save_space(p, w->space, low - w->start + w->at, high - w->start + w->at);
        if (r && r != -EAGAIN)
            return r;
        later = r ? r : later;
    }
    return later;
}

bool makes_alias(const snap_pump *p, uint64_t from, uint64_t length)
{
    for (size_t i = 0; i < p->plain_moves.count; i++)
        if (p->plain_moves.at[i].start == from && p->plain_moves.at[i].end == from + length)
            return false;
    return length == 0 || ledger_shared(p, from, from + length);
}

/* Whether any of the bytes [from, to) of a shared object is armed. */
static bool any_armed(const snap_pump *p, uint32_t space, uint64_t from, uint64_t to)
{
    for (size_t k = ledger_first(p, space, from); k < p->windows.count; k++) {
        const snap_window *w = &p->windows.at[k].is;
        if (w->space != space || w->at >= to)
            break;
        if (w->armed && w->at + (w->end - w->start) > from)
            return true;
    }
    return false;
}

bool had_grown(const snap_pump *p, uint64_t from, uint64_t to)
{
    for (size_t k = ledger_above(p, from - 1); k < p->windows.count; k++) {
        const snap_window *w = &p->windows.at[p->by_start[k]].is;
        uint64_t until = to, behind = w->at + (w->end - w->start);
        if (w->start >= to)
            break;
        if (k + 1 < p->windows.count && p->windows.at[p->by_start[k + 1]].is.start < to)
            until = p->windows.at[p->by_start[k + 1]].is.start;
        if (w->object >= 0 && w->end < until &&
            any_armed(p, w->space, behind, behind + (until - w->end)))
            return true;
    }
    return false;
}

int snap_pump_shows(snap_pump *p, uint64_t start, uint64_t end)
{
    for (size_t i = 0; i < p->aliases.count; i++) {
        range alias = p->aliases.at[i];
        if (alias.start == start || (alias.start < start && end <= alias.end))
            return 1;
    }
    for (const window *w; start < end; start = w->is.end) {
        w = ledger_find(p, start);
        if (!w || w->is.object < 0)
            return 0;
    }
    return 1;
}

/* Saves what is unsaved of all shared objects. -EAGAIN: not all could be. */
int save_objects(snap_pump *p)
{
    int later = 0;
    for (size_t k = ledger_objects(p); k < p->blocks.count; k++) {
        const block *b = p->blocks.at[k];
        int r = save_space(p, b->space, b->start, b->start + BLOCK);
        if (r && r != -EAGAIN)
            return r;
        later = r ? r : later;
        beat(p);
    }
    return later;
}

static int before_remap(snap_pump *p, uint64_t from, uint64_t length, uint64_t flags)
{
    if (length == 0)
        return save_objects(p);
    length = (length + PAGE - 1) & ~(PAGE - 1);
    range *r = flags & MREMAP_DONTUNMAP ? NULL : VECTOR_PUSH(&p->plain_moves);
    if (r)
        *r = (range){from, from + length};
    return 0;
}

/* One look at what every thread is doing. *waiting: threads that sleep in a call which posts
 * events; *running: threads that cannot be asked because they do not sleep. */
static int save_ahead_of(snap_pump *p, int tasks, DIR *names, int *waiting, int *running)
{
    char line[256], file[300];
    *waiting = *running = 0;
    for (struct dirent *entry; (entry = readdir(names));) {
        if (entry->d_name[0] == '.')
            continue;
        snprintf(file, sizeof file, "%s/syscall", entry->d_name);
        int fd = openat(tasks, file, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            continue;
        ssize_t n = read(fd, line, sizeof line - 1);
        close(fd);
        if (n <= 0)
            continue;
        line[n] = 0;
        long nr;
        unsigned long long start, length, wanted, flags;
        if (sscanf(line, "%ld 0x%llx 0x%llx 0x%llx 0x%llx", &nr, &start, &length, &wanted, &flags) != 5) {
            ++*running;
            continue;
        }
        if (nr == SYS_munmap || nr == SYS_mremap || nr == SYS_brk || nr == SYS_mmap || nr == SYS_shmdt ||
            nr == SYS_fork || (nr == SYS_clone && !(start & CLONE_VM)))
            ++*waiting;
        int r = 0;
        if (nr == SYS_mremap)
            r = before_remap(p, start, length < wanted ? length : wanted, flags);
        if (nr == SYS_madvise) {
            ++*waiting;
            r = save_range(p, start, (start + length + PAGE - 1) & ~(PAGE - 1));
        }
        if (r && r != -EAGAIN) /* not whole any more: reading the event will tell what was lost */
            return r;
    }
    return 0;
}

/* The caller may have posted its event and not be asleep yet, so look again when nobody was found,
 * and once more while others run. */
int save_before_event(snap_pump *p)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/task", p->pid);
    DIR *names = opendir(path);
    if (!names)
        return errno == ENOENT ? 0 : -errno;
    int r = 0;
    for (int look = 0; look < MOST_LOOKS && !r; look++) {
        int waiting, running;
        rewinddir(names);
        p->plain_moves.count = 0;
        r = save_ahead_of(p, dirfd(names), names, &waiting, &running);
        if (waiting && (look || !running))
            break;
        breathe();
    }
    closedir(names);
    return r;
}
