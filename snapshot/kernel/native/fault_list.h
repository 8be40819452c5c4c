/*
 * Which pages a process writes to for the first time, as the kernel's tracepoints of page faults tell (of user
 * mode and of the kernel's own accesses): a BPF program lists the address of each faulting write in a ring that
 * is mapped here, and counts its forks. Before the fault is handled, so what a fault has let through is listed by then; nothing is
 * told of who writes without one (get_user_pages: process_vm_writev, mlock, MADV_POPULATE_WRITE). All faults of
 * the machine run the program, some 20 ns, while it is attached. Needs what task_iterator.h does. Mechanism
 * without policy.
 */
#ifndef SNAP_FAULT_LIST_H
#define SNAP_FAULT_LIST_H
#include "task_iterator.h"

typedef struct snap_fault_list snap_fault_list;
typedef struct snap_fault_ring snap_fault_ring;

/* Of the process with thread `id`, from here on. 0 or -errno, then *list is NULL. */
int snap_fault_list_open(const snap_task_program *program, int id, snap_fault_list **list);
/* Good until close. */
const snap_fault_ring *snap_fault_list_ring(const snap_fault_list *list);
/* Nothing more is listed. */
void snap_fault_list_end(snap_fault_list *list);
void snap_fault_list_close(snap_fault_list *list);

#endif
