/* kinds: a process of an unusual kind, which checks its memory and counts.
 *
 *   --what plain | maps (10,000 mappings) | threads (2,000, small stacks) | reserve (twice 1 TiB of
 *          untouched addresses) | undumpable | errno, kill (a seccomp filter that answers
 *          userfaultfd, ptrace and socket so) | tracer (of a child) */
#define _GNU_SOURCE
#include "victim.h"

#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAPS = 10000, CROWD = 2000, TOUCHED = 8 };
#define TIB (1UL << 40)
#define WORDS (PAGE / 8)

static uint64_t *part[MAPS];
static size_t parts;
static _Atomic uint64_t turns[CROWD];
static pid_t traced;

static uint64_t *map(size_t bytes, int protection, int flags)
{
    void *got = mmap(NULL, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    must(got != MAP_FAILED, "mmap");
    return got;
}

static void keep(uint64_t *memory)
{
    fill(memory, WORDS, parts + 1);
    part[parts++] = memory;
}

static void many_maps(void)
{
    char *all = (char *)map(MAPS * PAGE, PROT_READ | PROT_WRITE, 0);
    for (size_t i = 0; i < MAPS; i++) {
        keep((uint64_t *)(all + i * PAGE));
        if (i % 2)
            must(mprotect(all + i * PAGE, PAGE, PROT_READ) == 0, "mprotect");
    }
}

static void *member(void *turn)
{
    for (;;) {
        sleep_ms(500);
        ++*(_Atomic uint64_t *)turn;
    }
    return NULL;
}

static void crowd(void)
{
    pthread_attr_t small;
    pthread_t thread;
    pthread_attr_init(&small);
    must(pthread_attr_setstacksize(&small, 32 * 1024) == 0, "a small stack");
    for (size_t i = 0; i < CROWD; i++)
        must(pthread_create(&thread, &small, member, &turns[i]) == 0, "pthread_create");
    victim_lanes(2);
}

static void reserve(void)
{
    map(TIB, PROT_NONE, MAP_NORESERVE);
    char *space = (char *)map(TIB, PROT_READ | PROT_WRITE, MAP_NORESERVE);
    for (size_t i = 0; i < TOUCHED; i++)
        keep((uint64_t *)(space + i * (TIB / TOUCHED)));
}

static void filter(unsigned answer)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 3, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ptrace, 2, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_socket, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_RET | BPF_K, answer),
    };
    struct sock_fprog program = { sizeof code / sizeof *code, code };
    must(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "no_new_privs");
    must(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0) == 0, "a seccomp filter");
}

static void trace(void)
{
    traced = fork();
    if (traced == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        ptrace(PTRACE_TRACEME, 0, NULL, NULL);
        for (;;)
            raise(SIGUSR1);
    }
    victim_lanes(2);
}

int main(int argc, char **argv)
{
    victim_start(argc, argv);
    victim_lanes(1);
    const char *what = option_text("what", "plain");
    keep(map(PAGE, PROT_READ | PROT_WRITE, 0));
    if (strcmp(what, "maps") == 0) {
        parts = 0;
        many_maps();
    }
    if (strcmp(what, "threads") == 0)
        crowd();
    if (strcmp(what, "reserve") == 0)
        reserve();
    if (strcmp(what, "undumpable") == 0)
        must(prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) == 0, "PR_SET_DUMPABLE");
    if (strcmp(what, "errno") == 0)
        filter(SECCOMP_RET_ERRNO | EPERM);
    if (strcmp(what, "kill") == 0)
        filter(SECCOMP_RET_KILL_PROCESS);
    if (strcmp(what, "tracer") == 0)
        trace();
    victim_ready();
    for (;;) {
        for (size_t i = 0; i < parts; i++)
            if (wrong(part[i], WORDS, i + 1) != WORDS)
                fault("part %zu of %zu is wrong", i, parts);
        if (strcmp(what, "threads") == 0) {
            uint64_t least = turns[0];
            for (size_t i = 1; i < CROWD; i++)
                least = turns[i] < least ? turns[i] : least;
            progress[1] = least;
        }
        int status;
        if (traced && waitpid(traced, &status, WNOHANG | __WALL) == traced) {
            if (!WIFSTOPPED(status) || WSTOPSIG(status) != SIGUSR1)
                fault("the traced child: %x", (unsigned)status);
            must(ptrace(PTRACE_CONT, traced, NULL, NULL) == 0, "PTRACE_CONT");
            progress[1]++;
        }
        progress[0]++;
        publish();
        sleep_ms(2);
    }
}
