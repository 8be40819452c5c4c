/* nolibc: a program without any library (-nostdlib -static): no TLS, no rseq, one thread. It writes
 * the status file of victim.h, whose address and --ready it finds in its arguments. */
#include "victim.h"

#define NOTHING 0L

static long call(long number, long a, long b, long c, long d)
{
    long result;
    register long r10 __asm__("r10") = d;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10)
                     : "rcx", "r11", "memory");
    return result;
}

static int same(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

static uint64_t memory[64 * PAGE / 8];
static struct status status;

__attribute__((used, noreturn)) static void run(long *stack)
{
    char **argv = (char **)(stack + 1);
    int fd = -1, ready = 0;
    for (long i = 1; i + 1 < stack[0]; i++) {
        if (same(argv[i], "--status"))
            fd = (int)call(2, (long)argv[i + 1], 0102, 0600, 0); /* open: O_RDWR | O_CREAT */
        if (same(argv[i], "--ready"))
            for (const char *digit = argv[i + 1]; *digit; digit++)
                ready = ready * 10 + *digit - '0';
    }
    for (unsigned long i = 0; i < sizeof memory / 8; i++)
        memory[i] = mix(i + 1);
    for (;;) {
        for (unsigned long i = 0; i < sizeof memory / 8; i++)
            status.errors += memory[i] != mix(i + 1);
        status.magic = 0x0031544349565f5fULL;
        status.sequence = ++status.sequence_again;
        status.pid = call(39, 0, 0, 0, 0);
        status.lanes = 1;
        status.progress[0]++;
        call(18, fd, (long)&status, sizeof status, 0); /* pwrite64 */
        if (ready > 0) {
            call(1, ready, (long)"r", 1, 0);
            call(3, ready, 0, 0, 0);
            ready = 0;
        }
        long pause[2] = { 0, 2000000 };
        call(35, (long)pause, NOTHING, 0, 0); /* nanosleep */
    }
}

__asm__(".globl _start\n_start:\n mov %rsp, %rdi\n and $-16, %rsp\n call run\n");
