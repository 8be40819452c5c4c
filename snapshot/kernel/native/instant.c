#define _GNU_SOURCE
#include "instant.h"

#include "arch_x86_64.h"
#include "ptrace_internal.h"

#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define ROUNDS 4          /* of listing threads */
#define AWAIT_MS 1000
#define FIRST_CODE 32     /* bytes of it before the thread, as arch_x86_64.py looks for the number of a call */
#define INSTRUCTION 2     /* bytes of `syscall` */
#define NONE_WAIT "\nSigPnd:\t0000000000000000\nShdPnd:\t0000000000000000\n"

static void tell(const snap_instant *t, int time)
{
    if (t->point)
        t->point(time);
}

static void came_to(snap_instant *t, int time)
{
    t->times_us[time] = snap_now_us();
    tell(t, time);
}

/* ---- threads -------------------------------------------------------------------------------------- */

/* Their number, -1: the process is gone. */
static int how_many(const snap_instant *t)
{
    struct stat st;
    return fstat(t->folder, &st) ? -1 : (int)st.st_nlink - 2;
}

static void note_late(snap_instant *t)
{
    for (int i = 0; i < t->count; i++)
        if (t->stops[i] == 0)
            t->stops[i] = -ETIMEDOUT;
}

static int is_known(const snap_instant *t, int tid)
{
    for (int i = 0; i < t->count; i++)
        if (t->tids[i] == tid)
            return 1;
    return 0;
}

/* Puts those that are not known behind them. -> how many they are, -1: there is no room. */
static int list(snap_instant *t)
{
    char entries[8192];
    int new = 0;
    if (lseek(t->folder, 0, SEEK_SET) < 0)
        return -1;
    for (;;) {
        const long got = syscall(SYS_getdents64, t->folder, entries, sizeof entries);
        if (got < 0)
            return -1;
        if (got == 0)
            return new;
        const struct dirent64 *one;
        for (long at = 0; at < got; at += one->d_reclen) {
            one = (const struct dirent64 *)(entries + at);
            const int tid = atoi(one->d_name);
            if (!tid || is_known(t, tid))
                continue;
            if (t->count + new == t->most)
                return -1;
            t->tids[t->count + new++] = tid;
        }
    }
}

/* The leader first, the others by their number. */
static void sort(snap_instant *t)
{
    for (int i = 1; i < t->count; i++) {
        const int tid = t->tids[i], stop = t->stops[i];
        int at = i;
        for (; at > 0 && (tid == t->pid || (t->tids[at - 1] != t->pid && t->tids[at - 1] > tid)); at--) {
            t->tids[at] = t->tids[at - 1];
            t->stops[at] = t->stops[at - 1];
        }
        t->tids[at] = tid;
        t->stops[at] = stop;
    }
}

/* A listing that is made while threads end can miss others, so their number tells whether it was all: those
 * that stand neither end nor make new ones. */
static int stop(snap_instant *t)
{
    for (int i = 0; i < ROUNDS; i++) {
        const int new = list(t);
        if (new < 0)
            return SNAP_NOT_THREADS;
        const int running = snap_stop_all(t->tids, t->stops, t->count, new, t->reaper,
                                          SNAP_PTRACE_O_TRACESYSGOOD, t->timeout_us, t->again,
                                          &t->times_us[SNAP_WHEN_TOLD]);
        t->count += new;
        if (running) {
            note_late(t);
            return SNAP_NOT_LATE;
        }
        for (int k = t->count - new; k < t->count; k++)
            if (t->stops[k] < 0)
                return SNAP_NOT_THREADS;
        if (how_many(t) == t->count)
            return 0;
    }
    return SNAP_NOT_THREADS;
}

/* The call that such a thread is in is told by its code. */
static void read_code(snap_code *code, int tid, const unsigned char *registers)
{
    const uint64_t at = snap_arch_rip(registers);
    code->start = at - FIRST_CODE;
    code->length = SNAP_CODE;
    if (snap_read_memory(tid, code->start, code->bytes, SNAP_CODE) == 0)
        return;
    code->start = at - INSTRUCTION; /* a mapping begins there */
    code->length = 2 * INSTRUCTION;
    if (snap_read_memory(tid, code->start, code->bytes, code->length) < 0)
        code->length = 0;
}

static int look_at_registers(snap_instant *t)
{
    if (snap_get_registers_all(t->tids, t->stops, t->count, t->registers, SNAP_REGISTERS_SIZE))
        return SNAP_NOT_THREADS;
    const int some = snap_mark_registers(t->registers, t->count, t->guard, t->guard_end, t->again, t->marks);
    if (some & SNAP_MARK_GUARDED)
        return SNAP_NOT_PLACES;
    for (int i = 0; i < t->count; i++) {
        t->code[i].length = 0;
        if (t->marks[i] & SNAP_MARK_RESTARTS)
            read_code(&t->code[i], t->tids[i], t->registers + (size_t)i * SNAP_REGISTERS_SIZE);
    }
    return 0;
}

/* ---- what is read --------------------------------------------------------------------------------- */

static int read_answers(const snap_instant *t)
{
    const int64_t found = snap_task_read(t->tasks_fd, t->tasks, t->tasks_size);
    if (found < 0 || snap_task_sort(t->tasks, (int)((uint64_t)found / sizeof *t->tasks), t->tids, t->count) < 0)
        return SNAP_NOT_ANSWERS;
    snap_task_compare(t->tasks, t->count, t->unlike);
    for (int i = 0; i < t->count; i++)
        if (t->unlike[i])
            return SNAP_NOT_ANSWERS;
    return snap_answer(t->tasks, t->count, t->bits, t->data, t->questions) ? SNAP_NOT_ANSWERS : 0;
}

static int holds(const snap_instant *t)
{
    snap_process now;
    return snap_task_read(t->record_fd, &now, sizeof now) == sizeof now &&
           memcmp(&now, t->record, sizeof now) == 0;
}

/* The i-th file. */
static const char *text(const snap_reading *r, int i, size_t *length)
{
    const int64_t start = i ? r->ends[i - 1] : 0;
    *length = (size_t)(r->ends[i] - start);
    return r->room + start;
}

static int none_waits(const snap_reading *r, int status)
{
    size_t length;
    const char *at = text(r, status, &length);
    return memmem(at, length, NONE_WAIT, strlen(NONE_WAIT)) != NULL;
}

static int is_as_it_was(const snap_reading *r, const snap_known_file *known)
{
    size_t length;
    if (known->at < 0)
        return 1;
    const char *now = text(r, known->at, &length);
    return length == known->length && memcmp(now, known->text, length) == 0;
}

static int read_files(const snap_instant *t)
{
    snap_reading *r = t->reading;
    snap_read_outline(r);
    for (int i = 0; i < 3; i++)
        if (r->link_lengths[i] < 0)
            return SNAP_NOT_FILES;
    for (int i = 0; i < r->count; i++)
        if (r->error || r->ends[i] < 0)
            return SNAP_NOT_FILES;
    if (!none_waits(r, t->status_at) || !is_as_it_was(r, &t->merges))
        return SNAP_NOT_FILES;
    return is_as_it_was(r, &t->maps) ? 0 : SNAP_NOT_MAPS;
}

/* ---- memory --------------------------------------------------------------------------------------- */

static int await_hold(snap_pump *pump)
{
    int r;
    while ((r = snap_pump_await(pump, AWAIT_MS, NULL)) == -ETIMEDOUT)
        continue;
    return r;
}

static int is_stale(snap_pump *pump)
{
    snap_pump_counters counters;
    snap_pump_stats(pump, &counters);
    return counters.stale != 0;
}

/* A signal may have come since `status` was read: the queue is looked at after that. */
static int queue_is_empty(const snap_instant *t)
{
    unsigned char info[128];
    return snap_peek_signals(t->pid, 1, 0, info, 1) == 0;
}

/* ---- all of it ------------------------------------------------------------------------------------ */

static int take(snap_instant *t)
{
    int r = stop(t);
    if (r)
        return r;
    sort(t);
    t->leader_stop = t->stops[0];
    if ((r = look_at_registers(t)))
        return r;
    came_to(t, SNAP_WHEN_STOPPED);
    if (snap_pump_order_look(t->pump, t->most_bytes) < 0)
        return SNAP_NOT_PUMP;
    t->ordered = 1;
    if ((r = read_answers(t)))
        return r;
    if (!holds(t))
        return SNAP_NOT_STATEMENT;
    if (snap_pump_order_hold(t->pump) < 0)
        return SNAP_NOT_PUMP;
    if (snap_get_states(t->tids, t->count, t->registers, t->states, t->areas, t->area))
        return SNAP_NOT_THREADS;
    snap_pump_assist(t->pump);
    if ((r = read_files(t)))
        return r;
    came_to(t, SNAP_WHEN_CAPTURED);
    snap_pump_await_errand(t->pump);
    if (!t->reading->listed || t->reading->table_used < 0 || !t->reading->told)
        return SNAP_NOT_TABLE;
    came_to(t, SNAP_WHEN_LISTED);
    if (await_hold(t->pump) < 0)
        return SNAP_NOT_PUMP;
    if (is_stale(t->pump))
        return SNAP_NOT_MAPS;
    came_to(t, SNAP_WHEN_HELD);
    if (!queue_is_empty(t))
        return SNAP_NOT_FILES;
    if (snap_pump_touched(t->pump, NULL, 0) < 0 ||
        snap_pump_order_settle(t->pump, t->most_bytes, SNAP_TRUST_COPIES | SNAP_TRUST_COVER) < 0)
        return SNAP_NOT_PUMP;
    t->settled = snap_pump_await_settled(t->pump);
    if (t->settled < 0)
        return 0;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    t->taken_ns = (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
    came_to(t, SNAP_WHEN_SETTLED);
    if (t->settled && t->stays) {
        /* Not the leader, if there is another (Frozen.stay says why). */
        t->seized = t->count > 1;
        (void)snap_set_options(t->tids[t->seized], SNAP_PTRACE_O_TRACESYSGOOD | SNAP_PTRACE_O_TRACEEXIT);
    }
    snap_pump_go(t->pump);
    tell(t, SNAP_WHEN_GONE);
    return 0;
}

static void let_go(snap_instant *t)
{
    if (t->seized >= 0) { /* first: another could end it, and this stop at its end */
        snap_run_on(t->tids[t->seized], t->stops[t->seized]);
        snap_detach_all(t->tids, t->stops, t->seized);
    }
    const int from = t->seized + 1;
    snap_detach_all(t->tids + from, t->stops + from, t->count - from);
}

int snap_instant_take(snap_instant *t)
{
    t->count = t->ordered = t->settled = 0;
    t->seized = -1;
    memset(t->times_us, 0, sizeof t->times_us);
    const int r = take(t);
    let_go(t);
    t->times_us[SNAP_WHEN_GONE] = snap_now_us();
    return r;
}
