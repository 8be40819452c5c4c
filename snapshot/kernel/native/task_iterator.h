/*
 * What the kernel keeps of threads, read from outside and at once: a BPF program that the task iterator
 * runs for each thread (Documentation/bpf/bpf_iterators.rst) copies fields of its task_struct, which the
 * kernel's BTF says where to find. About a microsecond for a thread, whether it stands or runs. Needs
 * CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN, and Linux 6.1. Mechanism without policy.
 */
#ifndef SNAP_TASK_ITERATOR_H
#define SNAP_TASK_ITERATOR_H
#include <stdint.h>

/* One thread. The fields of the kernel's structs have other types, and no holes. */
typedef struct {
    uint64_t alternate_stack, alternate_size; /* sas_ss_sp, sas_ss_size */
    uint64_t clear_child_tid, robust_list;
    uint64_t timer_slack_ns;
    uint64_t flags;                           /* of thread_info */
    uint64_t pending;                         /* signals that wait for it: of sigpending */
    /* For comparisons: threads of a process that have the same credentials share them. */
    uint64_t credentials, atomic_flags; /* real_cred; no_new_privs and others */
    int32_t tid;                              /* in the initial pid namespace */
    uint32_t alternate_flags, personality, death_signal, securebits;
    uint32_t policy;                          /* SCHED_… */
    int32_t static_priority;                  /* 120 + nice */
    int32_t seccomp; /* its mode, for comparisons as well */
    char comm[16];
} snap_task;

/* One process, beside its threads. Good for nothing but a comparison: what system calls of the process
   itself have set is as it was if these bytes are. */
typedef struct {
    uint64_t memory;                 /* mm_struct: its address */
    uint64_t brk, memory_flags;      /* of mm_struct: dumpable, mdwe, thp_disable, memory merging */
    uint64_t real_interval;          /* of signal_struct: ITIMER_REAL */
    uint64_t cpu_timers[4];          /* ITIMER_PROF, ITIMER_VIRTUAL: when, and the interval */
    uint64_t posix_timers;           /* the first of its list */
    uint32_t bits;                   /* is_child_subreaper and others */
    uint32_t real_armed;
    unsigned char actions[64][32];   /* of sighand_struct: what each signal does */
} snap_process;

typedef struct snap_task_program snap_task_program;

#define SNAP_OF_THREADS 0
#define SNAP_OF_THREAD 1
#define SNAP_OF_PROCESS 2

/* Loads the programs. 0 or -errno: -ENOENT, -EPROTO: no BTF, or it is not understood;
   -EPERM; -EXDEV: this process has a pid namespace of its own. */
int snap_task_program_load(snap_task_program **made);
void snap_task_program_free(snap_task_program *program);
/* A descriptor that gives, once, what there is when it is first read: SNAP_OF_THREADS: a snap_task of
   each thread of process `id`; SNAP_OF_THREAD: that of thread `id`; SNAP_OF_PROCESS: the snap_process
   that thread `id` belongs to. Or -errno. */
int snap_task_iterator(const snap_task_program *program, int id, int what);
/* Reads it to the end. -> bytes, at most `size`; or -errno (-E2BIG: there is more). */
int64_t snap_task_read(int fd, void *into, uint64_t size);
/* The address of the mm_struct of the process that thread `id` belongs to, and where in a task_struct it is
   found. 0 or -errno. */
int snap_task_memory(const snap_task_program *program, int id, uint64_t *memory, int32_t *at);
/* Brings `count` of the `known` tasks to the front, in the order of tids. 0; -ESRCH: one is missing. */
int snap_task_sort(snap_task *tasks, int known, const int *tids, int count);
/* unlike[i]: whether it has other credentials, no_new_privs or seccomp mode than the first, or a signal
   waits for it. */
void snap_task_compare(const snap_task *tasks, int count, unsigned char *unlike);

#endif
