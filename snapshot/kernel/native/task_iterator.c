#define _GNU_SOURCE
#include "task_iterator.h"

#include "bpf_internal.h"
#include "btf_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#define BTF_PATH "/sys/kernel/btf/vmlinux"
#define INITIAL_PID_NAMESPACE 0xEFFFFFFCu /* PROC_PID_INIT_INO, include/linux/proc_ns.h */
#define MOST_STEPS 3
#define PIECE 256 /* bytes that go over the program's stack at once: that has 512 */
#define POINTER (-8) /* where on it, relative to its top */
#define BUFFER (POINTER - PIECE)

typedef struct {
    const char *structure, *member;
} place;

/* From the task along pointers, each a member of what the one before points to, to the last member;
   `inside`: of that, which is a struct. */
typedef struct {
    uint32_t size;
    place steps[MOST_STEPS], inside;
} field;

#define AT(bytes, ...) {.size = bytes, .steps = {__VA_ARGS__}}

/* Each as long as in snap_task, in its order. */
static const field of_thread[] = {
    AT(8, {"task_struct", "sas_ss_sp"}),
    AT(8, {"task_struct", "sas_ss_size"}),
    AT(8, {"task_struct", "clear_child_tid"}),
    AT(8, {"task_struct", "robust_list"}),
    AT(8, {"task_struct", "timer_slack_ns"}),
    AT(8, {"task_struct", "thread_info"}), /* begins with its flags */
    {.size = 8, .steps = {{"task_struct", "pending"}}, .inside = {"sigpending", "signal"}},
    AT(8, {"task_struct", "real_cred"}),
    AT(8, {"task_struct", "atomic_flags"}),
    AT(4, {"task_struct", "pid"}),
    AT(4, {"task_struct", "sas_ss_flags"}),
    AT(4, {"task_struct", "personality"}),
    AT(4, {"task_struct", "pdeath_signal"}),
    AT(4, {"task_struct", "cred"}, {"cred", "securebits"}),
    AT(4, {"task_struct", "policy"}),
    AT(4, {"task_struct", "static_prio"}),
    {.size = 4, .steps = {{"task_struct", "seccomp"}}, .inside = {"seccomp", "mode"}},
    AT(16, {"task_struct", "comm"}),
};

static const field of_process[] = {
    AT(8, {"task_struct", "mm"}),
    AT(8, {"task_struct", "mm"}, {"mm_struct", "brk"}),
    AT(8, {"task_struct", "mm"}, {"mm_struct", "flags"}),
    AT(8, {"task_struct", "signal"}, {"signal_struct", "it_real_incr"}),
    AT(32, {"task_struct", "signal"}, {"signal_struct", "it"}),
    AT(8, {"task_struct", "signal"}, {"signal_struct", "posix_timers"}),
    AT(4, {"task_struct", "signal"}, {"signal_struct", "is_child_subreaper"}),
    {.size = 4,
     .steps = {{"task_struct", "signal"}, {"signal_struct", "real_timer"}},
     .inside = {"hrtimer", "state"}},
    AT(64 * 32, {"task_struct", "sighand"}, {"sighand_struct", "action"}),
};

typedef struct {
    snap_bpf_code code;
    uint32_t filled; /* bytes on the stack, of PIECE, that have not gone out */
} program;

static void flush(program *p)
{
    snap_bpf_move(&p->code, BPF_REG_1, BPF_REG_8);
    snap_bpf_move(&p->code, BPF_REG_2, BPF_REG_10);
    snap_bpf_add(&p->code, BPF_REG_2, BUFFER);
    snap_bpf_set(&p->code, BPF_REG_3, (int32_t)p->filled);
    snap_bpf_call(&p->code, BPF_FUNC_seq_write);
    p->filled = 0;
}

static int32_t offset_of(program *p, const snap_btf *btf, const place *at)
{
    int64_t offset = snap_btf_offset(btf, at->structure, at->member);
    if (offset < 0)
        p->code.failed = -ENOENT;
    return (int32_t)offset;
}

/* r7: the task; r8: the seq_file. */
static void copy_field(program *p, const snap_btf *btf, const field *f)
{
    int32_t offsets[MOST_STEPS];
    int last = -1;
    while (last + 1 < MOST_STEPS && f->steps[last + 1].member) {
        last++;
        offsets[last] = offset_of(p, btf, &f->steps[last]);
    }
    if (f->inside.member)
        offsets[last] += offset_of(p, btf, &f->inside);
    for (uint32_t done = 0; done < f->size; done += PIECE) {
        const uint32_t left = f->size - done, size = left < PIECE ? left : PIECE;
        if (p->filled + size > PIECE)
            flush(p);
        snap_bpf_move(&p->code, BPF_REG_3, BPF_REG_7);
        for (int i = 0; i < last; i++) {
            snap_bpf_add(&p->code, BPF_REG_3, offsets[i]);
            snap_bpf_copy(&p->code, POINTER, sizeof(uint64_t));
            snap_bpf_load(&p->code, BPF_REG_3, BPF_REG_10, POINTER);
        }
        snap_bpf_add(&p->code, BPF_REG_3, offsets[last] + (int32_t)done);
        snap_bpf_copy(&p->code, BUFFER + (int32_t)p->filled, size);
        p->filled += size;
    }
}

static int make(const snap_btf *btf, const field *fields, size_t count)
{
    program *p = calloc(1, sizeof *p);
    if (!p)
        return -ENOMEM;
    /* struct bpf_iter__task {struct bpf_iter_meta *meta; struct task_struct *task;}, meta->seq first */
    snap_bpf_load(&p->code, BPF_REG_7, BPF_REG_1, 8);
    snap_bpf_load(&p->code, BPF_REG_8, BPF_REG_1, 0);
    snap_bpf_load(&p->code, BPF_REG_8, BPF_REG_8, 0);
    /* The call after the last task has none. */
    const int to_end = snap_bpf_jump(&p->code, BPF_JMP | BPF_JEQ | BPF_K, BPF_REG_7, 0, 0);
    for (size_t i = 0; i < count; i++)
        copy_field(p, btf, &fields[i]);
    flush(p);
    snap_bpf_arrive(&p->code, to_end);
    snap_bpf_return(&p->code);

    union bpf_attr attr = {.prog_type = BPF_PROG_TYPE_TRACING, .expected_attach_type = BPF_TRACE_ITER};
    attr.attach_btf_id = snap_btf_function(btf, "bpf_iter_task");
    int result = attr.attach_btf_id ? snap_bpf_load_program(&p->code, &attr, "snap_task") : -ENOENT;
    free(p);
    return result;
}

struct snap_task_program {
    int threads, process;
    int64_t memory_at;
};

/* Threads are known by their numbers in the initial pid namespace. */
static int in_initial_namespace(void)
{
    struct stat own;
    return stat("/proc/self/ns/pid", &own) == 0 && own.st_ino == INITIAL_PID_NAMESPACE;
}

int snap_task_program_load(snap_task_program **made)
{
    snap_btf btf;
    *made = NULL;
    if (!in_initial_namespace())
        return -EXDEV;
    int result = snap_btf_load(BTF_PATH, &btf);
    if (result < 0)
        return result;
    snap_task_program *p = malloc(sizeof *p);
    result = p ? 0 : -ENOMEM;
    if (p) {
        p->threads = make(&btf, of_thread, sizeof of_thread / sizeof *of_thread);
        p->process = p->threads < 0 ? p->threads
                                    : make(&btf, of_process, sizeof of_process / sizeof *of_process);
        p->memory_at = snap_btf_offset(&btf, "task_struct", "mm");
        result = p->process < 0 ? p->process : 0;
    }
    snap_btf_free(&btf);
    if (result < 0)
        snap_task_program_free(p);
    else
        *made = p;
    return result;
}

void snap_task_program_free(snap_task_program *p)
{
    if (!p)
        return;
    if (p->threads >= 0)
        close(p->threads);
    if (p->process >= 0)
        close(p->process);
    free(p);
}

int snap_task_iterator(const snap_task_program *p, int id, int what)
{
    union bpf_iter_link_info info = {0};
    if (what == SNAP_OF_THREADS)
        info.task.pid = (uint32_t)id;
    else
        info.task.tid = (uint32_t)id;
    union bpf_attr attr = {0};
    attr.link_create.prog_fd = (uint32_t)(what == SNAP_OF_PROCESS ? p->process : p->threads);
    attr.link_create.attach_type = BPF_TRACE_ITER;
    attr.link_create.iter_info = (uintptr_t)&info;
    attr.link_create.iter_info_len = sizeof info;
    int link = snap_bpf(BPF_LINK_CREATE, &attr);
    if (link < 0)
        return link;
    attr = (union bpf_attr){0};
    attr.iter_create.link_fd = (uint32_t)link;
    int fd = snap_bpf(BPF_ITER_CREATE, &attr);
    close(link);
    return fd;
}

int64_t snap_task_read(int fd, void *into, uint64_t size)
{
    uint64_t have = 0;
    char more;
    for (;;) {
        int full = have == size;
        ssize_t n = full ? read(fd, &more, 1) : read(fd, (char *)into + have, size - have);
        if (n < 0 && (errno == EINTR || errno == EAGAIN))
            continue;
        if (n <= 0 || full)
            return n < 0 ? -errno : n > 0 ? -E2BIG : (int64_t)have;
        have += (uint64_t)n;
    }
}

int snap_task_memory(const snap_task_program *p, int id, uint64_t *memory, int32_t *at)
{
    snap_process process;
    int fd = snap_task_iterator(p, id, SNAP_OF_PROCESS);
    if (fd < 0)
        return fd;
    int64_t size = snap_task_read(fd, &process, sizeof process);
    close(fd);
    *memory = process.memory;
    *at = (int32_t)p->memory_at;
    return size < 0 ? (int)size : size != sizeof process || !process.memory ? -ESRCH : 0;
}

int snap_task_sort(snap_task *tasks, int known, const int *tids, int count)
{
    if (count > known)
        return -ESRCH;
    for (int i = 0; i < count; i++) { /* mostly they are in that order */
        int at = i;
        while (at < known && tasks[at].tid != tids[i])
            at++;
        if (at == known)
            return -ESRCH;
        snap_task found = tasks[at];
        tasks[at] = tasks[i];
        tasks[i] = found;
    }
    return 0;
}

void snap_task_compare(const snap_task *tasks, int count, unsigned char *unlike)
{
    for (int i = 0; i < count; i++) {
        const snap_task *one = &tasks[i];
        unlike[i] = one->pending || one->credentials != tasks->credentials ||
                    one->seccomp != tasks->seccomp || one->atomic_flags != tasks->atomic_flags;
    }
}
