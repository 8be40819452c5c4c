/* How fast memory is copied that nobody waits for. The thread that copies it also answers writers, so it
 * runs before ordinary threads where it may; what it does on its own account must leave them room. */
#define _GNU_SOURCE
#include "pump_internal.h"

#include <time.h>

#define SECOND_NS UINT64_C(1000000000)
#define REST 1                            /* it rests for as long as it has worked */
#define MOST_REST_NS UINT64_C(5000000)    /* … at most: a slice may have been preempted, or waited */
#define CREDIT_NS UINT64_C(20000000)      /* a share that was not used is not saved up for longer */
#define LOOK_NS UINT64_C(2000000)         /* a share: the other threads' work comes with a delay */

void snap_pump_pace(snap_pump *p, uint64_t bytes, unsigned percent)
{
    p->pace.bytes = bytes;
    p->pace.percent = percent;
}

static uint64_t processor_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * SECOND_NS + (uint64_t)t.tv_nsec;
}

void pace_spent(snap_pump *p, uint64_t began_ns, uint64_t bytes)
{
    pace *own = &p->pace;
    uint64_t now = now_ns(), worked = now - began_ns;
    own->rested_ns = now + (worked * REST < MOST_REST_NS ? worked * REST : MOST_REST_NS);
    if (!own->bytes)
        return;
    uint64_t since = own->due_ns > began_ns ? own->due_ns : began_ns;
    own->due_ns = since + (uint64_t)((double)bytes / (double)own->bytes * (double)SECOND_NS);
}

/* Until what this process has used is its share of the time that has passed. */
static uint64_t share_left(pace *own, uint64_t now)
{
    uint64_t used = processor_ns();
    if (!own->share_since_ns || used < own->share_used_ns) {
        own->share_since_ns = now;
        own->share_used_ns = used;
    }
    uint64_t due = own->share_since_ns + (used - own->share_used_ns) * 100 / own->percent;
    if (due + CREDIT_NS < now) {
        own->share_since_ns = now - CREDIT_NS;
        own->share_used_ns = used;
    }
    return due > now ? LOOK_NS : 0;
}

uint64_t pace_left(snap_pump *p, bool hurried)
{
    pace *own = &p->pace;
    uint64_t now = now_ns();
    uint64_t left = own->rested_ns > now ? own->rested_ns - now : 0;
    if (hurried)
        return left;
    uint64_t more = own->due_ns > now ? own->due_ns - now : 0;
    left = more > left ? more : left;
    more = own->percent ? share_left(own, now) : 0;
    return more > left ? more : left;
}
