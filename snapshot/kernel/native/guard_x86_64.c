#include "guard_x86_64.h"

#include <stddef.h>
#include <string.h>
#include <sys/user.h>

#include "arch_x86_64.h"

/* r15 holds the address of the thread's record on the whole way; its fields as the assembler sees
   them. */
#define AT(field) field "(%r15)"
_Static_assert(offsetof(snap_home, rsp) == 112, "RSP");
_Static_assert(offsetof(snap_home, eflags) == 120, "EFLAGS");
_Static_assert(offsetof(snap_home, rax) == 128, "RAX");
_Static_assert(offsetof(snap_home, rip) == 136, "RIP");
_Static_assert(offsetof(snap_home, rax_eintr) == 144, "RAX_EINTR");
_Static_assert(offsetof(snap_home, rip_eintr) == 152, "RIP_EINTR");
_Static_assert(offsetof(snap_home, by_flags) == 160, "BY_FLAGS");
_Static_assert(offsetof(snap_home, signal_mask) == 168, "MASK");
_Static_assert(offsetof(snap_home, deliverable) == 176, "DELIVERABLE");
_Static_assert(offsetof(snap_home, quiet) == 184, "QUIET");
_Static_assert(offsetof(snap_home, scratch) == 192, "SCRATCH");
_Static_assert(offsetof(snap_home, undo) == 208, "UNDO");
_Static_assert(offsetof(snap_home, undo_call) == 216, "UNDO_CALL");
_Static_assert(offsetof(snap_home, owed) == 224, "OWED");
_Static_assert(sizeof(snap_home) == 232, "the record");
#define CLOSE(field) "mov " field "(%rbp), %edi\n test %edi, %edi\n js 7f\n mov $3, %eax\n syscall\n 7:\n"

/* Only loads, no store but into the scratch of which this thread has charge: the code page need not
   be writable. No stack either: signals that arrive once the mask is back find rsp where it belongs. */
__asm__(
    ".pushsection .rodata\n"
    ".balign 8\n"
    "snap_guard_begin:\n" /* the loop: byte for byte that of arch_x86_64.c */
    "1: mov (%rbx), %rax\n mov 8(%rbx), %rdi\n mov 16(%rbx), %rsi\n mov 24(%rbx), %rdx\n"
    "   mov 32(%rbx), %r10\n mov 40(%rbx), %r8\n mov 48(%rbx), %r9\n"
    "   syscall\n"
    "   mov %rax, 56(%rbx)\n add $64, %rbx\n dec %ebp\n jnz 1b\n"
    "   lea snap_guard_leave(%rip), %r12\n"

    /* tkill(gettid(), quiet), if there is such a signal: a tracer sees it, without one it is ignored.
       Goes on at r12. */
    "snap_guard_tell:\n"
    "   mov " AT("184") ", %esi\n test %esi, %esi\n jz snap_guard_told_at\n"
    "   mov $186, %eax\n syscall\n"
    "   mov %eax, %edi\n mov $200, %eax\n syscall\n"
    "snap_guard_told_at:\n"
    "   jmp *%r12\n"

    /* A clone: what is made by it, of which nobody has said what to do next, ends. */
    "snap_guard_clone_at:\n"
    "   syscall\n"
    "   test %rax, %rax\n jnz snap_guard_called\n"
    "4: xor %edi, %edi\n mov $60, %eax\n syscall\n jmp 4b\n"

    "snap_guard_call_at:\n"
    "   syscall\n"
    "snap_guard_called:\n"
    "   mov %rax, %rbx\n lea 1f(%rip), %r12\n jmp snap_guard_tell\n"
    "1: mov %rbx, %rax\n"
    "   xor %r13d, %r13d\n"
    "   mov " AT("208") ", %rsi\n test %rsi, %rsi\n jz snap_guard_leave\n"
    "   test %rax, %rax\n jle snap_guard_leave\n" /* it failed, or was the close of what was made */
    "   mov %rax, %rdi\n mov " AT("216") ", %eax\n syscall\n"
    "   jmp snap_guard_leave\n"

    /* Parked: registers that say "interrupted system call" at the second label. The kernel goes on
       there with EINTR when a handler runs, two bytes before it when the call is to be made again. */
    "   jmp snap_guard_leave\n"
    "snap_guard_parked_at:\n"
    "   mov $1, %r13d\n"
    "   cmp %r15, snap_guard_charge(%rip)\n jne snap_guard_go\n"
    "   mov " AT("192") ", %rbx\n"
    "   jmp 2f\n"

    "snap_guard_leave:\n"
    "   xor %r13d, %r13d\n"
    "   cmp %r15, snap_guard_charge(%rip)\n jne snap_guard_go\n"
    "   mov " AT("192") ", %rbx\n"
    /* rt_sigpending: will a handler run before an interrupted call could be made again? */
    "   mov %rbx, %rdi\n mov $8, %esi\n mov $127, %eax\n syscall\n"
    "   test %eax, %eax\n jnz 2f\n"
    "   mov (%rbx), %rax\n and " AT("176") ", %rax\n jz 2f\n"
    "   inc %r13d\n"
    "   cmpl $0, " AT("160") "\n je 2f\n"
    "   bsf %rax, %rdi\n inc %edi\n xor %esi, %esi\n mov %rbx, %rdx\n mov $8, %r10d\n"
    "   mov $13, %eax\n syscall\n" /* rt_sigaction: its flags */
    "   testl $0x10000000, 8(%rbx)\n jz 2f\n"
    "   xor %r13d, %r13d\n"
    "2: mov " AT("224") ", %rbp\n test %rbp, %rbp\n jz 6f\n"
    CLOSE("0") CLOSE("4") CLOSE("24")
    "6: mov %rbx, %rdi\n mov " AT("200") ", %rsi\n mov $11, %eax\n syscall\n" /* munmap */
    "   lea snap_guard_go(%rip), %r12\n jmp snap_guard_tell\n"

    "snap_guard_go:\n"
    "   lea snap_guard_again_at - snap_guard_slot(%r15), %r14\n test %r13d, %r13d\n jz 3f\n"
    "   lea snap_guard_eintr_at - snap_guard_slot(%r15), %r14\n"
    "3: lea " AT("120") ", %rsp\n popfq\n mov " AT("112") ", %rsp\n"
    /* From here on nothing that changes flags. rt_sigprocmask(SIG_SETMASK): */
    "   mov $2, %edi\n lea " AT("168") ", %rsi\n mov $0, %edx\n mov $8, %r10d\n mov $14, %eax\n"
    "   syscall\n"
    "   mov " AT("0") ", %rbx\n mov " AT("8") ", %rbp\n mov " AT("16") ", %rcx\n"
    "   mov " AT("24") ", %rdx\n mov " AT("32") ", %rsi\n mov " AT("40") ", %rdi\n"
    "   mov " AT("48") ", %r8\n mov " AT("56") ", %r9\n mov " AT("64") ", %r10\n"
    "   mov " AT("72") ", %r11\n mov " AT("80") ", %r12\n mov " AT("88") ", %r13\n"
    "   jmp *%r14\n"
    ".balign 8, 0xcc\n"
    "snap_guard_charge: .quad 0\n"

    /* A slot: a record, and the end of the way, which finds the last of it relative to itself. */
    "snap_guard_slot: .skip 232\n"
    "snap_guard_again_at:\n"
    "   mov " AT("96") ", %r14\n mov " AT("128") ", %rax\n mov " AT("104") ", %r15\n"
    "   jmp *snap_guard_slot + 136(%rip)\n"
    "snap_guard_eintr_at:\n"
    "   mov " AT("96") ", %r14\n mov " AT("144") ", %rax\n mov " AT("104") ", %r15\n"
    "   jmp *snap_guard_slot + 152(%rip)\n"
    ".org snap_guard_slot + 288, 0xcc\n" /* SNAP_GUARD_SLOT: an error when it is longer */
    ".popsection\n");

extern const unsigned char snap_guard_begin[], snap_guard_clone_at[], snap_guard_call_at[],
    snap_guard_parked_at[], snap_guard_told_at[], snap_guard_charge[], snap_guard_slot[];

#define TRAP_FLAG 0x100ull

const unsigned char *snap_guard_code(uint64_t *size)
{
    *size = snap_guard_in_charge();
    return snap_guard_begin;
}

uint64_t snap_guard_in_charge(void)
{
    return (uint64_t)(snap_guard_charge - snap_guard_begin);
}

uint64_t snap_guard_record(int slot)
{
    return (uint64_t)(snap_guard_slot - snap_guard_begin) + (uint64_t)slot * SNAP_GUARD_SLOT;
}

uint64_t snap_guard_size(void)
{
    return snap_guard_record(SNAP_GUARD_SLOTS);
}

void snap_guard_fill_slot(unsigned char *bytes, const snap_home *home)
{
    _Static_assert(SNAP_GUARD_SLOT % 8 == 0, "records are aligned");
    memcpy(bytes, snap_guard_slot, SNAP_GUARD_SLOT);
    memcpy(bytes, home, sizeof *home);
}

uint64_t snap_guard_call(void)
{
    return (uint64_t)(snap_guard_call_at - snap_guard_begin);
}

uint64_t snap_guard_clone(void)
{
    return (uint64_t)(snap_guard_clone_at - snap_guard_begin);
}

uint64_t snap_guard_told(void)
{
    return (uint64_t)(snap_guard_told_at - snap_guard_begin);
}

/* What arch_do_signal_or_restart (arch/x86/kernel/signal.c) makes of an interrupted system call. */
static void restart(snap_home *home, const struct user_regs_struct *regs)
{
    int64_t result = (int64_t)regs->rax;
    if (regs->orig_rax == (unsigned long long)-1 || !snap_arch_is_restart(result))
        return;
    home->rax = result == -516 ? SNAP_RESTART_SYSCALL : regs->orig_rax;
    home->rip = regs->rip - 2;
    home->by_flags = result == -512;
    if (result == -513) { /* ERESTARTNOINTR: whatever handler runs */
        home->rax_eintr = home->rax;
        home->rip_eintr = home->rip;
    } else {
        home->rax_eintr = (uint64_t)-4;
    }
}

void snap_guard_home(snap_home *home, const void *registers, uint64_t abort_ip)
{
    const struct user_regs_struct *regs = registers;
    home->rbx = regs->rbx, home->rbp = regs->rbp, home->rcx = regs->rcx, home->rdx = regs->rdx;
    home->rsi = regs->rsi, home->rdi = regs->rdi, home->r8 = regs->r8, home->r9 = regs->r9;
    home->r10 = regs->r10, home->r11 = regs->r11, home->r12 = regs->r12, home->r13 = regs->r13;
    home->r14 = regs->r14, home->r15 = regs->r15, home->rsp = regs->rsp;
    home->eflags = regs->eflags & ~TRAP_FLAG;
    home->rax = home->rax_eintr = regs->rax;
    home->rip = home->rip_eintr = abort_ip ? abort_ip : regs->rip;
    home->by_flags = 0;
    restart(home, regs);
}

int64_t snap_guard_result(const void *registers)
{
    return (int64_t)((const struct user_regs_struct *)registers)->rbx;
}

void snap_guard_lead(void *registers, uint64_t record)
{
    ((struct user_regs_struct *)registers)->r15 = record;
}

void snap_guard_park(void *registers, uint64_t guard, uint64_t record)
{
    struct user_regs_struct *regs = registers;
    regs->r15 = record;
    regs->rip = guard + (uint64_t)(snap_guard_parked_at - snap_guard_begin);
    regs->eflags &= ~0x500ull; /* no single step, strings forward */
    if (regs->orig_rax == (unsigned long long)-1 || !snap_arch_is_restart((int64_t)regs->rax)) {
        regs->orig_rax = (unsigned long long)-1;
        regs->rip -= 2;
    }
}
