/*
 * What is particular to x86-64 in injected calls: which registers carry what, and the loop that
 * runs an array of calls. The Python side is kernel/arch_x86_64.py.
 */
#ifndef SNAP_ARCH_X86_64_H
#define SNAP_ARCH_X86_64_H
#include <stdint.h>

#define SNAP_REGISTERS_SIZE 216
#define SNAP_LOOP_SIZE 45
#define SNAP_RESTART_SYSCALL 219

/* One injected call as the loop finds it in the target's memory: 64 bytes. */
typedef struct {
    uint64_t nr;
    uint64_t args[6];
    int64_t result;
} snap_call;

/* Position-independent code: runs `count` calls of an array and traps. SNAP_LOOP_SIZE bytes. */
const unsigned char *snap_arch_loop(void);

/* The functions below take SNAP_REGISTERS_SIZE bytes of struct user_regs_struct.
   Hand-made registers say that they come from no system call, or the kernel would restart one. */
void snap_arch_enter_loop(void *registers, uint64_t loop, uint64_t array, uint32_t count);
void snap_arch_enter_syscall(void *registers, uint64_t instruction, const snap_call *call);
int64_t snap_arch_result(const void *registers);
/* The number of the system call that the thread is in; -1: none. */
int64_t snap_arch_call(const void *registers);
uint64_t snap_arch_rip(const void *registers);
/* How many calls of the array are complete when the loop stands at these registers; *result is that
   of the last one, and *stored says that it is in the array already. */
uint32_t snap_arch_loop_progress(const void *registers, uint64_t loop, uint64_t array,
                                 int64_t *result, int *stored);
/* The kernel means to run the interrupted call again (ERESTARTSYS, …). */
int snap_arch_is_restart(int64_t result);
/* The number of the system call that returned EINTR to these registers, made by a `syscall`
   instruction right before rip; -1: none did. */
int64_t snap_arch_interrupted(const void *registers);
/* The number of the call that has been made to be made again (snap_arch_make_again); -1: none. */
int64_t snap_arch_made_again(const void *registers);
/* The thread is in restart_syscall, or about to make it, or goes there when it runs on. */
int snap_arch_restarts(const void *registers);
/* A system call of our own that touches no thread-local memory (no errno): -errno when it fails. A fourth
   argument is 0. */
long snap_arch_raw(long number, long a, long b, long c);
/* Has the kernel make that call again, unless a handler runs first (ERESTARTNOHAND). */
void snap_arch_make_again(void *registers);

#endif
