#define _GNU_SOURCE
#include "spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define STACK_BYTES (64 * 1024)
#define SIGNAL_SET_BYTES 8
#define LAST_SIGNAL 64

#ifndef CLONE_CLEAR_SIGHAND
#define CLONE_CLEAR_SIGHAND 0x100000000ULL
#endif

/* What the child works on; it shares the caller's memory until it execs, so it writes here too. */
struct child {
    spawn_request *request;
    char *stack;  /* 2 * STACK_BYTES: the program's, and above it init's */
    int error;    /* -errno of the child */
};

struct kernel_sigaction {
    void *handler;
    unsigned long flags;
    void *restorer;
    uint64_t mask;
};

/* clone3 into `entry(argument)` on the stack of args, then exit. The child shares memory and thread
 * pointer with the caller, who sleeps (CLONE_VFORK): both may use errno, not at the same time. */
static long clone_into(struct clone_args *args, int (*entry)(void *), void *argument)
{
    register int (*function)(void *) __asm__("r8") = entry;
    register void *data __asm__("r9") = argument;
    long result;
    __asm__ volatile("syscall\n\t"
                     "test %%rax, %%rax\n\t"
                     "jnz 1f\n\t"
                     "xor %%ebp, %%ebp\n\t"
                     "mov %%r9, %%rdi\n\t"
                     "call *%%r8\n\t"
                     "mov %%eax, %%edi\n\t"
                     "mov $60, %%eax\n\t" /* exit */
                     "syscall\n"
                     "1:"
                     : "=a"(result)
                     : "0"((long)SYS_clone3), "D"(args), "S"(sizeof *args), "r"(function),
                       "r"(data)
                     : "rcx", "r11", "memory", "cc");
    return result;
}

static int execute(int program)
{
    char *argv[] = {"snap", NULL}, *envp[] = {NULL};
    syscall(SYS_execveat, program, "", argv, envp, AT_EMPTY_PATH);
    return -errno;
}

static int set_mask(uint64_t mask, uint64_t *old)
{
    /* not sigprocmask: glibc keeps signals 32 and 33 out of it */
    return (int)syscall(SYS_rt_sigprocmask, SIG_SETMASK, &mask, old, SIGNAL_SET_BYTES);
}

/* The program, before it is one. CLONE_CLEAR_SIGHAND leaves ignored signals ignored, and they stay
 * so over exec (Python ignores SIGPIPE): put them back. */
static int program_entry(void *argument)
{
    struct child *child = argument;
    const spawn_request *request = child->request;
    struct kernel_sigaction standard = {0};
    for (int number = 1; number <= LAST_SIGNAL; number++)
        syscall(SYS_rt_sigaction, number, &standard, NULL, SIGNAL_SET_BYTES);
    set_mask(~(1ULL << (SIGTRAP - 1)), NULL);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    /* the descriptor table is a copy: nothing of this is seen by the caller */
    int error = syscall(SYS_close_range, 3, ~0U, CLOSE_RANGE_CLOEXEC) < 0 ? -errno : 0;
    for (int i = 0; !error && i < request->keep_count; i++)
        if (fcntl(request->keep[i], F_SETFD, 0) < 0)
            error = -errno;
    child->error = error ? error : execute(request->program);
    child->request->failed = SPAWN_EXEC;
    return 1;
}

static int start_program(struct child *child, int *pidfd)
{
    spawn_request *request = child->request;
    pid_t wanted = request->pid;
    struct clone_args args = {
        .flags = CLONE_VM | CLONE_VFORK | CLONE_CLEAR_SIGHAND | (pidfd ? CLONE_PIDFD : 0),
        .pidfd = (uintptr_t)pidfd,
        .exit_signal = SIGCHLD,
        .stack = (uintptr_t)child->stack,
        .stack_size = STACK_BYTES,
        .set_tid = wanted ? (uintptr_t)&wanted : 0,
        .set_tid_size = wanted ? 1 : 0,
    };
    long pid = clone_into(&args, program_entry, child);
    if (pid < 0)
        request->failed = SPAWN_CLONE;
    return (int)pid;
}

/* pid 1 of the new namespace, before it becomes the init program */
static int init_entry(void *argument)
{
    struct child *child = argument;
    spawn_request *request = child->request;
    request->failed = SPAWN_MOUNT;
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
        mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) < 0) {
        child->error = -errno;
        return 1;
    }
    request->failed = 0;
    int pid = start_program(child, NULL);
    if (pid < 0) {
        child->error = pid;
        return 1;
    }
    if (child->error)
        return 1;
    set_mask(0, NULL);
    syscall(SYS_close_range, 0, ~0U, CLOSE_RANGE_CLOEXEC);
    child->error = execute(request->init);
    request->failed = SPAWN_EXEC;
    return 1;
}

static int start_init(struct child *child)
{
    spawn_request *request = child->request;
    struct clone_args args = {
        .flags = CLONE_VM | CLONE_VFORK | CLONE_CLEAR_SIGHAND | CLONE_PIDFD | CLONE_NEWPID |
                 CLONE_NEWNS,
        .pidfd = (uintptr_t)&request->pidfd,
        .exit_signal = SIGCHLD,
        .stack = (uintptr_t)child->stack + STACK_BYTES,
        .stack_size = STACK_BYTES,
    };
    long pid = clone_into(&args, init_entry, child);
    if (pid < 0)
        request->failed = SPAWN_INIT;
    return (int)pid;
}

int spawn(spawn_request *request)
{
    request->pidfd = -1;
    request->failed = 0;
    struct child child = {.request = request};
    child.stack = mmap(NULL, 2 * STACK_BYTES, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (child.stack == MAP_FAILED)
        return -errno;
    /* no handler of ours may run in the child, which shares our memory */
    uint64_t mask;
    set_mask(~0ULL, &mask);
    int pid = request->init >= 0 ? start_init(&child) : start_program(&child, &request->pidfd);
    if (pid > 0 && child.error) {
        syscall(SYS_wait4, pid, NULL, 0, NULL); /* it has ended: exec failed */
        close(request->pidfd);
        request->pidfd = -1;
        pid = child.error;
    }
    set_mask(mask, NULL);
    munmap(child.stack, 2 * STACK_BYTES);
    return pid;
}

int spawn_twin(void)
{
    long pid = syscall(SYS_clone, CLONE_FILES | SIGCHLD, NULL, NULL, NULL, 0);
    return pid < 0 ? -errno : (int)pid;
}
