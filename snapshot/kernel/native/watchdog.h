/* A process that sees to it that a snap which stands still (SIGSTOP, a debugger, a hang) does not keep
 * its target waiting: it kills snap, and the kernel lets the target go. */
#pragma once
#include <stdint.h>

typedef struct snap_watchdog snap_watchdog;

/* Starts one. It kills this process (SIGKILL) when `beat` has not been called for stall_ms, as far as
 * the machine ran meanwhile: eight looks in a row have found no beat. `target` is only named in its
 * message on stderr. It is not seen by wait(2) without __WALL, and ends with
 * this process. Returns 0 and *made, or -errno. */
int snap_watchdog_start(int target, int stall_ms, snap_watchdog **made);
/* From any thread. */
void snap_watchdog_beat(snap_watchdog *watchdog);
/* Nobody waits for this process any more: it may take its time until the next beat. */
void snap_watchdog_rest(snap_watchdog *watchdog);
/* The target's userfaultfd: should this process not even end when it is killed (it is stuck in the
 * kernel), the other one releases the target by it. -1: there is none (any more). */
void snap_watchdog_know(snap_watchdog *watchdog, int uffd);
/* Ends and reaps it. */
void snap_watchdog_stop(snap_watchdog *watchdog);
