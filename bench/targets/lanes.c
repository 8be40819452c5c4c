#define _GNU_SOURCE
#include "lanes.h"
#include "victim.h"

#include <sys/resource.h>

#define LOOK_NS 20000UL         /* below, a gap is not worth asking the kernel for */
#define KEPT_NS 200000UL

uint64_t lane_round(struct lane *lane, uint64_t begin)
{
    static _Thread_local uint64_t waited, preempted;
    uint64_t end = now_ns();

    if (end - begin < LOOK_NS)
        return end;
    struct rusage used;
    must(getrusage(RUSAGE_THREAD, &used) == 0, "getrusage");
    if (end - begin >= KEPT_NS) {
        uint64_t at = lane->count;
        lane->gaps[at % GAPS] = (struct gap){ begin, end, (uint64_t)used.ru_nvcsw - waited,
                                              (uint64_t)used.ru_nivcsw - preempted };
        lane->count = at + 1;
    }
    waited = (uint64_t)used.ru_nvcsw;
    preempted = (uint64_t)used.ru_nivcsw;
    return now_ns();    /* what was written here may have had to wait itself: not a gap */
}

void lane_mark(struct lane *lane)
{
    lane->marked = lane->count;
}

void lane_print(struct lane *lane, FILE *to)
{
    uint64_t last = lane->count, first = lane->marked;

    if (last - first > GAPS)
        first = last - GAPS;
    fprintf(to, "{\"name\": \"%s\", \"operations\": %llu, \"gaps\": [", lane->name,
            (unsigned long long)lane->operations);
    for (uint64_t i = first; i < last; i++) {
        struct gap *gap = &lane->gaps[i % GAPS];
        fprintf(to, "%s[%llu, %llu, %llu, %llu]", i == first ? "" : ", ",
                (unsigned long long)gap->begin, (unsigned long long)gap->end,
                (unsigned long long)gap->waited, (unsigned long long)gap->preempted);
    }
    fprintf(to, "]}");
}
