/* T0 in one call: all threads are stopped, what there is to be known of the process is read to memory that was
 * touched before, its memory is settled, and all run on. For what is ordinary alone, where writers wait for
 * nobody: whoever finds anything else lets all go, and says so. Then nothing has happened but a short stop, and
 * T0 is made step by step, by the caller. Mechanism without policy. */
#ifndef SNAP_INSTANT_H
#define SNAP_INSTANT_H
#include "answers.h"
#include "pump.h"
#include "reading.h"
#include "threads.h"

#define SNAP_CODE 34 /* bytes of code around where a thread stands: 32 before it, and a `syscall` behind it */

typedef struct {
    uint64_t start;
    uint64_t length; /* 0: none was read */
    unsigned char bytes[40]; /* SNAP_CODE */
} snap_code;

/* A file that has to be as it was. */
typedef struct {
    int at; /* which one of the files of the reading; -1: there is none */
    const char *text;
    uint64_t length;
} snap_known_file;

/* Why it is not T0. */
#define SNAP_NOT_THREADS 1  /* they come and go, or there is no room for them; or it has ended */
#define SNAP_NOT_LATE 2     /* one does not stop, and is ours until it does: stops[i] is -ETIMEDOUT */
#define SNAP_NOT_PLACES 3   /* one stands in the guard */
#define SNAP_NOT_ANSWERS 4  /* not all can be told from outside, or threads have signals that wait, or other ids */
#define SNAP_NOT_STATEMENT 5 /* the process is not as it was when it was asked */
#define SNAP_NOT_FILES 6    /* a file of /proc could not be read, signals wait, or `merges` is not as it was */
#define SNAP_NOT_TABLE 7    /* descriptors that have to be asked */
#define SNAP_NOT_MAPS 8     /* it has mapped or unmapped something */
#define SNAP_NOT_PUMP 9     /* its thread has ended */

/* Times of a stop: SNAP_WHEN_… */
#define SNAP_WHEN_TOLD 0 /* the first thread was */
#define SNAP_WHEN_STOPPED 1
#define SNAP_WHEN_CAPTURED 2
#define SNAP_WHEN_LISTED 3 /* descriptors were */
#define SNAP_WHEN_HELD 4
#define SNAP_WHEN_SETTLED 5
#define SNAP_WHEN_GONE 6 /* the last one was let go */

typedef struct {
    /* The memory of all this stays the caller's. */
    int pid;
    int folder;             /* /proc/PID/task, open */
    int most;               /* threads that there is room for */
    const uint64_t *again;  /* as of snap_stop_all, the next two too */
    snap_reaper *reaper;
    int64_t timeout_us;
    uint64_t guard, guard_end; /* as of snap_mark_registers */
    snap_pump *pump;
    uint64_t most_bytes;    /* as of snap_pump_order_settle */
    int stays;              /* one stays seized if anything is unsaved, or to be proved */
    int tasks_fd;           /* snap_task_iterator: read once */
    snap_task *tasks;
    uint64_t tasks_size;    /* bytes */
    snap_task_bits bits;
    uint64_t data;
    const snap_questions *questions;
    unsigned char *unlike;
    int record_fd;          /* likewise, of the process */
    const unsigned char *record; /* as it was: sizeof(snap_process) bytes */
    snap_reading *reading;
    int status_at;          /* of the files of `reading` */
    snap_known_file maps, merges; /* merges: ksm_stat */
    void (*point)(int);     /* for tests: told of each time as it comes, of the last one before it; or NULL */

    int *tids, *stops;      /* `most` of each of these; the leader is the first */
    unsigned char *registers, *marks;
    snap_code *code;        /* of those whose call goes on as restart_syscall */
    snap_thread_state *states;
    unsigned char *areas;
    uint64_t area;

    /* What has become of it. */
    int count;
    int leader_stop;        /* that of the leader, before it was let go */
    int seized;             /* -1, or which one has stayed */
    int ordered;            /* the pump has been told to look */
    int settled;            /* as of snap_pump_await_settled */
    int64_t taken_ns;       /* CLOCK_REALTIME */
    int64_t times_us[7];    /* by SNAP_WHEN_…, CLOCK_MONOTONIC; 0: it did not come to that */
} snap_instant;

/* 0: `settled` says whether memory was; SNAP_NOT_… By the thread that is to be the tracer; the caller has told
 * the pump of the errand that is to read the table of `reading`. */
int snap_instant_take(snap_instant *instant);

#endif
