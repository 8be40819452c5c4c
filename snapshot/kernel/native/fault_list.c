#define _GNU_SOURCE
#include "fault_list.h"

#include "bpf_internal.h"
#include "fault_list_internal.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096
#define BYTES ((sizeof(struct snap_fault_ring) + PAGE - 1) / PAGE * PAGE)
#define OF_WRITE 2 /* X86_PF_WRITE, arch/x86/include/asm/trap_pf.h */
#define ADDRESS 0  /* arguments of page_fault_…: address, regs, error_code */
#define ERROR_CODE 16
#define PARENT 0   /* … and of sched_process_fork: tasks */
#define CHILD 8
#define POINTER (-8)

enum { OF_FAULTS, OF_FORKS, PROGRAMS };

static const struct {
    const char *name;
    int program;
} tracepoints[] = {{"page_fault_user", OF_FAULTS}, {"page_fault_kernel", OF_FAULTS}, {"sched_process_fork", OF_FORKS}};
#define TRACEPOINTS (int)(sizeof tracepoints / sizeof *tracepoints)

struct snap_fault_list {
    int map, programs[PROGRAMS], links[TRACEPOINTS], linked;
    struct snap_fault_ring *ring;
};

static int make_map(void)
{
    union bpf_attr attr = {.map_type = BPF_MAP_TYPE_ARRAY, .key_size = sizeof(uint32_t)};
    attr.value_size = sizeof(struct snap_fault_ring);
    attr.max_entries = 1;
    attr.map_flags = BPF_F_MMAPABLE;
    return snap_bpf(BPF_MAP_CREATE, &attr);
}

/* To the end, if task->mm, of the task in r3, is (BPF_JEQ) or is not (BPF_JNE) the memory of the process. */
static int jump_by_memory(snap_bpf_code *p, uint8_t condition, uint64_t memory, int32_t memory_at)
{
    snap_bpf_add(p, BPF_REG_3, memory_at);
    snap_bpf_copy(p, POINTER, sizeof(uint64_t));
    snap_bpf_load(p, BPF_REG_1, BPF_REG_10, POINTER);
    snap_bpf_set_wide(p, BPF_REG_2, 0, memory);
    return snap_bpf_jump(p, BPF_JMP | condition | BPF_X, BPF_REG_1, BPF_REG_2, 0);
}

/* r2 = the count in the ring at `offset`, r1 points to the ring; it is one more then. */
static void count_up(snap_bpf_code *p, int map, int16_t offset)
{
    snap_bpf_set_wide(p, BPF_REG_1, BPF_PSEUDO_MAP_VALUE, (uint64_t)map);
    snap_bpf_set(p, BPF_REG_2, 1);
    snap_bpf_emit(p, BPF_STX | BPF_ATOMIC | BPF_DW, BPF_REG_1, BPF_REG_2, offset, BPF_ADD | BPF_FETCH);
}

/* if (parent->mm == memory && child->mm != memory) ring.forks++; */
static void write_of_forks(snap_bpf_code *p, int map, uint64_t memory, int32_t memory_at)
{
    snap_bpf_load(p, BPF_REG_3, BPF_REG_6, PARENT);
    int others = jump_by_memory(p, BPF_JNE, memory, memory_at);
    snap_bpf_load(p, BPF_REG_3, BPF_REG_6, CHILD);
    int threads = jump_by_memory(p, BPF_JEQ, memory, memory_at);
    count_up(p, map, offsetof(struct snap_fault_ring, forks));
    snap_bpf_arrive(p, others);
    snap_bpf_arrive(p, threads);
}

/* if (error_code & OF_WRITE && current->mm == memory) ring.at[ring.count++ % SNAP_RING_SIZE] = address; */
static void write_of_faults(snap_bpf_code *p, int map, uint64_t memory, int32_t memory_at)
{
    snap_bpf_load(p, BPF_REG_1, BPF_REG_6, ERROR_CODE);
    snap_bpf_emit(p, BPF_ALU64 | BPF_AND | BPF_K, BPF_REG_1, 0, 0, OF_WRITE);
    int reads = snap_bpf_jump(p, BPF_JMP | BPF_JEQ | BPF_K, BPF_REG_1, 0, 0);
    snap_bpf_call(p, BPF_FUNC_get_current_task);
    snap_bpf_move(p, BPF_REG_3, BPF_REG_0);
    int others = jump_by_memory(p, BPF_JNE, memory, memory_at);
    count_up(p, map, offsetof(struct snap_fault_ring, count));
    snap_bpf_emit(p, BPF_ALU64 | BPF_AND | BPF_K, BPF_REG_2, 0, 0, SNAP_RING_SIZE - 1);
    snap_bpf_emit(p, BPF_ALU64 | BPF_MUL | BPF_K, BPF_REG_2, 0, 0, sizeof(uint64_t));
    snap_bpf_emit(p, BPF_ALU64 | BPF_ADD | BPF_X, BPF_REG_1, BPF_REG_2, 0, 0);
    snap_bpf_load(p, BPF_REG_2, BPF_REG_6, ADDRESS);
    snap_bpf_emit(p, BPF_STX | BPF_MEM | BPF_DW, BPF_REG_1, BPF_REG_2, offsetof(struct snap_fault_ring, at), 0);
    snap_bpf_arrive(p, reads);
    snap_bpf_arrive(p, others);
}

static int load_program(int which, int map, uint64_t memory, int32_t memory_at)
{
    snap_bpf_code *p = calloc(1, sizeof *p);
    if (!p)
        return -ENOMEM;
    snap_bpf_move(p, BPF_REG_6, BPF_REG_1);
    if (which == OF_FORKS)
        write_of_forks(p, map, memory, memory_at);
    else
        write_of_faults(p, map, memory, memory_at);
    snap_bpf_return(p);
    union bpf_attr attr = {.prog_type = BPF_PROG_TYPE_RAW_TRACEPOINT};
    int result = snap_bpf_load_program(p, &attr, which == OF_FORKS ? "snap_forks" : "snap_faults");
    free(p);
    return result;
}

static int load_programs(snap_fault_list *l, uint64_t memory, int32_t memory_at)
{
    int r = 0;
    for (int i = 0; i < PROGRAMS && r >= 0; i++)
        r = l->programs[i] = load_program(i, l->map, memory, memory_at);
    return r;
}

static int attach(snap_fault_list *l)
{
    for (; l->linked < TRACEPOINTS; l->linked++) {
        union bpf_attr attr = {0};
        attr.raw_tracepoint.name = (uintptr_t)tracepoints[l->linked].name;
        attr.raw_tracepoint.prog_fd = (uint32_t)l->programs[tracepoints[l->linked].program];
        int link = snap_bpf(BPF_RAW_TRACEPOINT_OPEN, &attr);
        if (link < 0)
            return link;
        l->links[l->linked] = link;
    }
    return 0;
}

int snap_fault_list_open(const snap_task_program *program, int id, snap_fault_list **list)
{
    uint64_t memory;
    int32_t memory_at;
    *list = NULL;
    int r = snap_task_memory(program, id, &memory, &memory_at);
    if (r)
        return r;
    snap_fault_list *l = calloc(1, sizeof *l);
    if (!l)
        return -ENOMEM;
    l->ring = MAP_FAILED;
    for (int i = 0; i < PROGRAMS; i++)
        l->programs[i] = -1;
    r = l->map = make_map();
    if (r >= 0)
        l->ring = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, l->map, 0);
    if (r >= 0)
        r = l->ring == MAP_FAILED ? -errno : load_programs(l, memory, memory_at);
    if (r >= 0)
        r = attach(l);
    if (r < 0)
        snap_fault_list_close(l);
    else
        *list = l;
    return r < 0 ? r : 0;
}

const snap_fault_ring *snap_fault_list_ring(const snap_fault_list *l)
{
    return l->ring;
}

void snap_fault_list_end(snap_fault_list *l)
{
    while (l->linked)
        close(l->links[--l->linked]);
}

void snap_fault_list_close(snap_fault_list *l)
{
    if (!l)
        return;
    snap_fault_list_end(l);
    if (l->ring != MAP_FAILED)
        munmap(l->ring, BYTES);
    for (int i = 0; i < PROGRAMS; i++)
        if (l->programs[i] >= 0)
            close(l->programs[i]);
    if (l->map >= 0)
        close(l->map);
    free(l);
}
