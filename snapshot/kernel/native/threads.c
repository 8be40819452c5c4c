#define _GNU_SOURCE
#include "threads.h"

#include "arch_x86_64.h"
#include "deadline_internal.h"
#include "ptrace_internal.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>

#define REAP_AFTER_US 5000
/* While so many still run we rest between two looks, the longer the more there are: they need this
 * processor to get to their stop. For the last ones we spin, which takes less than to wake up. */
#define MANY 6
#define REST_NS 50000
#define REST_EACH_NS 1000
#define AT_ONCE 64

/* Any thread of the tracer's process may wait for its tracees. */
struct snap_reaper {
    pthread_t thread;
    int leader;
    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t changed;
    int finished;
    const int *tids; /* NULL: nobody is being stopped */
    int count;
    int64_t since_us;
};

static void look_around(const snap_reaper *r)
{
    for (int i = 0; i < r->count; i++)
        if (r->tids[i] != r->leader)
            snap_reap_ended(r->tids[i]);
}

static void *reap_until_finished(void *argument)
{
    snap_reaper *r = argument;
    pthread_mutex_lock(&r->lock);
    while (!r->finished) {
        struct timespec until;
        deadline(&until, REAP_AFTER_US / 1000);
        pthread_cond_timedwait(&r->changed, &r->lock, &until);
        if (!r->finished && r->tids && snap_now_us() - r->since_us >= REAP_AFTER_US)
            look_around(r);
    }
    pthread_mutex_unlock(&r->lock);
    return NULL;
}

snap_reaper *snap_reaper_start(int leader)
{
    snap_reaper *r = calloc(1, sizeof *r);
    if (!r)
        return NULL;
    r->leader = leader;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    if (pthread_create(&r->thread, NULL, reap_until_finished, r) == 0)
        return r;
    free(r);
    return NULL;
}

void snap_reaper_stop(snap_reaper *r)
{
    if (!r)
        return;
    pthread_mutex_lock(&r->lock);
    r->finished = 1;
    pthread_cond_signal(&r->changed);
    pthread_mutex_unlock(&r->lock);
    pthread_join(r->thread, NULL);
    free(r);
}

/* NULL, 0: no more. It is not woken for that: it looks every REAP_AFTER_US. */
static void watch(snap_reaper *r, const int *tids, int count)
{
    if (!r)
        return;
    pthread_mutex_lock(&r->lock);
    r->tids = tids;
    r->count = count;
    r->since_us = snap_now_us();
    pthread_mutex_unlock(&r->lock);
}

static int is_among(int64_t number, const uint64_t *calls)
{
    return number >= 0 && number < SNAP_AGAIN_CALLS && (calls[number / 64] >> (number % 64) & 1);
}

void snap_make_again(int tid, const uint64_t *again)
{
    unsigned char registers[SNAP_REGISTERS_SIZE];
    unsigned char code[2];
    if (!again || snap_get_registers(tid, registers, sizeof registers) < 0)
        return;
    if (!is_among(snap_arch_interrupted(registers), again))
        return;
    /* int 0x80 has other numbers. */
    if (snap_read_memory(tid, snap_arch_rip(registers) - 2, code, sizeof code) < 0 ||
        code[0] != 0x0f || code[1] != 0x05)
        return;
    snap_arch_make_again(registers);
    snap_set_registers(tid, registers, sizeof registers);
}

/* Whether it runs on: as soon as a thread stands it is put right, in case that we die. */
static int look(int tid, int *stop, int asking, const uint64_t *again)
{
    int seen = 0;
    int found = snap_look_for_event_stop(tid, asking, &seen);
    if (found == 0)
        return 1;
    *stop = found < 0 ? found : seen;
    if (found > 0)
        snap_make_again(tid, again);
    return 0;
}

static long rest_each(int running)
{
    return (running < 1000 ? running : 1000) * (long)REST_EACH_NS;
}

/* Not one after the other: all are looked at until none runs. */
static int wait_all(const int *tids, int *stops, int count, int64_t timeout_us,
                    const uint64_t *again)
{
    int64_t now = snap_now_us(), deadline = now + timeout_us;
    int64_t ask_at = now + SNAP_ASK_AFTER_US, spin_until = now + SNAP_SPIN_US;
    int before = count, running, slept = 0;
    snap_doze doze;
    snap_doze_begin(&doze);
    for (;;) {
        int asking = now >= ask_at;
        running = 0;
        for (int i = 0; i < count; i++)
            if (stops[i] == 0)
                running += look(tids[i], &stops[i], asking, again);
        now = snap_now_us();
        if (running == 0 || now >= deadline)
            break;
        if (asking)
            ask_at = now + SNAP_ASK_AFTER_US;
        if (running > MANY)
            nanosleep(&(struct timespec){.tv_nsec = REST_NS + rest_each(running)}, NULL);
        /* Who had to wait until we slept has others behind it, on this processor. */
        if (running < before && !slept)
            spin_until = now + SNAP_SPIN_US;
        else if (now >= spin_until) {
            slept = 1;
            snap_doze_until(&doze, deadline);
        }
        before = running;
    }
    snap_doze_end(&doze);
    return running;
}

static int stop_all(const int *tids, int *stops, int count, unsigned long options,
                    int64_t timeout_us, const uint64_t *again, int64_t *since_us)
{
    /* All are ours before the first one stands still. */
    for (int i = 0; i < count; i++)
        stops[i] = snap_seize(tids[i], options);
    if (count && *since_us == 0)
        *since_us = snap_now_us();
    int first = 0; /* of those that may run on */
    for (int i = 0; i < count; i++) {
        /* EPERM for one that is ours already: seized by another tid, before an execve. */
        if (stops[i] == 0 || (stops[i] == -EPERM && snap_interrupt(tids[i]) == 0))
            stops[i] = snap_interrupt(tids[i]);
        while (first < i && (stops[first] != 0 || !look(tids[first], &stops[first], 0, again)))
            first++;
    }
    return wait_all(tids, stops, count, timeout_us, again);
}

int snap_stop_all(const int *tids, int *stops, int known, int count, snap_reaper *reaper,
                  unsigned long options, int64_t timeout_us, const uint64_t *again,
                  int64_t *since_us)
{
    watch(reaper, tids, known + count);
    int running =
        stop_all(tids + known, stops + known, count, options, timeout_us, again, since_us);
    watch(reaper, NULL, 0);
    return running;
}

int snap_seize_beside(int tid, int known, int leader, unsigned long options)
{
    snap_reaper *reaper = snap_reaper_start(leader);
    watch(reaper, &known, 1);
    int result = snap_seize(tid, options);
    snap_reaper_stop(reaper);
    return result;
}

void snap_detach_all(const int *tids, int *stops, int count)
{
    for (int i = 0; i < count; i++)
        if (stops[i] > 0)
            stops[i] = snap_detach(tids[i], 0);
}

int snap_get_registers_all(const int *tids, int *stops, int count, void *registers, size_t size)
{
    int silent = 0;
    for (int i = 0; i < count; i++) {
        char *out = (char *)registers + (size_t)i * size;
        int result = stops[i] > 0 ? snap_get_registers(tids[i], out, size) : -ESRCH;
        if (result < 0) {
            stops[i] = result;
            silent++;
        }
    }
    return silent;
}

int snap_mark_registers(const unsigned char *registers, int count, uint64_t guard, uint64_t guard_end,
                        const uint64_t *again, unsigned char *marks)
{
    int all = 0;
    for (int i = 0; i < count; i++) {
        const unsigned char *one = registers + (size_t)i * SNAP_REGISTERS_SIZE;
        const uint64_t at = snap_arch_rip(one);
        marks[i] = at >= guard && at < guard_end ? SNAP_MARK_GUARDED : 0;
        if (snap_arch_restarts(one))
            marks[i] |= SNAP_MARK_RESTARTS;
        if (is_among(snap_arch_made_again(one), again))
            marks[i] |= SNAP_MARK_AGAIN;
        all |= marks[i];
    }
    return all;
}

void snap_get_rseq_all(const int *tids, int count, uint64_t *addresses)
{
    for (int i = 0; i < count; i++) {
        snap_rseq rseq;
        addresses[i] = snap_get_rseq(tids[i], &rseq) < 0 ? 0 : rseq.address;
    }
}

static int get_state(int tid, const unsigned char *registers, snap_thread_state *s, unsigned char *area,
                     uint64_t size)
{
    int r = 0;
    s->request = "PTRACE_GETREGSET NT_PRSTATUS";
    if (registers)
        memcpy(s->registers, registers, sizeof s->registers);
    else if ((r = snap_get_registers(tid, s->registers, sizeof s->registers)) < 0)
        return r;
    s->request = "PTRACE_GETREGSET NT_X86_XSTATE";
    if ((s->xstate = snap_get_xstate(tid, area, size)) < 0)
        return (int)s->xstate;
    s->request = "PTRACE_GETSIGMASK";
    if ((r = snap_get_signal_mask(tid, &s->signal_mask)) < 0)
        return r;
    s->request = "PTRACE_GET_RSEQ_CONFIGURATION";
    r = snap_get_rseq(tid, &s->rseq);
    return r == -EOPNOTSUPP ? 0 : r;
}

/* Of threads of one process: in one call where that works, which takes a quarter of the time. */
static void get_critical_sections(const int *tids, int count, snap_thread_state *states)
{
    struct iovec here[AT_ONCE], there[AT_ONCE];
    snap_thread_state *of[AT_ONCE];
    for (int i = 0, n = 0; i < count; i++) {
        snap_thread_state *s = &states[i];
        if (s->failed == 0 && s->rseq.address) {
            here[n] = (struct iovec){&s->critical_section, sizeof s->critical_section};
            there[n] = (struct iovec){(void *)(s->rseq.address + SNAP_RSEQ_CS), here[n].iov_len};
            of[n++] = s;
        }
        if (n == 0 || (n < AT_ONCE && i + 1 < count))
            continue;
        const ssize_t got = process_vm_readv(tids[i], here, (unsigned long)n, there, (unsigned long)n, 0);
        for (int k = got < 0 ? 0 : (int)((size_t)got / sizeof(uint64_t)); k < n; k++) {
            of[k]->request = "reading rseq_cs";
            of[k]->failed = snap_read_memory(tids[i], (uint64_t)there[k].iov_base, &of[k]->critical_section,
                                             sizeof of[k]->critical_section);
        }
        n = 0;
    }
}

int snap_get_states(const int *tids, int count, const unsigned char *registers, snap_thread_state *states,
                    unsigned char *areas, uint64_t area)
{
    int failed = 0;
    for (int i = 0; i < count; i++) {
        const unsigned char *known = registers ? registers + (size_t)i * sizeof states->registers : NULL;
        states[i] = (snap_thread_state){0};
        states[i].failed = get_state(tids[i], known, &states[i], areas + (uint64_t)i * area, area);
    }
    get_critical_sections(tids, count, states);
    for (int i = 0; i < count; i++)
        failed += states[i].failed != 0;
    return failed;
}
