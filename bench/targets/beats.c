/* beats: when did a processor of this machine not run anything? A thread for each, before all others
 * (SCHED_FIFO, 99), that wants to run every millisecond.
 *
 *   --log PATH
 *
 * Until SIGTERM. Then LOG holds three numbers for each beat that came more than half a millisecond
 * late: processor, due, came. All are 64 bits, times ns of CLOCK_MONOTONIC. A processor that is late
 * may be in a part of the kernel that is not preempted; all at once are the host's. (perf's cpu-clock,
 * from an interrupt, sees the same times, but stops on an idle processor.) */
#define _GNU_SOURCE
#include "common.h"

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#define BEAT_NS 1000000UL
#define LATE_NS 500000UL
#define MOST_LATE 65536         /* of one processor */

struct late { uint64_t processor, due, came; };
struct watch {
    pthread_t thread;
    int processor;
    size_t count;
    struct late late[MOST_LATE];
};

static void *watch(void *argument)
{
    struct watch *one = argument;
    struct sched_param first = { .sched_priority = 99 };
    cpu_set_t here;

    CPU_ZERO(&here);
    CPU_SET(one->processor, &here);
    errno = pthread_setaffinity_np(pthread_self(), sizeof here, &here);
    must(errno == 0, "pthread_setaffinity_np");
    errno = pthread_setschedparam(pthread_self(), SCHED_FIFO, &first);
    must(errno == 0, "SCHED_FIFO");
    for (uint64_t due = now_ns() + BEAT_NS; !stopping; due += BEAT_NS) {
        struct timespec at = { (time_t)(due / SECOND), (long)(due % SECOND) };
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL);
        uint64_t came = now_ns();
        if (came < due + LATE_NS)
            continue;
        if (one->count < MOST_LATE)
            one->late[one->count++] = (struct late){ (uint64_t)one->processor, due, came };
        due = came;
    }
    return NULL;
}

int main(int argc, char **argv)
{
    cpu_set_t ours;
    size_t count = 0;

    must(argc == 3 && strcmp(argv[1], "--log") == 0, "--log PATH");
    signal(SIGTERM, stop);
    must(sched_getaffinity(0, sizeof ours, &ours) == 0, "sched_getaffinity");
    struct watch *all = calloc((size_t)CPU_COUNT(&ours), sizeof *all);
    must(all != NULL && mlockall(MCL_CURRENT | MCL_FUTURE) == 0, "memory");
    for (int processor = 0; processor < CPU_SETSIZE; processor++) {
        if (!CPU_ISSET(processor, &ours))
            continue;
        all[count].processor = processor;
        errno = pthread_create(&all[count].thread, NULL, watch, &all[count]);
        must(errno == 0, "pthread_create");
        count++;
    }
    for (size_t i = 0; i < count; i++)
        pthread_join(all[i].thread, NULL);
    FILE *to = fopen(argv[2], "we");
    must(to != NULL, argv[2]);
    for (size_t i = 0; i < count; i++)
        must(fwrite(all[i].late, sizeof *all[i].late, all[i].count, to) == all[i].count, argv[2]);
    must(fclose(to) == 0, argv[2]);
    return 0;
}
