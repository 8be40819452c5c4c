/*
 * A victim for tests/live/test_state_resources.py: holds every kind of process and thread state that
 * is neither memory nor descriptors, and reports it as JSON from its own system calls (never from
 * /proc, which a chroot hides).
 *
 *   state blank|state|creds DIRECTORY
 *
 * "blank" has the same threads and nothing else, so that the state of another can be rebuilt in it.
 * All addresses are the same in each run (no ASLR). Commands on stdin, one a line: report, drain
 * (take all pending signals), quit. One line of answer each; "ready" first.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/sched.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define WORKERS 3
#define CHECK(what)                                                                                \
    do {                                                                                           \
        if ((long)(what) < 0) {                                                                    \
            fprintf(stderr, "state.c:%d: %s: %s\n", __LINE__, #what, strerror(errno));             \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

struct attributes {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
    uint32_t util_min, util_max;
};

static char stacks[WORKERS + 1][64 * 1024] __attribute__((aligned(16)));
static int ask[WORKERS + 1][2], done[2];
static char text[1 << 16];
static size_t used;
static char command;
static const char *mode, *directory;
static volatile sig_atomic_t handled;

static void say(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    used += vsnprintf(text + used, sizeof text - used, format, list);
    va_end(list);
}

static void handler(int number, siginfo_t *info, void *context)
{
    (void)number, (void)info, (void)context;
    handled++;
}

/* ---- what a thread has -------------------------------------------------------------------- */

static void report_credentials(void)
{
    uid_t r, e, s;
    CHECK(getresuid(&r, &e, &s));
    say("\"uids\": [%d, %d, %d, %ld], ", r, e, s, syscall(SYS_setfsuid, -1));
    CHECK(getresgid(&r, &e, &s));
    say("\"gids\": [%d, %d, %d, %ld], \"groups\": [", r, e, s, syscall(SYS_setfsgid, -1));
    gid_t groups[64];
    int count = getgroups(64, groups);
    for (int i = 0; i < count; i++)
        say("%s%d", i ? ", " : "", groups[i]);
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct sets[2];
    CHECK(syscall(SYS_capget, &header, sets));
    say("], \"effective\": [%u, %u], \"permitted\": [%u, %u], \"inheritable\": [%u, %u], ",
        sets[0].effective, sets[1].effective, sets[0].permitted, sets[1].permitted,
        sets[0].inheritable, sets[1].inheritable);
    say("\"bounding_ambient\": [");
    for (int cap = 0; cap < 41; cap++)
        say("%s[%d, %d]", cap ? ", " : "", prctl(PR_CAPBSET_READ, cap, 0, 0, 0),
            prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, cap, 0, 0));
    say("], \"securebits\": %d, \"no_new_privs\": %d, ", prctl(PR_GET_SECUREBITS, 0, 0, 0, 0),
        prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0));
}

static void report_thread(int index)
{
    stack_t stack;
    CHECK(sigaltstack(NULL, &stack));
    void *head;
    size_t length;
    CHECK(syscall(SYS_get_robust_list, 0, &head, &length));
    int *clear = NULL;
    CHECK(prctl(PR_GET_TID_ADDRESS, &clear, 0, 0, 0));
    char name[17] = "";
    CHECK(prctl(PR_GET_NAME, name, 0, 0, 0));
    say("{\"index\": %d, \"name\": \"%s\", \"stack\": [%lu, %d, %lu], \"robust\": [%lu, %lu], "
        "\"clear\": %lu, ",
        index, name, (unsigned long)stack.ss_sp, stack.ss_flags, stack.ss_size,
        (unsigned long)head, length, (unsigned long)clear);
    struct attributes a = {0};
    CHECK(syscall(SYS_sched_getattr, 0, &a, sizeof a, 0));
    uint64_t cpus[128] = {0};
    CHECK(syscall(SYS_sched_getaffinity, 0, sizeof cpus, cpus));
    say("\"policy\": [%u, %lu, %d, %u, %lu], \"nice\": %d, \"cpus\": %lu, \"ioprio\": %ld, "
        "\"slack\": %d, ",
        a.policy, a.flags, a.nice, a.priority, a.runtime, getpriority(PRIO_PROCESS, 0), cpus[0],
        syscall(SYS_ioprio_get, 1, 0), prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0));
    int death = 0, tsc = 0;
    CHECK(prctl(PR_GET_PDEATHSIG, &death, 0, 0, 0));
    CHECK(prctl(PR_GET_TSC, &tsc, 0, 0, 0));
    uint64_t blocked = 0, pending = 0;
    CHECK(syscall(SYS_rt_sigprocmask, 0, NULL, &blocked, 8));
    CHECK(syscall(SYS_rt_sigpending, &pending, 8));
    say("\"death\": %d, \"tsc\": %d, \"blocked\": %lu, \"pending\": %lu, ", death, tsc, blocked,
        pending);
    report_credentials();
    say("\"personality\": %d}", personality(0xffffffff));
}

/* All that is pending, for the thread first and then for the process, as the kernel gives it. */
static void drain_thread(int index)
{
    uint64_t all = ~0UL;
    struct timespec now = {0, 0};
    siginfo_t info;
    say("{\"index\": %d, \"signals\": [", index);
    for (int count = 0;; count++) {
        memset(&info, 0, sizeof info);
        long got = syscall(SYS_rt_sigtimedwait, &all, &info, &now, 8);
        if (got < 0)
            break;
        say("%s[%d, %d, %d, %d, %lu]", count ? ", " : "", info.si_signo, info.si_code,
            info.si_code == SI_TIMER ? info.si_timerid : 0, info.si_uid,
            (unsigned long)info.si_value.sival_ptr);
    }
    say("]}");
}

static void set_up_worker(int index)
{
    char name[16];
    snprintf(name, sizeof name, index == 2 ? "wor) R k\n%d" : "worker (%d)", index);
    /* JSON has no raw newline: see the test, which reads the name from outside as well. */
    if (index == 2)
        name[8] = '|';
    CHECK(prctl(PR_SET_NAME, name, 0, 0, 0));
    stack_t stack = {.ss_sp = stacks[index], .ss_size = 16384 * index};
    if (index == 3)
        stack.ss_flags = 1U << 31; /* SS_AUTODISARM */
    CHECK(sigaltstack(&stack, NULL));
    CHECK(syscall(SYS_setpriority, PRIO_PROCESS, 0, index - 2));
    uint64_t cpu = 1UL << index % 2;
    CHECK(syscall(SYS_sched_setaffinity, 0, 8, &cpu));
    CHECK(prctl(PR_SET_TIMERSLACK, 100000 * index, 0, 0, 0));
    if (index == 1)
        CHECK(syscall(SYS_ioprio_set, 1, 0, 3 << 13));
    struct attributes a = {.size = 48, .policy = SCHED_FIFO, .priority = 5, .flags = 1};
    if (index == 2)
        CHECK(syscall(SYS_sched_setattr, 0, &a, 0));
    struct attributes b = {.size = 48, .policy = SCHED_BATCH, .nice = 7, .runtime = 5000000};
    if (index == 3)
        CHECK(syscall(SYS_sched_setattr, 0, &b, 0));
    if (index == 3)
        CHECK(prctl(PR_SET_TSC, PR_TSC_SIGSEGV, 0, 0, 0));
    CHECK(prctl(PR_SET_PDEATHSIG, SIGWINCH, 0, 0, 0));
    siginfo_t info = {.si_signo = SIGRTMIN + 2, .si_code = -7};
    info.si_uid = 4242;
    info.si_value.sival_ptr = (void *)(0x123456789abc0 + (long)index);
    CHECK(syscall(SYS_rt_tgsigqueueinfo, getpid(), gettid(), SIGRTMIN + 2, &info));
    info.si_value.sival_ptr = (void *)(0x1000 + (long)index);
    CHECK(syscall(SYS_rt_tgsigqueueinfo, getpid(), gettid(), SIGRTMIN + 2, &info));
    CHECK(syscall(SYS_tgkill, getpid(), gettid(), SIGHUP));
}

static void *worker(void *argument)
{
    int index = (int)(long)argument;
    if (!strcmp(mode, "state"))
        set_up_worker(index);
    if (write(done[1], "x", 1) != 1)
        exit(1);
    char byte;
    while (read(ask[index][0], &byte, 1) == 1) {
        if (command == 'r')
            report_thread(index);
        if (command == 'd')
            drain_thread(index);
        if (write(done[1], "x", 1) != 1)
            exit(1);
    }
    return NULL;
}

/* ---- what the process has ----------------------------------------------------------------- */

static void report_process(void)
{
    say("\"actions\": [");
    for (int number = 1; number <= 64; number++) {
        uint64_t action[4] = {0};
        syscall(SYS_rt_sigaction, number, NULL, action, 8);
        say("%s[%lu, %lu, %lu, %lu]", number > 1 ? ", " : "", action[0], action[1], action[2],
            action[3]);
    }
    say("], \"limits\": [");
    for (int which = 0; which < 16; which++) {
        struct rlimit limit;
        CHECK(getrlimit(which, &limit));
        say("%s[%lu, %lu]", which ? ", " : "", limit.rlim_cur, limit.rlim_max);
    }
    say("], \"itimers\": [");
    for (int which = 0; which < 3; which++) {
        struct itimerval timer;
        CHECK(getitimer(which, &timer));
        say("%s[%ld, %ld]", which ? ", " : "",
            timer.it_interval.tv_sec * 1000000 + timer.it_interval.tv_usec,
            timer.it_value.tv_sec * 1000000 + timer.it_value.tv_usec);
    }
    say("], \"timers\": {");
    for (int id = 0, count = 0; id < 200; id++) {
        struct itimerspec timer;
        if (syscall(SYS_timer_gettime, id, &timer) == 0)
            say("%s\"%d\": [%ld, %ld]", count++ ? ", " : "", id,
                timer.it_interval.tv_sec * 1000000000 + timer.it_interval.tv_nsec,
                timer.it_value.tv_sec * 1000000000 + timer.it_value.tv_nsec);
    }
    mode_t mask = umask(0);
    umask(mask);
    char cwd[4096] = "";
    CHECK(syscall(SYS_getcwd, cwd, sizeof cwd));
    int reaper = 0;
    CHECK(prctl(PR_GET_CHILD_SUBREAPER, &reaper, 0, 0, 0));
    say("}, \"umask\": %o, \"cwd\": \"%s\", \"reaper\": %d, \"dumpable\": %d, \"thp\": %d, "
        "\"mdwe\": %d, \"merge\": %d, \"leads\": [%d, %d], \"handled\": %d",
        mask, cwd, reaper, prctl(PR_GET_DUMPABLE, 0, 0, 0, 0),
        prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0), prctl(66, 0, 0, 0, 0), prctl(68, 0, 0, 0, 0),
        getsid(0) == getpid(), getpgrp() == getpid(), (int)handled);
}

static void act(int number, void *function, int flags, int mask1, int mask2)
{
    struct sigaction action = {.sa_flags = flags};
    action.sa_sigaction = (void (*)(int, siginfo_t *, void *))function;
    sigaddset(&action.sa_mask, mask1);
    sigaddset(&action.sa_mask, mask2);
    CHECK(sigaction(number, &action, NULL));
}

static void limit(int which, rlim_t soft, rlim_t hard)
{
    struct rlimit value = {soft, hard};
    CHECK(setrlimit(which, &value));
}

static void timer(int id, int clock, int notify, int thread, long interval, long value)
{
    struct sigevent event = {.sigev_notify = notify, .sigev_signo = SIGRTMIN + 4};
    event.sigev_value.sival_ptr = (void *)(0xabcdef00L + id);
    event._sigev_un._tid = thread;
    int made = -1;
    do {
        if (made >= 0)
            CHECK(syscall(SYS_timer_delete, made));
        CHECK(syscall(SYS_timer_create, clock, &event, &made));
    } while (made < id);
    struct itimerspec spec = {{interval / 1000, interval % 1000 * 1000000},
                              {value / 1000, value % 1000 * 1000000}};
    CHECK(syscall(SYS_timer_settime, id, 0, &spec, NULL));
}

static void set_up_process(void)
{
    act(SIGUSR1, handler, SA_SIGINFO | SA_RESTART | SA_ONSTACK, SIGUSR2, SIGRTMAX);
    act(SIGRTMIN + 9, handler, SA_SIGINFO | SA_NODEFER | SA_RESETHAND, SIGCHLD, SIGIO);
    act(SIGUSR2, SIG_IGN, 0, SIGUSR1, SIGUSR1);
    act(SIGCHLD, SIG_DFL, SA_NOCLDWAIT | SA_NOCLDSTOP, SIGUSR1, SIGUSR1);
    act(SIGTRAP, SIG_IGN, 0, SIGUSR1, SIGUSR1);
    limit(RLIMIT_CORE, 0, 4096);
    limit(RLIMIT_NOFILE, 30, 90);
    limit(RLIMIT_FSIZE, 1 << 30, RLIM_INFINITY);
    limit(RLIMIT_SIGPENDING, 3000, 4000);
    umask(031);
    CHECK(chdir(directory));
    CHECK(prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0));
    CHECK(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0));
    CHECK(prctl(PR_SET_DUMPABLE, 0, 0, 0, 0));
    CHECK(personality(personality(0xffffffff) | STICKY_TIMEOUTS));
    CHECK(prctl(PR_SET_NAME, "le(a) der", 0, 0, 0));
    struct itimerval real = {{5, 250000}, {2000, 0}}, prof = {{0, 0}, {3000, 0}};
    CHECK(setitimer(ITIMER_REAL, &real, NULL));
    CHECK(setitimer(ITIMER_PROF, &prof, NULL));
    timer(2, CLOCK_REALTIME, SIGEV_SIGNAL, 0, 10, 1000000);
    timer(3, CLOCK_MONOTONIC, SIGEV_THREAD_ID, gettid(), 0, 2000000);
    timer(7, CLOCK_BOOTTIME, SIGEV_NONE, 0, 1234, 3000000);
    timer(150, CLOCK_PROCESS_CPUTIME_ID, SIGEV_SIGNAL, 0, 0, 4000000);
    timer(151, CLOCK_MONOTONIC, SIGEV_SIGNAL, 0, 0, 0); /* disarmed */
    timer(152, CLOCK_MONOTONIC, SIGEV_SIGNAL, 0, 0, 1); /* fires at once, pending */
    union sigval value = {.sival_ptr = (void *)0x7766554433221100};
    for (int i = 0; i < 3; i++) {
        value.sival_ptr = (char *)value.sival_ptr + 1;
        CHECK(sigqueue(getpid(), SIGRTMIN + 1, value));
    }
    CHECK(kill(getpid(), SIGURG)); /* ignored by default, but blocked: it stays */
    CHECK(kill(getpid(), SIGTERM));
    siginfo_t info = {.si_signo = SIGCHLD, .si_code = CLD_EXITED}; /* as only the kernel sends */
    info.si_uid = 77;
    CHECK(syscall(SYS_rt_sigqueueinfo, getpid(), SIGCHLD, &info));
    uint64_t pending = 0;
    while (!(pending >> (SIGRTMIN + 4 - 1) & 1)) /* until timer 152 has fired */
        CHECK(syscall(SYS_rt_sigpending, &pending, 8));
}

static void set_up_credentials(void)
{
    gid_t groups[] = {7, 100, 65000};
    CHECK(setgroups(3, groups));
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    uint32_t bind = 1 << CAP_NET_BIND_SERVICE, chown = 1 << CAP_CHOWN, pcap = 1 << CAP_SETPCAP;
    struct __user_cap_data_struct sets[2];
    CHECK(syscall(SYS_capget, &header, sets));
    sets[0].inheritable = bind | chown | 1U << 31; /* the last will be outside the bounding set */
    CHECK(syscall(SYS_capset, &header, sets));
    for (int cap = 30; cap < 36; cap++)
        CHECK(prctl(PR_CAPBSET_DROP, cap, 0, 0, 0));
    CHECK(prctl(PR_SET_SECUREBITS, 1 << 2, 0, 0, 0)); /* capabilities survive setresuid */
    CHECK(setresgid(2001, 2002, 2003));
    CHECK(setresuid(1001, 1002, 1003));
    sets[0].effective = bind | pcap, sets[0].permitted = bind | chown | pcap;
    sets[1] = (struct __user_cap_data_struct){0, 0, 0};
    CHECK(syscall(SYS_capset, &header, sets));
    CHECK(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_NET_BIND_SERVICE, 0, 0));
    CHECK(prctl(PR_SET_SECUREBITS, 1 << 2 | 1 << 6, 0, 0, 0)); /* no ambient raise any more */
    sets[0].effective = bind, sets[0].permitted = bind | chown;
    CHECK(syscall(SYS_capset, &header, sets));
    CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    CHECK(prctl(PR_SET_DUMPABLE, 1, 0, 0, 0));
    CHECK(prctl(PR_SET_PDEATHSIG, SIGWINCH, 0, 0, 0));
}

static void ask_workers(void)
{
    char byte;
    for (int index = 1; index <= WORKERS; index++) {
        say(", ");
        if (write(ask[index][1], "x", 1) != 1 || read(done[0], &byte, 1) != 1)
            exit(1);
    }
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    if (!(personality(0xffffffff) & ADDR_NO_RANDOMIZE)) {
        CHECK(personality(ADDR_NO_RANDOMIZE));
        CHECK(execv("/proc/self/exe", argv));
    }
    mode = argv[1], directory = argv[2];
    uint64_t all = ~0UL & ~(1UL << (SIGUSR1 - 1)) & ~(1UL << (SIGWINCH - 1));
    if (!strcmp(mode, "state"))
        CHECK(syscall(SYS_rt_sigprocmask, SIG_SETMASK, &all, NULL, 8));
    CHECK(pipe(done));
    if (!strcmp(mode, "creds"))
        set_up_credentials(); /* before the threads, which inherit it */
    for (int index = 1; index <= WORKERS; index++) {
        pthread_t thread;
        char byte;
        CHECK(pipe(ask[index]));
        CHECK(-pthread_create(&thread, NULL, worker, (void *)(long)index));
        CHECK(read(done[0], &byte, 1));
    }
    if (!strcmp(mode, "state"))
        set_up_process();
    puts("ready");
    fflush(stdout);
    char line[64];
    while (fgets(line, sizeof line, stdin)) {
        used = 0;
        command = line[0];
        say("{");
        if (command == 'q')
            break;
        if (command == 'r') {
            report_process();
            say(", \"threads\": [");
            report_thread(0);
            ask_workers();
        }
        if (command == 'd') {
            say("\"threads\": [");
            drain_thread(0);
            ask_workers();
        }
        say("]}");
        puts(text);
        fflush(stdout);
    }
    return 0;
}
