/* When a wait for a condition whose clock is CLOCK_MONOTONIC ends. */
#pragma once
#include <time.h>

/* For pthread_cond_timedwait. */
static inline void deadline(struct timespec *until, int timeout_ms)
{
    clock_gettime(CLOCK_MONOTONIC, until);
    until->tv_sec += timeout_ms / 1000;
    until->tv_nsec += (timeout_ms % 1000) * 1000000L;
    until->tv_sec += until->tv_nsec / 1000000000L;
    until->tv_nsec %= 1000000000L;
}
