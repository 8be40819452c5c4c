#define _GNU_SOURCE
#include "background.h"

#include "deadline_internal.h"
#include "vector_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define LOOK_MS 50
#define WAITED_NS 25000000
#define WAITED_PART 4 /* who waited so many times as long as he ran, and for WAITED_NS, is starved */
#define HELPED_LOOKS 4
#define NUDGE_MS 1
#define MOST_PROCESSORS 64

struct member {
    int tid;
    int times; /* its schedstat; -1: the kernel does not tell (CONFIG_SCHED_INFO) */
    int policy;
    uint64_t ran, waited; /* up to the last look, in ns */
};

struct nudger {
    snap_background *background;
    pthread_t thread;
    int processor;
    bool runs;
};

struct snap_background {
    bool returns;
    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t ends;
    pthread_t watcher;
    bool watched; /* `watcher` is one */
    int starved; /* for so many looks they are helped */
    bool hurried;
    VECTOR(struct member) members;
    uint64_t nudged; /* processors */
    struct nudger nudgers[MOST_PROCESSORS];
};

int snap_background_new(int returns, snap_background **made)
{
    snap_background *b = calloc(1, sizeof *b);
    if (!b)
        return -ENOMEM;
    b->returns = returns;
    pthread_mutex_init(&b->lock, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&b->ends, &monotonic);
    pthread_condattr_destroy(&monotonic);
    *made = b;
    return 0;
}

static void schedule(struct member *m, int policy)
{
    struct sched_param none = { 0 };
    if (policy == m->policy)
        return;
    int now = sched_getscheduler(m->tid);
    if (now != SCHED_OTHER && now != SCHED_BATCH && now != SCHED_IDLE)
        return;
    if (sched_setscheduler(m->tid, policy, &none) == 0)
        m->policy = policy;
}

static int policy_of(const snap_background *b, const struct member *m)
{
    if (!b->returns)
        return SCHED_BATCH;
    return b->hurried || b->starved || m->times < 0 || !b->watched ? SCHED_OTHER : SCHED_IDLE;
}

static void schedule_all(snap_background *b)
{
    for (struct member *m = b->members.at; m < b->members.at + b->members.count; m++)
        schedule(m, policy_of(b, m));
}

static bool is_starved(struct member *m)
{
    char text[128];
    uint64_t ran, waited;
    ssize_t got = m->times < 0 ? 0 : pread(m->times, text, sizeof text - 1, 0);
    if (got <= 0)
        return false;
    text[got] = 0;
    if (sscanf(text, "%lu %lu", &ran, &waited) != 2)
        return false;
    uint64_t more_ran = ran - m->ran, more_waited = waited - m->waited;
    m->ran = ran;
    m->waited = waited;
    return more_waited > WAITED_NS && more_waited > WAITED_PART * more_ran;
}

/* Caller holds the lock. -> whether the time has passed, and nothing else happened. */
static bool pass(snap_background *b, int ms)
{
    struct timespec next;
    deadline(&next, ms);
    return pthread_cond_timedwait(&b->ends, &b->lock, &next) == ETIMEDOUT;
}

static void *watch(void *background)
{
    snap_background *b = background;
    pthread_mutex_lock(&b->lock);
    while (b->watched && pthread_equal(b->watcher, pthread_self())) {
        if (!pass(b, LOOK_MS))
            continue;
        b->starved -= b->starved > 0;
        for (struct member *m = b->members.at; m < b->members.at + b->members.count; m++)
            if (is_starved(m))
                b->starved = HELPED_LOOKS;
        schedule_all(b);
    }
    pthread_mutex_unlock(&b->lock);
    return NULL;
}

/* That it wakes up is all that it is for. */
static void *wake_up(void *nudger)
{
    struct nudger *n = nudger;
    snap_background *b = n->background;
    struct sched_param first = { .sched_priority = 1 };
    cpu_set_t there;
    CPU_ZERO(&there);
    CPU_SET(n->processor, &there);
    bool able = !sched_setaffinity(0, sizeof there, &there) && !sched_setscheduler(0, SCHED_FIFO, &first);
    pthread_mutex_lock(&b->lock);
    while (n->runs)
        if (able && b->nudged >> n->processor & 1)
            pass(b, NUDGE_MS);
        else
            pthread_cond_wait(&b->ends, &b->lock);
    pthread_mutex_unlock(&b->lock);
    return NULL;
}

static bool start(pthread_t *thread, void *(*run)(void *), void *with)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* a handler of ours may never run in it */
    bool started = pthread_create(thread, NULL, run, with) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return started;
}

void snap_background_nudge(snap_background *b, uint64_t processors)
{
    pthread_mutex_lock(&b->lock);
    if (!b->members.count)
        processors = 0;
    bool changes = b->nudged != processors;
    b->nudged = processors;
    for (int i = 0; i < MOST_PROCESSORS; i++) {
        struct nudger *n = &b->nudgers[i];
        if (n->runs || !(processors >> i & 1))
            continue;
        *n = (struct nudger){ .background = b, .processor = i, .runs = true };
        n->runs = start(&n->thread, wake_up, n);
    }
    if (changes)
        pthread_cond_broadcast(&b->ends);
    pthread_mutex_unlock(&b->lock);
}

/* Caller does not hold the lock. */
static void end_nudgers(snap_background *b)
{
    for (int i = 0; i < MOST_PROCESSORS; i++) {
        struct nudger *n = &b->nudgers[i];
        pthread_mutex_lock(&b->lock);
        bool ran = n->runs;
        n->runs = false;
        pthread_cond_broadcast(&b->ends);
        pthread_mutex_unlock(&b->lock);
        if (ran)
            pthread_join(n->thread, NULL);
    }
}

void snap_background_free(snap_background *b)
{
    end_nudgers(b);
    pthread_cond_destroy(&b->ends);
    pthread_mutex_destroy(&b->lock);
    free(b->members.at);
    free(b);
}

int snap_background_enter(snap_background *b)
{
    char path[64];
    struct member own = { .tid = gettid(), .policy = -1 };
    snprintf(path, sizeof path, "/proc/self/task/%d/schedstat", own.tid);
    own.times = open(path, O_RDONLY | O_CLOEXEC);
    is_starved(&own); /* up to now does not count */
    pthread_mutex_lock(&b->lock);
    struct member *m = VECTOR_PUSH(&b->members);
    if (!m) {
        pthread_mutex_unlock(&b->lock);
        if (own.times >= 0)
            close(own.times);
        return -ENOMEM;
    }
    *m = own;
    if (!b->watched)
        b->watched = start(&b->watcher, watch, b);
    schedule(m, policy_of(b, m));
    pthread_mutex_unlock(&b->lock);
    return 0;
}

void snap_background_leave(snap_background *b)
{
    int tid = gettid();
    pthread_mutex_lock(&b->lock);
    for (struct member *m = b->members.at; m < b->members.at + b->members.count; m++)
        if (m->tid == tid) {
            schedule(m, SCHED_OTHER);
            if (m->times >= 0)
                close(m->times);
            *m = b->members.at[--b->members.count]; /* from here on its number may be another's */
            break;
        }
    bool ends = b->watched && !b->members.count;
    pthread_t watcher = b->watcher;
    if (ends) {
        b->nudged = 0;
        b->watched = false;
        pthread_cond_broadcast(&b->ends);
    }
    pthread_mutex_unlock(&b->lock);
    if (ends) {
        pthread_join(watcher, NULL);
        end_nudgers(b);
    }
}

void snap_background_hurry(snap_background *b, int hurried)
{
    pthread_mutex_lock(&b->lock);
    b->hurried = hurried;
    schedule_all(b);
    pthread_mutex_unlock(&b->lock);
}
