/* Pages that are never protected: the kernel writes to them when a thread ends, and wakes who waits there.
 * That is the word of clear_child_tid (set_tid_address(2)), for which pthread_join waits, and those of the
 * robust mutexes that the thread holds. It has begun to end by then, and of a protected page no userfaultfd
 * is told then: the write fails, and nobody is woken, ever
 * (docs/decisions/0027-the-last-word-of-a-thread.md).
 *
 * Where the first is only the thread could say. But get_robust_list(2) tells of any, without a stop, where
 * its struct pthread is: glibc has the head of that list beside the word. musl has one word for all threads
 * (snap_pump_clears).
 *
 * So the threads are listed right before something is protected, if any task has been born since they were
 * (/proc/loadavg tells the last pid that was given). One that is born after that writes to its struct pthread
 * itself before it ends, which lets that page through; and nothing is protected after T0. Which mutexes they
 * hold is not asked before every call: it takes as long as many of them. */
#define _GNU_SOURCE
#include "pump_internal.h"
#include "uffd.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define MOST_ROBUST 2048 /* the kernel looks at no more of a thread (ROBUST_LIST_LIMIT) */
#define AT_ONCE 64       /* heads of lists that are read in one call */
#define LEAST_NS UINT64_C(200000) /* between two looks at the mutexes that are held, */
#define LOOKS_SHARE 20            /* which may take one part in so many of the time */

typedef struct {
    uint64_t next;
    int64_t offset; /* of the word of a mutex, from its entry in the list */
    uint64_t pending;
} robust_list;

/* Where the list of robust futexes of a thread begins, 0: it has none, or may not be asked. */
static uint64_t robust_head(int tid)
{
    void *head = NULL;
    size_t length;
    return syscall(SYS_get_robust_list, tid, &head, &length) ? 0 : (uint64_t)(uintptr_t)head;
}

int snap_pump_has_robust_list(int tid)
{
    return robust_head(tid) != 0;
}

void snap_pump_clears(snap_pump *p, uint64_t address)
{
    p->clears = address;
}

static int add(snap_pump *p, uint64_t address)
{
    if (!address)
        return 0;
    uint64_t *slot = VECTOR_PUSH(&p->spared);
    if (!slot)
        return -ENOMEM;
    *slot = address & ~(PAGE - 1);
    return 0;
}

/* Reads what is at the addresses, all of one size, into `out`. -> how many, until one cannot be read. */
static size_t get(const snap_pump *p, const uint64_t *at, size_t count, void *out, size_t size)
{
    struct iovec here = {out, count * size}, there[AT_ONCE];
    for (size_t i = 0; i < count; i++)
        there[i] = (struct iovec){(void *)(uintptr_t)at[i], size};
    ssize_t got = process_vm_readv(p->pid, &here, 1, there, count, 0);
    return got > 0 ? (size_t)got / size : 0;
}

/* The words of the mutexes of the list at `head`. Its thread may be changing it: what is not on it any more
 * does no harm. */
static int add_list(snap_pump *p, uint64_t head, const robust_list *list)
{
    int r = list->pending ? add(p, (list->pending & ~UINT64_C(1)) + (uint64_t)list->offset) : 0;
    uint64_t at = list->next & ~UINT64_C(1); /* 1: it inherits priorities */
    for (int i = 0; !r && at && at != head && i < MOST_ROBUST; i++) {
        r = add(p, at + (uint64_t)list->offset);
        if (!get(p, &at, 1, &at, sizeof at))
            break;
        at &= ~UINT64_C(1);
    }
    return r;
}

static int add_held(snap_pump *p)
{
    robust_list lists[AT_ONCE];
    int r = 0;
    for (size_t i = 0, n; !r && i < p->heads.count; i += n + !n) { /* past one that cannot be read */
        n = p->heads.count - i < AT_ONCE ? p->heads.count - i : AT_ONCE;
        n = get(p, p->heads.at + i, n, lists, sizeof *lists);
        for (size_t k = 0; !r && k < n; k++)
            r = add_list(p, p->heads.at[i + k], &lists[k]);
    }
    return r;
}

static int by_address(const void *left, const void *right)
{
    uint64_t l = *(const uint64_t *)left, r = *(const uint64_t *)right;
    return l < r ? -1 : l > r;
}

/* The last pid that any task was given, 0: not known. */
static long last_pid(snap_pump *p)
{
    char text[128];
    if (p->loadavg < 0)
        p->loadavg = open("/proc/loadavg", O_RDONLY | O_CLOEXEC);
    ssize_t length = p->loadavg < 0 ? 0 : pread(p->loadavg, text, sizeof text - 1, 0);
    text[length > 0 ? length : 0] = 0;
    const char *last = strrchr(text, ' ');
    return last ? atol(last) : 0;
}

/* *all: whether it will do until another thread is born. Not so where threads end meanwhile, for the kernel
 * may pass over others then, nor where one has no list yet that others have: it has just been born. */
static int list_threads(snap_pump *p, bool *all)
{
    char path[32];
    struct stat folder;
    size_t listed = 0;
    int r = 0;
    p->heads.count = 0;
    *all = false;
    snprintf(path, sizeof path, "/proc/%d/task", p->pid);
    DIR *tasks = opendir(path);
    if (!tasks)
        return 0; /* it has ended, as the next call will find */
    for (const struct dirent *one; !r && (one = readdir(tasks));) {
        if (one->d_name[0] == '.')
            continue;
        listed++;
        uint64_t head = robust_head(atoi(one->d_name));
        uint64_t *slot = head ? VECTOR_PUSH(&p->heads) : NULL;
        if (slot)
            *slot = head;
        else if (head)
            r = -ENOMEM;
    }
    if (!fstat(dirfd(tasks), &folder) && folder.st_nlink == listed + 2)
        *all = p->heads.count == listed || !p->heads.count;
    closedir(tasks);
    return r;
}

int spare_find(snap_pump *p, bool all)
{
    long last = last_pid(p);
    uint64_t began = now_ns();
    bool listed = last && last == p->listed_pid;
    if (listed && !all && began < p->look_again_ns)
        return 0;
    int r = listed ? 0 : list_threads(p, &listed);
    p->listed_pid = listed ? last : 0;
    p->spared.count = 0;
    if (!r)
        r = add(p, p->clears);
    for (size_t i = 0; !r && i < p->heads.count; i++)
        r = add(p, p->heads.at[i]);
    if (!r)
        r = add_held(p);
    if (p->spared.count)
        qsort(p->spared.at, p->spared.count, sizeof *p->spared.at, by_address);
    uint64_t now = now_ns(), pause = (now - began) * LOOKS_SHARE;
    p->look_again_ns = now + (pause > LEAST_NS ? pause : LEAST_NS);
    return r;
}

/* The first of them that ends above an address, as an index. */
static size_t first_spared(const snap_pump *p, uint64_t address)
{
    size_t low = 0, high = p->spared.count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (p->spared.at[middle] + PAGE <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* The next of w in [*at, end), run-time addresses, as [*low, *high); *at becomes where to go on. */
static bool next_spared(const snap_pump *p, const snap_window *w, uint64_t *at, uint64_t end, uint64_t *low,
                        uint64_t *high)
{
    uint64_t from = *at, to = end;
    whole_pages(w, &from, &to);
    size_t i = first_spared(p, from);
    if (i == p->spared.count || p->spared.at[i] >= to)
        return false;
    *low = p->spared.at[i];
    *high = *low + PAGE;
    whole_pages(w, low, high);
    *at = *high;
    return true;
}

uint16_t spare_pages(const snap_pump *p, const snap_window *w, uint64_t address)
{
    uint64_t start = address - w->at + w->start, at = start, low, high;
    uint16_t pages = 0;
    while (at < start + CHUNK && next_spared(p, w, &at, start + CHUNK, &low, &high))
        for (unsigned i = 0; i < CHUNK_PAGES; i++)
            if (start + i * PAGE >= low && start + i * PAGE < high)
                pages |= (uint16_t)(1u << i);
    return pages;
}

int spare_protect(const snap_pump *p, const snap_window *w, uint64_t start, uint64_t end)
{
    uint64_t low, high;
    whole_pages(w, &start, &end);
    for (uint64_t at = start; start < end; start = at) {
        bool any = at < end && next_spared(p, w, &at, end, &low, &high);
        low = any && low < end ? low : end;
        int r = low > start ? uffd_writeprotect(p->uffd, start, low - start, UFFDIO_WRITEPROTECT_MODE_WP) : 0;
        if (r || !any)
            return r;
    }
    return 0;
}

int spare_save(snap_pump *p)
{
    int r = 0;
    for (size_t i = 0; !r && i < p->spared.count; i++) {
        const window *found = ledger_find(p, p->spared.at[i]);
        if (!found || !found->is.armed)
            continue;
        const snap_window *w = &found->is;
        uint64_t low = p->spared.at[i], high = low + PAGE;
        whole_pages(w, &low, &high);
        low = (low - w->start + w->at) & ~(CHUNK - 1);
        high = high - w->start + w->at;
        for (uint64_t at = low; !r && at < high; at += CHUNK) {
            chunk *c = ledger_chunk(p, w->space, at);
            r = c ? save_now(p, w->space, at, c) : 0;
        }
    }
    return r;
}
