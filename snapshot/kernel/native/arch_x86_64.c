#include "arch_x86_64.h"

#include <sys/user.h>

_Static_assert(sizeof(struct user_regs_struct) == SNAP_REGISTERS_SIZE, "user_regs_struct");
_Static_assert(sizeof(snap_call) == 64, "the loop steps by 64 bytes");

static const unsigned char loop_code[] = {
    0x48, 0x8b, 0x03,       /* 00 mov rax, [rbx] */
    0x48, 0x8b, 0x7b, 0x08, /* 03 mov rdi, [rbx + 8] */
    0x48, 0x8b, 0x73, 0x10, /* 07 mov rsi, [rbx + 16] */
    0x48, 0x8b, 0x53, 0x18, /* 0b mov rdx, [rbx + 24] */
    0x4c, 0x8b, 0x53, 0x20, /* 0f mov r10, [rbx + 32] */
    0x4c, 0x8b, 0x43, 0x28, /* 13 mov r8, [rbx + 40] */
    0x4c, 0x8b, 0x4b, 0x30, /* 17 mov r9, [rbx + 48] */
    0x0f, 0x05,             /* 1b syscall */
    0x48, 0x89, 0x43, 0x38, /* 1d mov [rbx + 56], rax */
    0x48, 0x83, 0xc3, 0x40, /* 21 add rbx, 64 */
    0xff, 0xcd,             /* 25 dec ebp */
    0x75, 0xd7,             /* 27 jnz 00 */
    0xcc,                   /* 29 int3 */
    0x0f, 0x0b,             /* 2a ud2: never reached */
    0x90,
};
#define AFTER_SYSCALL 0x1d
#define BEFORE_STEP 0x21

_Static_assert(sizeof loop_code == SNAP_LOOP_SIZE, "SNAP_LOOP_SIZE");

const unsigned char *snap_arch_loop(void)
{
    return loop_code;
}

void snap_arch_enter_loop(void *registers, uint64_t loop, uint64_t array, uint32_t count)
{
    struct user_regs_struct *regs = registers;
    regs->rip = loop;
    regs->rbx = array;
    regs->rbp = count;
    regs->orig_rax = (unsigned long long)-1;
    regs->eflags &= ~0x500ull; /* no single step, strings forward */
}

void snap_arch_enter_syscall(void *registers, uint64_t instruction, const snap_call *call)
{
    struct user_regs_struct *regs = registers;
    regs->rip = instruction;
    regs->rax = call->nr;
    regs->rdi = call->args[0];
    regs->rsi = call->args[1];
    regs->rdx = call->args[2];
    regs->r10 = call->args[3];
    regs->r8 = call->args[4];
    regs->r9 = call->args[5];
    regs->orig_rax = (unsigned long long)-1;
    regs->eflags &= ~0x500ull;
}

int64_t snap_arch_result(const void *registers)
{
    return (int64_t)((const struct user_regs_struct *)registers)->rax;
}

int64_t snap_arch_call(const void *registers)
{
    return (int64_t)((const struct user_regs_struct *)registers)->orig_rax;
}

uint64_t snap_arch_rip(const void *registers)
{
    return ((const struct user_regs_struct *)registers)->rip;
}

int snap_arch_is_restart(int64_t result)
{
    return result == -512 || result == -513 || result == -514 || result == -516;
}

int64_t snap_arch_interrupted(const void *registers)
{
    const struct user_regs_struct *regs = registers;
    return (int64_t)regs->rax == -4 ? (int64_t)regs->orig_rax : -1;
}

int64_t snap_arch_made_again(const void *registers)
{
    const struct user_regs_struct *regs = registers;
    return (int64_t)regs->rax == -514 ? (int64_t)regs->orig_rax : -1;
}

int snap_arch_restarts(const void *registers)
{
    const struct user_regs_struct *regs = registers;
    return (int64_t)regs->rax == -516 || regs->rax == SNAP_RESTART_SYSCALL ||
           regs->orig_rax == SNAP_RESTART_SYSCALL;
}

long snap_arch_raw(long number, long a, long b, long c)
{
    register long fourth __asm__("r10") = 0;
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(fourth)
                     : "rcx", "r11", "memory");
    return result;
}

void snap_arch_make_again(void *registers)
{
    ((struct user_regs_struct *)registers)->rax = (unsigned long long)-514;
}

uint32_t snap_arch_loop_progress(const void *registers, uint64_t loop, uint64_t array,
                                 int64_t *result, int *stored)
{
    const struct user_regs_struct *regs = registers;
    uint32_t complete = (uint32_t)((regs->rbx - array) / sizeof(snap_call));
    uint64_t at = regs->rip - loop;
    *result = (int64_t)regs->rax;
    *stored = 1;
    /* Between the system call and the step to the next one rax still holds the result. */
    if (at >= AFTER_SYSCALL && at <= BEFORE_STEP &&
        !(regs->orig_rax != (unsigned long long)-1 && snap_arch_is_restart(*result))) {
        *stored = 0;
        complete++;
    }
    return complete;
}
