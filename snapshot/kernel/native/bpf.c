#define _GNU_SOURCE
#include "bpf_internal.h"

#include <errno.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The helpers are for GPL-compatible programs only; these few instructions may be had under it. */
#define LICENSE_OF_PROGRAM "Dual BSD/GPL"

void snap_bpf_emit(snap_bpf_code *p, uint8_t code, uint8_t to, uint8_t from, int16_t offset, int32_t value)
{
    if (p->count == SNAP_BPF_MOST) {
        p->failed = -E2BIG;
        return;
    }
    p->at[p->count++] =
        (struct bpf_insn){.code = code, .dst_reg = to, .src_reg = from, .off = offset, .imm = value};
}

void snap_bpf_move(snap_bpf_code *p, uint8_t to, uint8_t from)
{
    snap_bpf_emit(p, BPF_ALU64 | BPF_MOV | BPF_X, to, from, 0, 0);
}

void snap_bpf_set(snap_bpf_code *p, uint8_t to, int32_t value)
{
    snap_bpf_emit(p, BPF_ALU64 | BPF_MOV | BPF_K, to, 0, 0, value);
}

void snap_bpf_set_wide(snap_bpf_code *p, uint8_t to, uint8_t kind, uint64_t value)
{
    snap_bpf_emit(p, BPF_LD | BPF_IMM | BPF_DW, to, kind, 0, (int32_t)value);
    snap_bpf_emit(p, 0, 0, 0, 0, (int32_t)(value >> 32));
}

void snap_bpf_add(snap_bpf_code *p, uint8_t to, int32_t value)
{
    snap_bpf_emit(p, BPF_ALU64 | BPF_ADD | BPF_K, to, 0, 0, value);
}

void snap_bpf_load(snap_bpf_code *p, uint8_t to, uint8_t from, int16_t offset)
{
    snap_bpf_emit(p, BPF_LDX | BPF_MEM | BPF_DW, to, from, offset, 0);
}

int snap_bpf_jump(snap_bpf_code *p, uint8_t condition, uint8_t left, uint8_t right, int32_t value)
{
    snap_bpf_emit(p, condition, left, right, 0, value);
    return p->count - 1;
}

void snap_bpf_arrive(snap_bpf_code *p, int from)
{
    p->at[from].off = (int16_t)(p->count - from - 1);
}

void snap_bpf_call(snap_bpf_code *p, int32_t helper)
{
    snap_bpf_emit(p, BPF_JMP | BPF_CALL, 0, 0, 0, helper);
}

void snap_bpf_copy(snap_bpf_code *p, int32_t at, uint32_t size)
{
    snap_bpf_move(p, BPF_REG_1, BPF_REG_10);
    snap_bpf_add(p, BPF_REG_1, at);
    snap_bpf_set(p, BPF_REG_2, (int32_t)size);
    snap_bpf_call(p, BPF_FUNC_probe_read_kernel);
}

void snap_bpf_return(snap_bpf_code *p)
{
    snap_bpf_set(p, BPF_REG_0, 0);
    snap_bpf_emit(p, BPF_JMP | BPF_EXIT, 0, 0, 0, 0);
}

int snap_bpf(int command, union bpf_attr *attr)
{
    int result = (int)syscall(SYS_bpf, command, attr, sizeof *attr);
    return result < 0 ? -errno : result;
}

int snap_bpf_load_program(const snap_bpf_code *p, union bpf_attr *attr, const char *name)
{
    if (p->failed)
        return p->failed;
    attr->insns = (uintptr_t)p->at;
    attr->insn_cnt = (uint32_t)p->count;
    attr->license = (uintptr_t)LICENSE_OF_PROGRAM;
    strncpy(attr->prog_name, name, sizeof attr->prog_name - 1);
    return snap_bpf(BPF_PROG_LOAD, attr);
}
