/* Children that the target forks while shared memory of it is protected. The message of a fork hands
 * over a userfaultfd of the child's, in which is protected what is in the target (dup_userfaultfd,
 * copy_pte_range): until it is closed the child waits at its first write to any of that, and at
 * every event of its own.
 *
 * After T0 it is closed when all shared memory is saved: the child writes to nothing before. That
 * may take long, so the sweep takes shared memory first. Not chunk by chunk, as the target's own
 * faults are served: where in the child a mapping is, the target's windows do not tell for sure (it
 * may have been moved while the message waited). Ahead of T0 it is closed at once, and from then on
 * no copy of shared memory is trusted, nor is any armed at T0: it is copied in the pause.
 *
 * A child of vfork, or with CLONE_VM, shares the address space and its faults, and is no child here. */
#define _GNU_SOURCE
#include "pump_internal.h"

#include <errno.h>
#include <pthread.h>
#include <unistd.h>

#define CROWD 64 /* so many descriptors are not held for long */

/* A close takes the child's protection off, page table by page table (25 to 50 ms a GiB): nobody
 * else shall wait for that. */
static void *close_them(void *argument)
{
    snap_pump *p = argument;
    pthread_mutex_lock(&p->lock);
    for (;;) {
        while (!p->closing.count && !p->last_closed)
            pthread_cond_wait(&p->leave, &p->lock);
        if (!p->closing.count)
            break;
        int fd = p->closing.at[--p->closing.count];
        pthread_mutex_unlock(&p->lock);
        close(fd);
        pthread_mutex_lock(&p->lock);
    }
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

/* Lets the child go: it runs, and writes, unseen from now on. */
static void let_run(snap_pump *p, int fd)
{
    if (!p->closes)
        p->closes = !pthread_create(&p->closer, NULL, close_them, p);
    pthread_mutex_lock(&p->lock);
    int *slot = p->closes ? VECTOR_PUSH(&p->closing) : NULL;
    if (slot)
        *slot = fd;
    pthread_cond_signal(&p->leave);
    pthread_mutex_unlock(&p->lock);
    if (!slot)
        close(fd);
}

int child_born(snap_pump *p, int fd)
{
    pthread_mutex_lock(&p->lock);
    p->counters.forks++;
    p->counters.forks_ahead += !p->after_t0;
    pthread_mutex_unlock(&p->lock);
    if (!p->after_t0 || p->letting_go) {
        p->forked = true;
        let_run(p, fd);
        return 0;
    }
    int *slot = VECTOR_PUSH(&p->children);
    if (!slot) {
        close(fd);
        return -ENOMEM;
    }
    *slot = fd;
    int r = p->children.count < CROWD ? 0 : save_objects(p);
    return r == -EAGAIN ? 0 : r; /* they wait on */
}

static bool waits_for_objects(const snap_pump *p)
{
    if (p->unsaved_objects)
        return true;
    for (size_t i = 0; i < p->tentative.count; i++)
        if (p->tentative.at[i].saved.space >= OBJECT_SPACE)
            return true;
    return false;
}

void children_go(snap_pump *p, bool all)
{
    if (!all && p->after_t0 && !p->letting_go && waits_for_objects(p))
        return;
    while (p->children.count)
        let_run(p, p->children.at[--p->children.count]);
}

void children_end(snap_pump *p)
{
    if (!p->closes)
        return;
    pthread_mutex_lock(&p->lock);
    p->last_closed = true;
    pthread_cond_signal(&p->leave);
    pthread_mutex_unlock(&p->lock);
    pthread_join(p->closer, NULL);
}
