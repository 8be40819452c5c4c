/* Threads that end without having written anything for a while: what the kernel clears at their end
 * (clear_child_tid, set_tid_address(2)), and wakes who joins them, is the first write to its page since
 * that was protected. At SIGUSR1 all end and are joined; then there are new ones.
 *
 * --threads N   4
 * --common 1    one thread, and the word of all threads is the same and no thread has a robust list, as in
 *               a program of musl
 * --robust 1    each holds a robust mutex that it has locked long ago, and main is told that its owner died
 * --late 1      they have no robust list until SIGUSR2, and write once more to their own data then, as a thread
 *               does that has just been born
 * --mib N       filled memory beside it, 8 */
#define _GNU_SOURCE
#include "victim.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PATIENCE 10 /* s */
#define MOST 64

static _Atomic unsigned generation; /* those of an earlier one end */
static _Atomic unsigned begun;
static uint32_t word[PAGE / 4 * 2] __attribute__((aligned(4096)));
static long common, robust, late;
static _Atomic unsigned told, ready; /* for `late` */
static struct {
    pthread_mutex_t mutex;
} __attribute__((aligned(4096))) held[MOST];

static void common_word(void)
{
    syscall(SYS_set_tid_address, word);
    must(!syscall(SYS_set_robust_list, NULL, 24), "set_robust_list");
}

/* Begins to be a thread that others can know, when it is told. */
static void wait_without_list(void)
{
    void **head;
    size_t length;
    must(!syscall(SYS_get_robust_list, 0, &head, &length), "get_robust_list");
    must(!syscall(SYS_set_robust_list, NULL, length), "set_robust_list");
    begun++;
    while (!atomic_load_explicit(&told, memory_order_relaxed))
        __builtin_ia32_pause();
    *(void *volatile *)head = *head;
    must(!syscall(SYS_set_robust_list, head, length), "set_robust_list");
    ready++;
}

/* The kernel would write to the restartable sequence of a thread whenever it has not run for a moment. */
static void without_rseq(char **argv)
{
    if (getenv("GLIBC_TUNABLES"))
        return;
    setenv("GLIBC_TUNABLES", "glibc.pthread.rseq=0", 1);
    execv("/proc/self/exe", argv);
    must(false, "execv");
}

/* Writes nothing, not even to its stack, until it ends; pthread_exit would. */
static void *last(void *argument)
{
    unsigned mine = generation;
    if (common)
        common_word();
    if (robust)
        must(!pthread_mutex_lock(argument), "pthread_mutex_lock");
    if (late)
        wait_without_list();
    else
        begun++;
    while (atomic_load_explicit(&generation, memory_order_relaxed) == mine)
        __builtin_ia32_pause();
    __asm__ volatile("syscall" ::"a"(SYS_exit), "D"(0) : "rcx", "r11", "memory");
    return NULL;
}

static void begin(pthread_t *threads, long count)
{
    begun = told = ready = 0;
    word[0] = 1;
    pthread_mutexattr_t kind;
    pthread_mutexattr_init(&kind);
    pthread_mutexattr_setrobust(&kind, PTHREAD_MUTEX_ROBUST);
    for (long i = 0; i < count; i++) {
        pthread_mutex_init(&held[i].mutex, &kind);
        must(!pthread_create(&threads[i], NULL, last, &held[i].mutex), "pthread_create");
    }
    while (begun < count)
        sched_yield();
}

static bool is_cleared(void)
{
    const struct timespec patience = {PATIENCE, 0};
    volatile uint32_t *seen = word;
    while (*seen)
        if (syscall(SYS_futex, word, FUTEX_WAIT, 1, &patience) && *seen)
            return false;
    return true;
}

static struct timespec soon(void)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += PATIENCE;
    return until;
}

static bool is_inherited(pthread_mutex_t *mutex)
{
    const struct timespec until = soon();
    return pthread_mutex_timedlock(mutex, &until) == EOWNERDEAD && !pthread_mutex_consistent(mutex) &&
           !pthread_mutex_unlock(mutex);
}

static bool is_joined(pthread_t thread)
{
    const struct timespec until = soon();
    return !pthread_timedjoin_np(thread, NULL, &until);
}

int main(int argc, char **argv)
{
    without_rseq(argv);
    victim_start(argc, argv);
    sigset_t asked = block_usr1();
    sigaddset(&asked, SIGUSR2);
    must(!pthread_sigmask(SIG_BLOCK, &asked, NULL), "pthread_sigmask");
    long count = option("threads", 4), mib = option("mib", 8);
    must(count <= MOST, "--threads");
    common = option("common", 0);
    robust = option("robust", 0);
    late = option("late", 0);
    count = common ? 1 : count;
    if (common)
        common_word();
    char *memory = mmap(NULL, (size_t)mib * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(memory != MAP_FAILED, "mmap");
    memset(memory, 7, (size_t)mib * MIB);
    victim_lanes(1);
    pthread_t threads[MOST];
    begin(threads, count);
    publish();
    victim_ready();
    for (;;) {
        const struct timespec moment = {0, 20000000};
        int what = sigtimedwait(&asked, NULL, &moment);
        if (what == SIGUSR2) {
            told = 1;
            while (ready < count)
                sched_yield();
            values[0]++;
        }
        if (what == SIGUSR1) {
            told = 1;
            generation++;
            for (long i = 0; robust && i < count; i++)
                if (!is_inherited(&held[i].mutex))
                    fault("nobody was told that mutex %ld has no owner any more", i);
            for (long i = 0; i < count; i++)
                if (common ? !is_cleared() : !is_joined(threads[i]))
                    fault("thread %ld has ended, and nobody was told", i);
            begin(threads, count);
            verified();
        }
        progress[0]++;
        publish();
    }
}
