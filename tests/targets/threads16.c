/* threads16: sixteen threads, each living on something that a snapshot must not disturb: locks,
 * registers, signals, timers, system calls that wait. Each checks what it sees and counts its
 * rounds; a lost wake-up shows as a counter that stands still.
 *
 * All signals but those of `ticking` are blocked everywhere, so an EINTR elsewhere is nobody's: a fault,
 * but with --eintr 1 one of epoll_wait is counted, in values[3]. */
#define _GNU_SOURCE
#include "victim.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { MAIN, PRODUCE, CONSUME, BARRIER_A, BARRIER_B, BARRIER_C, SSE, AVX, AVX512, GENERAL, TICK,
       SLEEP, POLL, READ, EPOLL, FUTEX, THREADS };

#define KEPT_SIGNAL (SIGRTMIN + 5)
#define TIMER_SIGNAL (SIGRTMIN + 6)
#define SPIN 1000000UL          /* turns of a loop in which registers hold their values: ~ms */

/* --- locks: a bounded queue, and a barrier ------------------------------------------------------ */
static pthread_mutex_t queue_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t queue_moved = PTHREAD_COND_INITIALIZER;
static uint64_t queue[16], queue_in, queue_out;

static void *produce(void *unused)
{
    for (uint64_t n = 0;; n++) {
        pthread_mutex_lock(&queue_lock);
        while (queue_in - queue_out == 16)
            pthread_cond_wait(&queue_moved, &queue_lock);
        queue[queue_in++ % 16] = mix(n + 1);
        pthread_cond_broadcast(&queue_moved);
        pthread_mutex_unlock(&queue_lock);
        progress[PRODUCE]++;
        if (n % 16 == 0)
            sleep_ms(1);
    }
    return unused;
}

static void *consume(void *unused)
{
    for (uint64_t n = 0;; n++) {
        pthread_mutex_lock(&queue_lock);
        while (queue_in == queue_out)
            pthread_cond_wait(&queue_moved, &queue_lock);
        if (queue_out != n || queue[queue_out % 16] != mix(n + 1))
            fault("queue: item %llu is wrong", (unsigned long long)n);
        queue_out++;
        pthread_cond_broadcast(&queue_moved);
        pthread_mutex_unlock(&queue_lock);
        progress[CONSUME]++;
    }
    return unused;
}

static pthread_barrier_t barrier;
static _Atomic uint64_t arrived;
static __thread uint64_t local[512];
static __thread int local_value = 42;

static void *meet(void *argument)
{
    size_t self = (size_t)argument;

    fill(local, 512, self + 1000);
    local_value = (int)self;
    for (uint64_t round = 1;; round++) {
        atomic_fetch_add(&arrived, 1);
        errno = (int)self;
        pthread_barrier_wait(&barrier);
        if (arrived < 3 * round)
            fault("barrier: thread %zu went ahead in round %llu", self, (unsigned long long)round);
        if (errno != (int)self || local_value != (int)self || wrong(local, 512, self + 1000) != 512)
            fault("thread %zu: thread-local values changed", self);
        pthread_barrier_wait(&barrier);
        progress[self]++;
        if (self == BARRIER_A && round % 4 == 0) {
            cpu_set_t set;
            int cpu = (int)(round / 4 % (uint64_t)sysconf(_SC_NPROCESSORS_ONLN));
            CPU_ZERO(&set);
            CPU_SET(cpu, &set);
            if (sched_setaffinity(0, sizeof set, &set) == 0) {
                /* glibc answers this from its rseq area: stale when the kernel lost it */
                for (int i = 0; i < 100; i++)
                    if (sched_getcpu() != cpu)
                        fault("sched_getcpu says %d on CPU %d: rseq is lost", sched_getcpu(), cpu);
            }
            sleep_ms(1);
        }
    }
    return NULL;
}

/* --- registers: values that live in them through a long loop ------------------------------------- */
#define LOOP "1: dec %[turns]\n\t jnz 1b\n\t"
#define EACH16(m) m(0) m(1) m(2) m(3) m(4) m(5) m(6) m(7) m(8) m(9) m(10) m(11) m(12) m(13) m(14) \
    m(15)
#define HIGH16(m) m(16) m(17) m(18) m(19) m(20) m(21) m(22) m(23) m(24) m(25) m(26) m(27) m(28) \
    m(29) m(30) m(31)
#define XMM_IN(i) "movdqu " #i "*16(%[in]), %%xmm" #i "\n\t"
#define XMM_OUT(i) "movdqu %%xmm" #i ", " #i "*16(%[out])\n\t"
#define YMM_IN(i) "vmovdqu " #i "*32(%[in]), %%ymm" #i "\n\t"
#define YMM_OUT(i) "vmovdqu %%ymm" #i ", " #i "*32(%[out])\n\t"
#define ZMM_IN(i) "vmovdqu64 " #i "*64(%[in]), %%zmm" #i "\n\t"
#define ZMM_OUT(i) "vmovdqu64 %%zmm" #i ", " #i "*64(%[out])\n\t"
#define XMM_CLOBBER "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", \
    "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"

static void hold_sse(const void *in, void *out, uint64_t turns)
{
    asm volatile(EACH16(XMM_IN) LOOP EACH16(XMM_OUT)
                 : [turns] "+r"(turns) : [in] "r"(in), [out] "r"(out)
                 : "memory", "cc", XMM_CLOBBER);
}

__attribute__((target("avx"))) static void hold_avx(const void *in, void *out, uint64_t turns)
{
    asm volatile(EACH16(YMM_IN) LOOP EACH16(YMM_OUT) "vzeroupper\n\t"
                 : [turns] "+r"(turns) : [in] "r"(in), [out] "r"(out)
                 : "memory", "cc", XMM_CLOBBER);
}

#define K_IN(i) "kmovq 2048+" #i "*8(%[in]), %%k" #i "\n\t"
#define K_OUT(i) "kmovq %%k" #i ", 2048+" #i "*8(%[out])\n\t"
#define EACH7(m) m(1) m(2) m(3) m(4) m(5) m(6) m(7)

__attribute__((target("avx512f,avx512bw")))
static void hold_avx512(const void *in, void *out, uint64_t turns)
{
    asm volatile(EACH16(ZMM_IN) HIGH16(ZMM_IN) EACH7(K_IN) LOOP EACH16(ZMM_OUT) HIGH16(ZMM_OUT)
                 EACH7(K_OUT) "vzeroupper\n\t"
                 : [turns] "+r"(turns) : [in] "r"(in), [out] "r"(out)
                 : "memory", "cc", XMM_CLOBBER, "xmm16", "xmm17", "xmm18", "xmm19", "xmm20",
                   "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29",
                   "xmm30", "xmm31", "k1", "k2", "k3", "k4", "k5", "k6", "k7");
}

struct held { void (*hold)(const void *, void *, uint64_t); size_t bytes, lane; };

static void *hold_vectors(void *argument)
{
    const struct held *held = argument;
    uint64_t in[264], out[264];
    /* rounding towards zero, and the x87 at single precision: control words are state too */
    uint32_t mxcsr = 0x1f80 | 0x6000, found;
    uint16_t control = 0x007f, control_found;

    asm volatile("ldmxcsr %0\n\t fldcw %1\n\t fldpi\n\t fld1" : : "m"(mxcsr), "m"(control));
    for (uint64_t round = 0;; round++) {
        fill(in, 264, round * 31 + held->lane);
        memset(out, 0, sizeof out);
        held->hold(in, out, SPIN);
        /* avx512: slot 256 would be k0, which cannot be a mask and is not held */
        out[256] = in[256];
        if (memcmp(in, out, held->bytes) != 0)
            fault("vector registers of thread %zu changed in round %llu", held->lane,
                  (unsigned long long)round);
        asm volatile("stmxcsr %0\n\t fnstcw %1" : "=m"(found), "=m"(control_found));
        if ((found & 0xffc0) != (mxcsr & 0xffc0) || control_found != control)
            fault("mxcsr %#x or x87 control %#x changed in thread %zu", found, control_found,
                  held->lane);
        uint64_t one, top;
        asm volatile("fstl %0\n\t fxch\n\t fstl %1\n\t fxch" : "=m"(one), "=m"(top));
        if (one != 0x3ff0000000000000ULL || top >> 32 != 0x400921fbULL)
            fault("x87 stack changed in thread %zu: %#llx %#llx", held->lane,
                  (unsigned long long)one, (unsigned long long)top);
        progress[held->lane]++;
        sleep_ms(2); /* or the machine is ours: see main */
    }
    return NULL;
}

static void *hold_general(void *unused)
{
    for (uint64_t round = 0;; round++) {
        uint64_t in[10], out[10];
        uint64_t turns = SPIN, flags = 0;
        fill(in, 10, round + 5);
        memset(out, 0, sizeof out);
        asm volatile("mov (%[in]), %%r8\n\t mov 8(%[in]), %%r9\n\t mov 16(%[in]), %%r10\n\t"
                     "mov 24(%[in]), %%r11\n\t mov 32(%[in]), %%r12\n\t mov 40(%[in]), %%r13\n\t"
                     "mov 48(%[in]), %%r14\n\t mov 56(%[in]), %%r15\n\t"
                     /* a carry that nothing in the loop touches: dec leaves CF alone */
                     "stc\n\t" LOOP "setc %b[flags]\n\t"
                     "mov %%r8, (%[out])\n\t mov %%r9, 8(%[out])\n\t mov %%r10, 16(%[out])\n\t"
                     "mov %%r11, 24(%[out])\n\t mov %%r12, 32(%[out])\n\t mov %%r13, 40(%[out])\n\t"
                     "mov %%r14, 48(%[out])\n\t mov %%r15, 56(%[out])\n\t"
                     : [turns] "+a"(turns), [flags] "+d"(flags)
                     : [in] "S"(in), [out] "D"(out)
                     : "memory", "cc", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15");
        if (memcmp(in, out, 64) != 0 || flags != 1)
            fault("general registers changed in round %llu", (unsigned long long)round);
        progress[GENERAL]++;
        sleep_ms(2);
    }
    return unused;
}

/* --- signals on an alternate stack ---------------------------------------------------------------- */
static char alternate[64 * 1024] __attribute__((aligned(16)));
static _Atomic uint64_t alarms, timer_ticks;

static void on_tick(int signal, siginfo_t *info, void *context)
{
    char here;
    int saved = errno;

    (void)context;
    if (&here < alternate || &here >= alternate + sizeof alternate)
        fault("signal %d is not handled on the alternate stack", signal);
    if (signal == SIGALRM)
        alarms++;
    else if (info->si_code != SI_TIMER || info->si_value.sival_int != 4711)
        fault("timer signal: code %d value %d", info->si_code, info->si_value.sival_int);
    else
        timer_ticks++;
    errno = saved;
}

static void *tick(void *unused)
{
    stack_t stack = { .ss_sp = alternate, .ss_size = sizeof alternate };
    struct sigaction action = { .sa_sigaction = on_tick,
                                .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART };
    struct itimerval every = { { 0, 1000 }, { 0, 1000 } };
    struct itimerspec third = { { 0, 3000000 }, { 0, 3000000 } };
    struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = TIMER_SIGNAL,
                              .sigev_value = { .sival_int = 4711 } };
    sigset_t all, waiting;
    timer_t timer;

    sigfillset(&all);
    waiting = all;
    sigdelset(&waiting, SIGALRM);
    sigdelset(&waiting, TIMER_SIGNAL);
    must(sigaltstack(&stack, NULL) == 0, "sigaltstack");
    must(sigaction(SIGALRM, &action, NULL) == 0, "sigaction");
    must(sigaction(TIMER_SIGNAL, &action, NULL) == 0, "sigaction");
    must(timer_create(CLOCK_MONOTONIC, &event, &timer) == 0, "timer_create");
    must(timer_settime(timer, 0, &third, NULL) == 0, "timer_settime");
    must(setitimer(ITIMER_REAL, &every, NULL) == 0, "setitimer");
    for (;;) {
        uint64_t alarms_before = alarms, ticks_before = timer_ticks;
        /* both timers go on: neither may be lost for a second's worth of the other */
        for (int n = 0; n < 4000 && (alarms == alarms_before || timer_ticks == ticks_before); n++)
            if (sigsuspend(&waiting) != -1 || errno != EINTR)
                fault("sigsuspend: %s", strerror(errno));
        if (alarms == alarms_before || timer_ticks == ticks_before)
            fault("a timer is lost: %llu alarms, %llu ticks", (unsigned long long)alarms,
                  (unsigned long long)timer_ticks);
        progress[TICK]++;
    }
    return unused;
}

/* --- system calls that wait ------------------------------------------------------------------------ */
static int read_pipe[2], poll_pipe[2], wake_event, wake_epoll;
static _Atomic uint32_t futex_word;
static _Atomic uint64_t event_sum;

static void *sleeping(void *unused)
{
    for (;;) {
        sleep_ms(200);
        progress[SLEEP]++;
    }
    return unused;
}

static void *polling(void *unused)
{
    for (;;) {
        struct pollfd on = { poll_pipe[0], POLLIN, 0 };
        uint64_t before = now_ns();
        int result = poll(&on, 1, 150);
        if (result != 0)
            fault("poll: %d %s", result, result < 0 ? strerror(errno) : "without cause");
        else if (now_ns() - before < 149000000ULL)
            fault("poll came back too early");
        progress[POLL]++;
    }
    return unused;
}

static void *reading(void *unused)
{
    for (uint64_t expected = 0, got;; expected++) {
        ssize_t size = read(read_pipe[0], &got, sizeof got);
        if (size != sizeof got)
            fault("read from a pipe: %zd %s", size, strerror(errno));
        else if (got != expected)
            fault("pipe: item %llu instead of %llu", (unsigned long long)got,
                  (unsigned long long)expected);
        progress[READ]++;
    }
    return unused;
}

static void *in_epoll(void *unused)
{
    for (uint64_t sum = 0, count;;) {
        struct epoll_event event;
        int result = epoll_wait(wake_epoll, &event, 1, -1);
        if (result < 0 && errno == EINTR && option("eintr", 0)) {
            values[3]++;
            publish();
            continue;
        }
        if (result != 1 || event.data.u64 != 0xfeedfacecafeULL) {
            fault("epoll_wait: %d %s", result, strerror(errno));
            continue;
        }
        if (read(wake_event, &count, sizeof count) != sizeof count)
            fault("eventfd: %s", strerror(errno));
        sum += count;
        if (sum > event_sum)
            fault("eventfd: %llu came out of %llu", (unsigned long long)sum,
                  (unsigned long long)event_sum);
        progress[EPOLL]++;
    }
    return unused;
}

static void *in_futex(void *unused)
{
    for (uint32_t seen = 0;;) {
        long result = syscall(SYS_futex, &futex_word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
        if (result != 0 && errno != EAGAIN)
            fault("futex: %s", strerror(errno));
        uint32_t now = futex_word;
        if (now != seen)
            progress[FUTEX]++;
        seen = now;
    }
    return unused;
}

/* --- the main thread: descriptors, a pending signal, and waking the others --------------------------- */
static int backlog[2], counter, timer_fd, signal_fd, memory_fd, log_fd, plain, duplicate;
static char *directory;

static void open_descriptors(void)
{
    char path[512];
    uint64_t pattern[128];
    struct itimerspec often = { { 0, 5000000 }, { 0, 5000000 } };
    sigset_t set;

    must(pipe2(read_pipe, O_CLOEXEC) == 0 && pipe2(poll_pipe, 0) == 0 &&
         pipe2(backlog, O_NONBLOCK) == 0, "pipe");
    fill(pattern, 128, 9);
    must(write(backlog[1], pattern, sizeof pattern) == sizeof pattern, "the backlog");
    wake_event = eventfd(0, EFD_CLOEXEC);
    wake_epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = { EPOLLIN, { .u64 = 0xfeedfacecafeULL } };
    must(epoll_ctl(wake_epoll, EPOLL_CTL_ADD, wake_event, &event) == 0, "epoll");
    counter = eventfd(7, EFD_NONBLOCK);
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    must(timerfd_settime(timer_fd, 0, &often, NULL) == 0, "timerfd");
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    signal_fd = signalfd(-1, &set, SFD_NONBLOCK);
    memory_fd = memfd_create("threads16", 0);
    must(write(memory_fd, pattern, sizeof pattern) == sizeof pattern, "memfd");
    snprintf(path, sizeof path, "%s.log", option_text("status", "/tmp/threads16"));
    log_fd = open(path, O_WRONLY | O_CREAT | O_APPEND, 0600);
    snprintf(path, sizeof path, "%s.plain", option_text("status", "/tmp/threads16"));
    plain = open(path, O_RDWR | O_CREAT, 0600);
    duplicate = dup(plain);
    must(log_fd >= 0 && plain >= 0 && duplicate >= 0 && signal_fd >= 0, "files");
    must(write(plain, pattern, sizeof pattern) == sizeof pattern, "a file");
    directory = getcwd(NULL, 0);
    union sigval value = { .sival_int = 0 };
    must(sigqueue(getpid(), KEPT_SIGNAL, value) == 0, "sigqueue");
}

static void check_descriptors(uint64_t round)
{
    uint64_t eight[8], value = 7;

    /* the pipe that is never empty: eight words out, the next eight in */
    if (read(backlog[0], eight, sizeof eight) != sizeof eight)
        fault("backlog: %s", strerror(errno));
    for (unsigned i = 0; i < 8; i++) {
        uint64_t index = round * 8 + i;
        if (eight[i] != mix(9 * 0x9e3779b97f4a7c15ULL + index + 1))
            fault("backlog: word %llu is wrong", (unsigned long long)index);
        eight[i] = mix(9 * 0x9e3779b97f4a7c15ULL + index + 128 + 1);
    }
    if (write(backlog[1], eight, sizeof eight) != sizeof eight)
        fault("backlog: %s", strerror(errno));

    if (read(counter, &value, sizeof value) != sizeof value || value != 7)
        fault("eventfd holds %llu instead of 7", (unsigned long long)value);
    value = 7;
    if (write(counter, &value, sizeof value) != sizeof value)
        fault("eventfd: %s", strerror(errno));

    if (read(timer_fd, &value, sizeof value) == sizeof value)
        values[1] += value;
    else if (errno != EAGAIN)
        fault("timerfd: %s", strerror(errno));
    if (round % 100 == 99) {
        if (values[1] == values[2])
            fault("the timerfd stands still");
        values[2] = values[1];
    }

    struct signalfd_siginfo info;
    if (kill(getpid(), SIGUSR2) != 0 || read(signal_fd, &info, sizeof info) != sizeof info ||
        info.ssi_signo != SIGUSR2 || info.ssi_pid != (uint32_t)getpid())
        fault("signalfd: %s", strerror(errno));

    if (pread(memory_fd, eight, sizeof eight, 64) != sizeof eight ||
        eight[0] != mix(9 * 0x9e3779b97f4a7c15ULL + 8 + 1))
        fault("the memfd changed");
    off_t at = (off_t)(round % 100) * 8;
    if (lseek(plain, at, SEEK_SET) != at || read(duplicate, eight, 8) != 8 ||
        lseek(plain, 0, SEEK_CUR) != at + 8)
        fault("the file's duplicate has an offset of its own");
    if (eight[0] != mix(9 * 0x9e3779b97f4a7c15ULL + round % 100 + 1))
        fault("the file's offset is wrong");
    if (dprintf(log_fd, "%llu\n", (unsigned long long)round) < 0 ||
        !(fcntl(log_fd, F_GETFL) & O_APPEND) || fcntl(wake_epoll, F_GETFD) != FD_CLOEXEC ||
        fcntl(plain, F_GETFD) != 0)
        fault("descriptor flags changed");

    char now[512];
    if (!getcwd(now, sizeof now) || strcmp(now, directory) != 0)
        fault("the working directory is %s", now);
    if (umask(027) != 027)
        fault("the umask changed");
}

static void check_pending(uint64_t round)
{
    struct timespec none = { 0, 0 };
    sigset_t kept, pending;
    siginfo_t info;

    sigemptyset(&kept);
    sigaddset(&kept, KEPT_SIGNAL);
    sigpending(&pending);
    if (!sigismember(&pending, KEPT_SIGNAL) ||
        sigtimedwait(&kept, &info, &none) != KEPT_SIGNAL ||
        info.si_value.sival_int != (int)round || info.si_code != SI_QUEUE)
        fault("the pending signal of round %llu is lost", (unsigned long long)round);
    union sigval value = { .sival_int = (int)round + 1 };
    if (sigqueue(getpid(), KEPT_SIGNAL, value) != 0)
        fault("sigqueue: %s", strerror(errno));
}

static void start(void *(*body)(void *), void *argument, const char *name)
{
    pthread_t thread;
    must(pthread_create(&thread, NULL, body, argument) == 0, "pthread_create");
    pthread_setname_np(thread, name);
}

int main(int argc, char **argv)
{
    static const struct held sse = { hold_sse, 256, SSE };
    static struct held avx = { hold_sse, 256, AVX }, avx512 = { hold_sse, 256, AVX512 };
    sigset_t all;

    sigfillset(&all);
    sigdelset(&all, SIGTERM);
    sigdelset(&all, SIGINT);
    sigprocmask(SIG_BLOCK, &all, NULL);
    umask(027);
    /* A dozen threads that never sleep starve a small machine, whatever their priority (measured on
     * two CPUs: 0.2 s of work of another session took 47 s), so the busy ones rest between rounds. */
    victim_start(argc, argv);
    victim_lanes(THREADS);
    if (__builtin_cpu_supports("avx"))
        avx = (struct held){ hold_avx, 512, AVX };
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw"))
        avx512 = (struct held){ hold_avx512, 2112, AVX512 };
    values[0] = avx512.bytes;
    open_descriptors();
    pthread_barrier_init(&barrier, NULL, 3);
    start(produce, NULL, "produce");
    start(consume, NULL, "consume");
    start(meet, (void *)BARRIER_A, "barrier-a");
    start(meet, (void *)BARRIER_B, "barrier-b");
    start(meet, (void *)BARRIER_C, "barrier-c");
    start(hold_vectors, (void *)&sse, "sse");
    start(hold_vectors, &avx, "avx");
    start(hold_vectors, &avx512, "avx512");
    start(hold_general, NULL, "general");
    start(tick, NULL, "tick");
    start(sleeping, NULL, "sleep");
    start(polling, NULL, "poll");
    start(reading, NULL, "read");
    start(in_epoll, NULL, "epoll");
    start(in_futex, NULL, "futex");
    victim_ready();
    for (uint64_t round = 0;; round++) {
        uint64_t one = 1;
        check_descriptors(round);
        check_pending(round);
        if (write(read_pipe[1], &round, sizeof round) != sizeof round)
            fault("writing to a pipe: %s", strerror(errno));
        event_sum++;
        if (write(wake_event, &one, sizeof one) != sizeof one)
            fault("writing to an eventfd: %s", strerror(errno));
        futex_word++;
        syscall(SYS_futex, &futex_word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
        progress[MAIN]++;
        publish();
        sleep_ms(10);
    }
}
