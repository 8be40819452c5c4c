/* What comes before memory in a T0 of one call: threads are listed, stopped and let go, also when it comes to
 * nothing; and pages are read that are there, and no others. (All of it: tests/live/test_instant.py.) */
#define _GNU_SOURCE
#include "check.h"
#include "instant.h"
#include "warm.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 64, MOST = 8, THREADS = 4 };

static void *sleeping(void *arg)
{
    nanosleep(&(struct timespec){3600, 0}, NULL);
    return arg;
}

static int child(int ready)
{
    pthread_t thread;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (int i = 1; i < THREADS; i++)
        if (pthread_create(&thread, NULL, sleeping, NULL))
            _exit(1);
    if (write(ready, "r", 1) != 1)
        _exit(1);
    sleeping(NULL);
    _exit(0);
}

/* Of a thread: the number behind `name` in its status, or its state. */
static long status_of(int pid, int tid, const char *name)
{
    char path[64], text[4096];
    snprintf(path, sizeof path, "/proc/%d/task/%d/status", pid, tid);
    const int fd = open(path, O_RDONLY);
    CHECK(fd >= 0);
    const ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    CHECK(n > 0);
    text[n] = 0;
    const char *at = strstr(text, name);
    CHECK(at);
    at += strlen(name) + 1; /* a tab */
    return *at >= 'A' ? *at : strtol(at, NULL, 10);
}

static bool sleeps(int pid, int tid)
{
    char path[64], text[256] = "";
    snprintf(path, sizeof path, "/proc/%d/task/%d/syscall", pid, tid);
    const int fd = open(path, O_RDONLY);
    CHECK(fd >= 0);
    CHECK(read(fd, text, sizeof text - 1) > 0);
    close(fd);
    return text[0] != 'r' && strtol(text, NULL, 10) == SYS_clock_nanosleep;
}

/* All of its threads. */
static void wait_for_sleep(int pid)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/task", pid);
    for (int asleep = 0; asleep < THREADS;) {
        DIR *folder = opendir(path);
        CHECK(folder);
        asleep = 0;
        for (const struct dirent *one; (one = readdir(folder));)
            asleep += one->d_name[0] != '.' && sleeps(pid, atoi(one->d_name));
        closedir(folder);
    }
}

static void pages_are_read(int pid)
{
    uint8_t *area = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(area != MAP_FAILED);
    for (int i = 0; i < PAGES; i += 3)
        area[i * PAGE] = 1;
    CHECK(munmap(area + 6 * PAGE, PAGE) == 0);
    const uint64_t start = (uint64_t)(uintptr_t)area, ranges[] = {start, start + PAGES * PAGE, start, start};
    const int pagemap = open("/proc/self/pagemap", O_RDONLY);
    CHECK(pagemap >= 0);
    const int64_t found = snap_warm(getpid(), pagemap, 0, ranges, 2);
    CHECK(found == -ENOTTY || found == (PAGES + 2) / 3 - 1);
    CHECK(snap_warm(getpid(), pagemap, 1, ranges, 2) == found);
    CHECK(snap_warm(pid, pagemap, 0, ranges, 0) == 0);
    unsigned char there[PAGES];
    CHECK(mincore(area, 6 * PAGE, there) == 0 && there[0] & 1 && !(there[1] & 1)); /* and none was made */
    close(pagemap);
    munmap(area, PAGES * PAGE);
}

static void threads_are_let_go(int pid)
{
    int tids[MOST], stops[MOST];
    static unsigned char registers[MOST * SNAP_REGISTERS_SIZE], marks[MOST];
    static snap_code code[MOST];
    char path[64];
    snap_pump *pump;
    snprintf(path, sizeof path, "/proc/%d/task", pid);
    const int folder = open(path, O_RDONLY | O_DIRECTORY);
    CHECK(folder >= 0);
    CHECK(snap_pump_new(pid, -1, -1, -1, NULL, 0, &pump) == 0); /* held: it takes no order */
    snap_instant instant = {
        .pid = pid, .folder = folder, .most = THREADS - 1, .timeout_us = 2000000, .pump = pump,
        .tids = tids, .stops = stops, .registers = registers, .marks = marks, .code = code,
        .reaper = snap_reaper_start(pid),
    };
    CHECK(snap_instant_take(&instant) == SNAP_NOT_THREADS); /* there is no room for all */
    CHECK(instant.times_us[SNAP_WHEN_TOLD] == 0);
    instant.most = MOST;
    CHECK(snap_instant_take(&instant) == SNAP_NOT_PUMP);
    CHECK(instant.count == THREADS && tids[0] == pid && instant.seized == -1 && !instant.ordered);
    CHECK(instant.times_us[SNAP_WHEN_GONE] >= instant.times_us[SNAP_WHEN_STOPPED]);
    for (int i = 0; i < THREADS; i++) {
        CHECK(stops[i] == 0 && (i < 2 || tids[i] > tids[i - 1]));
        CHECK(status_of(pid, tids[i], "TracerPid:") == 0);
        CHECK(marks[i] == SNAP_MARK_RESTARTS && code[i].length == SNAP_CODE);
        CHECK(memcmp(code[i].bytes + SNAP_CODE - 4, "\x0f\x05", 2) == 0); /* the call that was interrupted */
    }
    instant.guard = code[0].start;
    instant.guard_end = instant.guard + SNAP_CODE;
    CHECK(snap_instant_take(&instant) == SNAP_NOT_PLACES);
    CHECK(status_of(pid, pid, "TracerPid:") == 0);
    kill(pid, SIGKILL);
    while (status_of(pid, pid, "State:") != 'Z')
        usleep(1000);
    CHECK(snap_instant_take(&instant) == SNAP_NOT_THREADS);
    for (int i = 0; i < instant.count; i++)
        if (stops[i] == -ESRCH && tids[i] != pid)
            (void)snap_reap(tids[i], 0); /* what has ended while it was ours is ours to bury */
    snap_reaper_stop(instant.reaper);
    snap_pump_free(pump);
    close(folder);
}

int main(int argc, char **argv)
{
    const int rounds = argc > 1 ? atoi(argv[1]) : 1;
    for (int i = 0; i < rounds; i++) {
        int ends[2];
        char byte;
        CHECK(pipe(ends) == 0);
        const pid_t pid = fork();
        CHECK(pid >= 0);
        if (pid == 0)
            return child(ends[1]);
        CHECK(read(ends[0], &byte, 1) == 1);
        close(ends[0]);
        close(ends[1]);
        wait_for_sleep(pid);
        pages_are_read(pid);
        threads_are_let_go(pid);
        CHECK(waitpid(pid, NULL, 0) == pid);
    }
    return 0;
}
