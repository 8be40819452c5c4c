/* pages: the target of the bench. Memory of 4 KiB pages (of 2 MiB with --huge 1), and threads that tell what they felt.
 *
 *   --mib M  --fill mixed|random|zeros  --huge 0|1  --commands PATH  --answer PATH
 *
 * SIGUSR1: the line in the file `--commands` is carried out, the answer (JSON) put in its place:
 *   clock 0|1           a thread that does nothing but read the clock
 *   writers N RATE      N threads write to pages at random, RATE a second in all (0: without pause)
 *   sleepers N          threads that sleep in futex(2)
 *   touch RATE          a thread that reads one page at random RATE times a second, and times it
 *   rewrite PERMILLE N  so many of the pages get other content, N of them in a row
 *   collapse            what of the memory is in pages of 4 KiB becomes huge pages again
 *   fork                forks; the child ends at once
 *   fork-save PATH      forks; the child writes all of the memory to PATH
 *   mark                gaps and touches count from here on
 *   report              what all threads have felt since
 *   exit */
#define _GNU_SOURCE
#include "lanes.h"
#include "victim.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define WRITERS 8
#define TOUCHES (1 << 20)
#define WORDS (PAGE / 8)
#define HUGE ((size_t)2 << 20)
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25        /* Linux 6.1 */
#endif
#define STEP_NS 2000000UL       /* writers and touches that have a rate keep it every so often */
#define SMALL_STACK (64 * 1024)

struct touch { uint64_t at, ns; };

static uint64_t *memory;
static size_t page_count;
static struct lane clock_lane;  /* all zeros: not in .data, which is the file's, and copied in the pause */
static struct lane writer_lanes[WRITERS];
static struct touch *touches;
static _Atomic uint64_t touch_count;
static uint64_t touches_marked, generation;
static _Atomic long clocks_wanted, writers_wanted, write_rate, touch_rate;
static long writers_started, sleepers;
static bool clock_started, touch_started;
static pthread_mutex_t never = PTHREAD_MUTEX_INITIALIZER;

static void start(void *(*run)(void *), void *argument)
{
    pthread_attr_t attributes;
    pthread_t thread;

    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, SMALL_STACK);
    must(pthread_create(&thread, &attributes, run, argument) == 0, "pthread_create");
    pthread_attr_destroy(&attributes);
}

static void sleep_until(uint64_t ns)
{
    struct timespec t = { (time_t)(ns / 1000000000UL), (long)(ns % 1000000000UL) };
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR)
        ;
}

static void *read_clock(void *unused)
{
    (void)unused;
    for (;;) {
        uint64_t last = now_ns();
        while (clocks_wanted) {
            last = lane_round(&clock_lane, last);
            clock_lane.operations++;
        }
        sleep_ms(5);
    }
    return NULL;
}

static void *write_pages(void *argument)
{
    size_t self = (size_t)argument;
    struct lane *lane = &writer_lanes[self];
    uint64_t random = mix(self + 77);

    prctl(PR_SET_TIMERSLACK, 1);
    for (;;) {
        while ((long)self >= writers_wanted)
            sleep_ms(5);
        uint64_t begin = now_ns(), due = begin, written = 0;
        while ((long)self < writers_wanted) {
            random += 0x9e3779b97f4a7c15ULL;
            uint64_t where = mix(random);
            memory[where % page_count * WORDS + (where >> 55)] = random;
            begin = lane_round(lane, begin);
            lane->operations++;
            long rate = write_rate, threads = writers_wanted;
            if (rate && threads && ++written >= (uint64_t)rate * STEP_NS / 1000000000UL / (uint64_t)threads) {
                written = 0;
                due = due + STEP_NS + 50 * STEP_NS < begin ? begin : due + STEP_NS;
                sleep_until(due);
                begin = now_ns();
            }
        }
    }
    return NULL;
}

static void *touch_pages(void *unused)
{
    uint64_t random = 99, due = now_ns();

    (void)unused;
    prctl(PR_SET_TIMERSLACK, 1);
    for (;;) {
        long rate = touch_rate;
        if (!rate) {
            sleep_ms(5);
            due = now_ns();
            continue;
        }
        due += 1000000000UL / (uint64_t)rate;
        if (due + 1000000000UL < now_ns())
            due = now_ns();
        sleep_until(due);
        random += 0x9e3779b97f4a7c15ULL;
        volatile uint64_t *page = memory + mix(random) % page_count * WORDS;
        uint64_t begin = now_ns();
        (void)*page;
        uint64_t end = now_ns(), at = touch_count;
        touches[at % TOUCHES] = (struct touch){ begin, end - begin };
        touch_count = at + 1;
    }
    return NULL;
}

static void *sleep_for_ever(void *unused)
{
    pthread_mutex_lock(&never);
    return unused;
}

/* About a third of what a heap with pointers, small numbers and text takes under zstd -1. */
static void fill_page(size_t page, uint64_t key, const char *how)
{
    uint64_t *at = memory + page * WORDS;

    if (strcmp(how, "zeros") == 0) {
        memset(at, 0, PAGE);
        return;
    }
    fill(at, WORDS, mix(key + page));
    if (strcmp(how, "random") == 0)
        return;
    for (size_t i = 0; i < WORDS; i++)
        if (i % 4)
            at[i] = i % 4 == 1 ? at[i] & 0xff : 0x00007f0000000000UL + (i % 64) * 16;
}

static void rewrite(size_t permille, size_t run)
{
    generation++;
    for (size_t first = 0; permille && run && first < page_count; first += run * 1000 / permille)
        for (size_t page = first; page < first + run && page < page_count; page++)
            fill_page(page, generation << 32, option_text("fill", "mixed"));
}

/* -> how long fork(2) kept its caller, in ns */
static uint64_t fork_and(const char *path)
{
    uint64_t begin = now_ns();
    pid_t child = fork();
    uint64_t end = now_ns();

    must(child >= 0, "fork");
    if (child)
        return end - begin;
    if (path) {
        int to = open(path, O_WRONLY | O_CLOEXEC);
        const char *from = (const char *)memory;
        for (size_t left = to < 0 ? 0 : page_count * PAGE; left;) {
            ssize_t done = write(to, from, left < MIB ? left : MIB);
            if (done <= 0)
                _exit(1);
            from += done;
            left -= (size_t)done;
        }
    }
    _exit(0);
}

static void report(FILE *to)
{
    uint64_t last = touch_count, first = touches_marked;

    if (last - first > TOUCHES)
        first = last - TOUCHES;
    fprintf(to, "\"lanes\": [");
    lane_print(&clock_lane, to);
    for (long i = 0; i < writers_started; i++) {
        fprintf(to, ", ");
        lane_print(&writer_lanes[i], to);
    }
    fprintf(to, "], \"touches\": [");
    for (uint64_t i = first; i < last; i++)
        fprintf(to, "%s[%llu, %llu]", i == first ? "" : ", ",
                (unsigned long long)touches[i % TOUCHES].at,
                (unsigned long long)touches[i % TOUCHES].ns);
    fprintf(to, "], ");
}

static void mark(void)
{
    lane_mark(&clock_lane);
    for (long i = 0; i < writers_started; i++)
        lane_mark(&writer_lanes[i]);
    touches_marked = touch_count;
}

static void set_writers(long count, long rate)
{
    must(count >= 0 && count <= WRITERS, "writers");
    write_rate = rate;
    writers_wanted = count;
    for (; writers_started < count; writers_started++) {
        writer_lanes[writers_started].name = "writer";
        start(write_pages, (void *)writers_started);
    }
}

static void carry_out(const char *command, FILE *answer)
{
    char word[16] = "", path[512] = "";
    long first = 0, second = 0;

    must(sscanf(command, "%15s", word) == 1, command);
    sscanf(command, "%*s %ld %ld", &first, &second);
    sscanf(command, "%*s %511s", path);
    if (strcmp(word, "clock") == 0) {
        clocks_wanted = first;
        if (first && !clock_started)
            start(read_clock, NULL);
        clock_started |= first;
    } else if (strcmp(word, "writers") == 0) {
        set_writers(first, second);
    } else if (strcmp(word, "sleepers") == 0) {
        for (; sleepers < first; sleepers++)
            start(sleep_for_ever, NULL);
    } else if (strcmp(word, "touch") == 0) {
        touch_rate = first;
        if (first && !touch_started)
            start(touch_pages, NULL);
        touch_started |= first;
    } else if (strcmp(word, "rewrite") == 0) {
        rewrite((size_t)first, (size_t)second);
    } else if (strcmp(word, "fork") == 0) {
        fprintf(answer, "\"fork_ns\": %llu, ", (unsigned long long)fork_and(NULL));
    } else if (strcmp(word, "fork-save") == 0) {
        fprintf(answer, "\"fork_ns\": %llu, ", (unsigned long long)fork_and(path));
    } else if (strcmp(word, "collapse") == 0) {
        must(madvise(memory, page_count * PAGE, MADV_COLLAPSE) == 0, "MADV_COLLAPSE");
    } else if (strcmp(word, "mark") == 0) {
        mark();
    } else if (strcmp(word, "report") == 0) {
        report(answer);
    } else if (strcmp(word, "exit") == 0) {
        _exit(0);
    } else {
        must(false, command);
    }
}

/* The file's sequence number says which command was answered. */
static void obey(void)
{
    char line[1024] = "", path[512], *command;
    int from = open(option_text("commands", ""), O_RDONLY | O_CLOEXEC);

    must(from >= 0 && read(from, line, sizeof line - 1) > 0, "the command");
    close(from);
    uint64_t number = strtoull(line, &command, 10);
    snprintf(path, sizeof path, "%s.new", option_text("answer", ""));
    FILE *answer = fopen(path, "we");
    must(answer != NULL, path);
    fprintf(answer, "{");
    carry_out(command, answer);
    fprintf(answer, "\"number\": %llu, \"now\": %llu}\n", (unsigned long long)number,
            (unsigned long long)now_ns());
    must(fclose(answer) == 0 && rename(path, option_text("answer", "")) == 0, path);
}

/* At the beginning of a huge page. */
static uint64_t *mapped(size_t bytes, int advice)
{
    char *at = mmap(NULL, bytes + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(at != MAP_FAILED, "memory");
    at += -(uintptr_t)at % HUGE;
    must(madvise(at, bytes, advice) == 0, "madvise");
    return (uint64_t *)at;
}

int main(int argc, char **argv)
{
    sigset_t usr1 = block_usr1();

    victim_start(argc, argv);
    size_t bytes = (size_t)option("mib", 64) * MIB;
    page_count = bytes / PAGE;
    pthread_mutex_lock(&never);
    memory = mapped(bytes, option("huge", 0) ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    touches = mmap(NULL, TOUCHES * sizeof *touches, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    must(touches != MAP_FAILED, "touches");
    for (size_t page = 0; page < page_count; page++)
        fill_page(page, 0, option_text("fill", "mixed"));
    clock_lane.name = "clock";
    victim_ready();
    for (;;) {
        struct timespec often = { 0, 200000000 };
        if (sigtimedwait(&usr1, NULL, &often) == SIGUSR1)
            obey();
        while (waitpid(-1, NULL, WNOHANG) > 0)
            ;
        publish();      /* ends it when its life is over */
    }
}
