/*
 * The way home of a borrowed thread: code and a record of its registers that lie in the target while
 * a call is being made inside it. If the tracer dies, the thread finishes the calls and goes home by
 * itself. x86-64 only.
 */
#ifndef SNAP_GUARD_X86_64_H
#define SNAP_GUARD_X86_64_H
#include <stdint.h>

#define SNAP_GUARD_SLOTS 2
#define SNAP_GUARD_SLOT 288

/* Read-only for the code: the page may be one that the target cannot write. */
typedef struct {
    uint64_t rbx, rbp, rcx, rdx, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15, rsp, eflags;
    uint64_t rax, rip;         /* an interrupted system call is made again */
    uint64_t rax_eintr, rip_eintr; /* … or fails with EINTR, as a handler is about to run */
    uint64_t by_flags;         /* 1: SA_RESTART of the handler decides between the two */
    uint64_t signal_mask;
    uint64_t deliverable;      /* signals that have a handler and are not blocked */
    uint64_t quiet;            /* number of the signal that tells the tracer; 0: there is none */
    uint64_t scratch;          /* unmapped on the way by the one that has charge of it */
    uint64_t scratch_size;
    uint64_t undo;             /* second argument of the call that undoes the single call, whose
                                  result is the first; 0: there is nothing to undo */
    uint64_t undo_call;        /* its number: munmap or close */
    uint64_t owed;             /* in the scratch: int[2], 16 bytes, int; descriptors that are closed
                                  on the way, negative ones not. 0: there is nothing of the kind */
} snap_home;

/* From a 16-byte boundary on: the code, `*size` bytes (the loop of snap_arch_loop stands at its
   start); at the offset snap_guard_in_charge the address of the record whose thread has charge of the
   scratch, 0: nobody has; SNAP_GUARD_SLOTS slots of SNAP_GUARD_SLOT bytes, each a record and code. */
const unsigned char *snap_guard_code(uint64_t *size);
uint64_t snap_guard_in_charge(void);
uint64_t snap_guard_record(int slot);
/* Bytes of all of it, a multiple of 8. */
uint64_t snap_guard_size(void);
/* Offsets into the code: where one call is made (rax, rdi, … and the record set, nothing else), or one
   that makes a thread, which ends at once if it runs on from its birth; where the thread stands when
   the quiet signal arrives: after the loop, the call, or the end of the scratch on the way home. */
uint64_t snap_guard_call(void);
uint64_t snap_guard_clone(void);
uint64_t snap_guard_told(void);
/* Of the call, in registers of then. */
int64_t snap_guard_result(const void *registers);
/* SNAP_GUARD_SLOT bytes. */
void snap_guard_fill_slot(unsigned char *bytes, const snap_home *home);
/* Adds the address of the thread's record to registers for the loop or the call. */
void snap_guard_lead(void *registers, uint64_t record);
/* Fills in what the thread has of its own: SNAP_REGISTERS_SIZE bytes of struct user_regs_struct.
   `abort_ip`: where a restartable sequence that the thread is in must go on, 0: it is in none. */
void snap_guard_home(snap_home *home, const void *registers, uint64_t abort_ip);
/* Turns the thread's own registers into those with which it would go home at once, whatever its
   signal mask: also through the handler of a signal that is pending. */
void snap_guard_park(void *registers, uint64_t guard, uint64_t record);

#endif
