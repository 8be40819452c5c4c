/* What of ptrace.c other C files use and Python does not. */
#ifndef SNAP_PTRACE_INTERNAL_H
#define SNAP_PTRACE_INTERNAL_H
#include "ptrace.h"

#include <signal.h>

/* A stop mostly comes within 15 us when the thread is on another CPU. After that sleeping is better
   than sched_yield: on this CPU the thread can run at once, and with other programs about the kernel
   lets a sleeper back in when it is woken, while a yield gives a whole slice away (measured with two
   busy programs on two CPUs: p99 0.1 ms against 8-44 ms). */
#define SNAP_SPIN_US 15
/* How long we wait for a thread before asking it itself: execve can have given its tid to a sibling,
   which is nobody's tracee and, in a child of this process, never stops; or another thread of this
   process, in a waitpid(2) of its own, can have taken the news of the stop. */
#define SNAP_ASK_AFTER_US 5000

int64_t snap_now_us(void);

/* Sleeping between two looks at threads. SIGCHLD is blocked and waited for, which disturbs no handler
   of the program: one that tells of a real end of a child is sent again at the end. Who sends one to
   the very thread (tgkill) wakes it, and tells of nothing. */
typedef struct {
    sigset_t before;
    int swallowed;
} snap_doze;
void snap_doze_begin(snap_doze *doze);
/* Until a thread may have stopped, or the time is over (CLOCK_MONOTONIC, us). */
void snap_doze_until(snap_doze *doze, int64_t deadline);
void snap_doze_end(snap_doze *doze);

/* Of /proc/TID/stat: the state ('R', 'Z', …) and the flags (PF_… of linux/sched.h). -ENOENT, -ESRCH:
   there is no such thread. */
int snap_stat(int tid, char *state, unsigned *flags);

/* One look at a thread that has been interrupted. 1: it is in an event stop; 0: it runs (one that
   stopped elsewhere is sent on). `asking`: also ask the thread itself. */
int snap_look_for_event_stop(int tid, int asking, int *stop);

#endif
