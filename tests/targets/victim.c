#define _GNU_SOURCE
#include "victim.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

_Atomic uint64_t progress[LANES];
uint64_t values[VALUES];

static int arguments;
static char **argument;
static unsigned lanes_used;
static int status_fd = -1;
static uint64_t deadline;
static _Atomic uint64_t fault_count, verified_count;
static char first_error[512];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t sequence;

const char *option_text(const char *name, const char *otherwise)
{
    for (int i = 1; i + 1 < arguments; i++)
        if (strncmp(argument[i], "--", 2) == 0 && strcmp(argument[i] + 2, name) == 0)
            return argument[i + 1];
    return otherwise;
}

long option(const char *name, long otherwise)
{
    const char *text = option_text(name, NULL);
    return text ? strtol(text, NULL, 0) : otherwise;
}

void must(bool ok, const char *what)
{
    if (ok)
        return;
    fprintf(stderr, "victim %d: %s: %s\n", (int)getpid(), what, strerror(errno));
    _exit(98);
}

uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ULL + (uint64_t)t.tv_nsec;
}

void sleep_ms(unsigned ms)
{
    struct timespec t = { ms / 1000, (long)(ms % 1000) * 1000000L };
    uint64_t before = now_ns();
    if (nanosleep(&t, NULL) != 0)
        fault("nanosleep(%u ms): %s", ms, strerror(errno));
    else if (now_ns() - before < ms * 1000000ULL)
        fault("nanosleep(%u ms) came back after %llu ns", ms,
              (unsigned long long)(now_ns() - before));
}

sigset_t block_usr1(void)
{
    sigset_t usr1;
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &usr1, NULL);
    return usr1;
}

void victim_lanes(unsigned lanes)
{
    lanes_used = lanes;
}

void victim_start(int argc, char **argv)
{
    arguments = argc;
    argument = argv;
    deadline = now_ns() + (uint64_t)option("life", 900) * 1000000000ULL;
    const char *path = option_text("status", NULL);
    if (path) {
        status_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        must(status_fd >= 0, path);
    }
}

void victim_ready(void)
{
    publish();
    int fd = (int)option("ready", -1);
    if (fd < 0)
        return;
    must(write(fd, "r", 1) == 1, "telling that we are ready");
    close(fd);
}

void publish(void)
{
    static struct status s;

    pthread_mutex_lock(&lock);
    s.magic = 0x0031544349565f5fULL;
    s.sequence = s.sequence_again = ++sequence;
    s.pid = getpid();
    s.errors = fault_count;
    s.verified = verified_count;
    s.lanes = lanes_used;
    for (unsigned i = 0; i < LANES; i++)
        s.progress[i] = progress[i];
    memcpy(s.values, values, sizeof values);
    memcpy(s.first_error, first_error, sizeof first_error);
    if (status_fd >= 0)
        must(pwrite(status_fd, &s, sizeof s, 0) == (ssize_t)sizeof s, "writing the status");
    pthread_mutex_unlock(&lock);
    if (now_ns() > deadline)
        _exit(97);
}

void fault(const char *format, ...)
{
    int saved = errno;
    pthread_mutex_lock(&lock);
    if (atomic_fetch_add(&fault_count, 1) == 0) {
        va_list list;
        va_start(list, format);
        vsnprintf(first_error, sizeof first_error, format, list);
        va_end(list);
        fprintf(stderr, "victim %d: %s\n", (int)getpid(), first_error);
    }
    pthread_mutex_unlock(&lock);
    errno = saved;
}

uint64_t faults(void)
{
    return fault_count;
}

void verified(void)
{
    atomic_fetch_add(&verified_count, 1);
}

void settle_malloc(void)
{
    char *volatile block = malloc(64 * 1024);
    must(block != NULL, "malloc");
    free(block);
}

void fill(uint64_t *memory, size_t words, uint64_t key)
{
    for (size_t i = 0; i < words; i++)
        memory[i] = mix(key * 0x9e3779b97f4a7c15ULL + i + 1);
}

size_t wrong(const uint64_t *memory, size_t words, uint64_t key)
{
    for (size_t i = 0; i < words; i++)
        if (memory[i] != mix(key * 0x9e3779b97f4a7c15ULL + i + 1))
            return i;
    return words;
}

size_t nonzero(const uint64_t *memory, size_t words)
{
    for (size_t i = 0; i < words; i++)
        if (memory[i] != 0)
            return i;
    return words;
}
