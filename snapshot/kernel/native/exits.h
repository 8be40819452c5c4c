/*
 * The end of a process, held up while memory of it is unsaved. One of its threads stays seized and
 * runs; when it ends it stops once more before it lets go of the memory (PTRACE_EVENT_EXIT), whether
 * it has called exit_group(2) or is killed, by the exit or the execve of another thread too. When it
 * alone ends another is seized in its place. A SIGKILL is not held up: it means now. Mechanism without
 * policy; the words and the caller's duties are those of ptrace.h.
 */
#ifndef SNAP_EXITS_H
#define SNAP_EXITS_H
#include "threads.h"

typedef struct snap_exits snap_exits;

/* pid: the process; stall_ms: for how long it is held up at most; again: as for snap_stop_all. */
int snap_exits_new(int pid, int stall_ms, const uint64_t *again, snap_exits **made);
/* By the thread that has seized one of the process with SNAP_PTRACE_O_TRACEEXIT, and has nothing else
   to wait for. Passes its signals and stops on until snap_exits_end, or the process is over. 0;
   -ETIMEDOUT: it was held up for stall_ms. Nothing is let go here: the kernel does that when the
   calling thread ends, without stopping anybody. Until then signals of that thread wait for it. */
int snap_exits_serve(snap_exits *exits);
/* From any thread: whether the process is being held up now. */
int snap_exits_holds(snap_exits *exits);
/* From any thread, at any time: serve returns, or will not begin. */
void snap_exits_end(snap_exits *exits);
void snap_exits_free(snap_exits *exits);
/* Returns when a thread of this process, which is about to end, has: all that it traced is let go.
   (pthread_join returns before that.) */
void snap_exits_await_thread(int tid);

#endif
