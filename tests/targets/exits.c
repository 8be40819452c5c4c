/* exits: fills memory, waits for SIGUSR1 and then goes away in a way of its own.
 *
 *   --how exit | group (exit_group) | exec (of /bin/true) | abort | segv | kill | thread (it ends
 *         alone) | each (it ends alone, then the other does, which is the last)
 *   --by main | second: which thread does it
 *   --alone 1: there is no second thread
 *   --mib M, --after MS between the signal and the end
 *
 * The second thread, or main when the second is to end it, writes all the time, to the first quarter. */
#define _GNU_SOURCE
#include "victim.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

static const char *how;
static _Atomic bool each;

static void leave(void)
{
    if (strcmp(how, "exit") == 0)
        exit(7);
    if (strcmp(how, "group") == 0)
        syscall(SYS_exit_group, 7);
    if (strcmp(how, "exec") == 0)
        execl("/bin/true", "true", (char *)NULL);
    if (strcmp(how, "abort") == 0)
        abort();
    if (strcmp(how, "segv") == 0)
        *(volatile int *)(uintptr_t)option("nowhere", 8) = 1;
    if (strcmp(how, "kill") == 0)
        kill(getpid(), SIGKILL);
    each = strcmp(how, "each") == 0;
    if (each || strcmp(how, "thread") == 0)
        syscall(SYS_exit, 7);
    must(false, how);
}

static void leave_when_told(void)
{
    int signal;

    sigset_t usr1 = block_usr1();
    sigwait(&usr1, &signal);
    sleep_ms((unsigned)option("after", 0));
    leave();
}

static void write_on(uint64_t *memory)
{
    size_t words = (size_t)option("mib", 16) * MIB / 8 / 4;

    for (uint64_t round = 0;; round++) {
        memory[mix(round) % words] = round;
        progress[1]++;
        if (round % 65536 == 0)
            publish();
        if (each)
            syscall(SYS_exit, 7);
    }
}

static void *second(void *argument)
{
    if (argument == NULL)
        leave_when_told();
    write_on(argument);
    return NULL;
}

int main(int argc, char **argv)
{
    struct rlimit none = { 0, 0 };
    pthread_t thread;

    setrlimit(RLIMIT_CORE, &none);
    block_usr1();
    victim_start(argc, argv);
    victim_lanes(2);
    how = option_text("how", "exit");
    size_t bytes = (size_t)option("mib", 16) * MIB;
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(memory != MAP_FAILED, "mmap");
    fill(memory, bytes / 8, 1);
    values[0] = (uint64_t)(uintptr_t)memory;
    values[1] = bytes;
    bool by_second = strcmp(option_text("by", "main"), "second") == 0;
    if (!option("alone", 0))
        must(pthread_create(&thread, NULL, second, by_second ? NULL : memory) == 0, "pthread_create");
    victim_ready();
    if (by_second)
        write_on(memory);
    leave_when_told();
}
