/* signals: gets many of them, one in --pause us (1000), and checks that none is lost, doubled, out of
 * order or felt.
 *
 *   --kind numbered: real-time signals that a child sends. The second thread handles them (lane 1), and
 *          those of a timer of 1 kHz (lane 2)
 *   --kind ignored: SIGURG and SIGCHLD, which nobody handles; there is no second thread
 *   --mib M: of memory, filled
 *
 * main waits in epoll_wait(2), which returns EINTR for every signal that wakes it, for the second
 * thread, or the child, to say something (lane 0).
 * values: 0: the longest time between sending and handling, ns, since it was last set to 0 by SIGUSR1;
 * 1: the sum of these times; 2: how many they are */
#define _GNU_SOURCE
#include "victim.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <unistd.h>

#define NUMBERED SIGRTMIN
#define IGNORED 8 /* signals of each kind before the child says something */

#define NUMBER_SHIFT 40 /* of a signal's value: its number, and when it was sent, ns */
#define TIME (((uint64_t)1 << NUMBER_SHIFT) - 1)

static int said;
static bool numbered;

static void on_number(int number, siginfo_t *info, void *context)
{
    uint64_t value = (uint64_t)(uintptr_t)info->si_value.sival_ptr;
    uint64_t late = (now_ns() - value) & TIME;
    (void)number;
    (void)context;
    if (value >> NUMBER_SHIFT != ++progress[1])
        fault("number %llu came as %llu", (unsigned long long)(value >> NUMBER_SHIFT),
              (unsigned long long)progress[1]);
    if (late > values[0])
        values[0] = late;
    values[1] += late;
    values[2]++;
}

static void on_timer(int number)
{
    (void)number;
    progress[2]++;
}

static void on_reset(int number)
{
    (void)number;
    values[0] = values[1] = values[2] = 0;
}

static void *second(void *argument)
{
    uint64_t one = 1;
    sigset_t none;
    (void)argument;
    sigemptyset(&none);
    pthread_sigmask(SIG_SETMASK, &none, NULL);
    for (;;) {
        usleep(5000);
        must(write(said, &one, sizeof one) == sizeof one || errno == EINTR, "write");
        publish();
    }
    return NULL;
}

static void send_numbers(pid_t parent)
{
    useconds_t pause = (useconds_t)option("pause", 1000);
    union sigval value;
    uint64_t number = 0, ignored = IGNORED;

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    while (getppid() == parent) {
        usleep(pause);
        number++;
        if (!numbered && (kill(parent, SIGURG) != 0 || kill(parent, SIGCHLD) != 0))
            break;
        if (!numbered && number % IGNORED == 0)
            must(write(said, &ignored, sizeof ignored) == sizeof ignored, "write");
        value.sival_ptr = (void *)(uintptr_t)(number << NUMBER_SHIFT | (now_ns() & TIME));
        while (numbered && sigqueue(parent, NUMBERED, value) != 0)
            must(errno == EAGAIN, "sigqueue");
    }
    _exit(0);
}

static void handle(int number, void (*handler)(int, siginfo_t *, void *))
{
    struct sigaction action = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_RESTART };
    sigfillset(&action.sa_mask);
    must(sigaction(number, &action, NULL) == 0, "sigaction");
}

int main(int argc, char **argv)
{
    struct itimerval every = { { 0, 1000 }, { 0, 1000 } };
    size_t bytes;
    pthread_t thread;
    sigset_t handled;
    pid_t self = getpid();

    victim_start(argc, argv);
    victim_lanes(3);
    bytes = (size_t)option("mib", 16) * MIB;
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(memory != MAP_FAILED, "mmap");
    fill(memory, bytes / 8, 1);
    numbered = strcmp(option_text("kind", "numbered"), "numbered") == 0;
    handle(NUMBERED, on_number);
    handle(SIGALRM, (void (*)(int, siginfo_t *, void *))(void *)on_timer);
    handle(SIGUSR1, (void (*)(int, siginfo_t *, void *))(void *)on_reset);
    sigemptyset(&handled);
    sigaddset(&handled, NUMBERED);
    sigaddset(&handled, SIGALRM);
    sigaddset(&handled, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &handled, NULL);
    said = eventfd(0, EFD_CLOEXEC);
    int waiting = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = { .events = EPOLLIN };
    must(said >= 0 && waiting >= 0 && epoll_ctl(waiting, EPOLL_CTL_ADD, said, &event) == 0, "epoll");
    must(!numbered || pthread_create(&thread, NULL, second, NULL) == 0, "pthread_create");
    pid_t child = fork();
    if (child == 0)
        send_numbers(self);
    must(child > 0, "fork");
    must(!numbered || setitimer(ITIMER_REAL, &every, NULL) == 0, "setitimer");
    victim_ready();
    for (;;) {
        uint64_t count = 0;
        if (epoll_wait(waiting, &event, 1, -1) != 1)
            fault("epoll_wait: %s", strerror(errno));
        else
            must(read(said, &count, sizeof count) == sizeof count, "read");
        progress[0]++;
        if (!numbered) {
            progress[2] = progress[1] += count;
            publish();
        }
    }
}
