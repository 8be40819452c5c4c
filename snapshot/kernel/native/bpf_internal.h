/* BPF programs, put together instruction by instruction (Documentation/bpf/standardization/instruction-set.rst). */
#ifndef SNAP_BPF_INTERNAL_H
#define SNAP_BPF_INTERNAL_H
#include <linux/bpf.h>
#include <stdint.h>

#define SNAP_BPF_MOST 1024 /* instructions */

typedef struct {
    struct bpf_insn at[SNAP_BPF_MOST];
    int count, failed; /* -errno */
} snap_bpf_code;

void snap_bpf_emit(snap_bpf_code *p, uint8_t code, uint8_t to, uint8_t from, int16_t offset, int32_t value);
void snap_bpf_move(snap_bpf_code *p, uint8_t to, uint8_t from);
void snap_bpf_set(snap_bpf_code *p, uint8_t to, int32_t value);
/* All 64 bits of it; `kind`: 0, or of what value is a descriptor (BPF_PSEUDO_…). */
void snap_bpf_set_wide(snap_bpf_code *p, uint8_t to, uint8_t kind, uint64_t value);
void snap_bpf_add(snap_bpf_code *p, uint8_t to, int32_t value);
/* 8 bytes. */
void snap_bpf_load(snap_bpf_code *p, uint8_t to, uint8_t from, int16_t offset);
/* If left `condition` right, or value: to where the result is said to arrive. */
int snap_bpf_jump(snap_bpf_code *p, uint8_t condition, uint8_t left, uint8_t right, int32_t value);
void snap_bpf_arrive(snap_bpf_code *p, int from);
void snap_bpf_call(snap_bpf_code *p, int32_t helper);
/* `size` bytes at r3 to the stack, `at` relative to its top; zeros where there is no such memory. */
void snap_bpf_copy(snap_bpf_code *p, int32_t at, uint32_t size);
/* Returns 0. */
void snap_bpf_return(snap_bpf_code *p);

/* attr: what is not the program itself. -> its descriptor, or -errno. */
int snap_bpf_load_program(const snap_bpf_code *p, union bpf_attr *attr, const char *name);
int snap_bpf(int command, union bpf_attr *attr);

#endif
