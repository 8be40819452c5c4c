/*
 * What system calls would return in threads of another process, without making them there: from what
 * the kernel keeps of the threads (task_iterator.h), and calls that take a thread's number. Mechanism
 * without policy.
 */
#ifndef SNAP_ANSWERS_H
#define SNAP_ANSWERS_H
#include "interview.h"
#include "task_iterator.h"

/* Bits of snap_task.flags: another version of the kernel has others. */
typedef struct {
    uint64_t no_tsc, no_cpuid; /* 0: this processor cannot refuse that instruction */
} snap_task_bits;

/* Finds them out by having them set in the calling thread. -EAGAIN: they could not be told apart. */
int snap_task_find_bits(const snap_task_program *program, snap_task_bits *bits);

/* As snap_interview has it for `others`, of threads that may as well run. 0; -ENOSYS: a call cannot be
   answered from outside, or not as it would be inside. SS_ONSTACK is not said. */
int snap_answer(const snap_task *tasks, int count, snap_task_bits bits, uint64_t data,
                const snap_questions *questions);

#endif
