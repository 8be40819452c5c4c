"""Everything particular to x86-64: system call numbers, registers, restart codes.

The loop that runs injected calls and the registers it uses are native/arch_x86_64.c, the program
that a new process starts with is stub_x86_64.py.
Sources: the kernel's arch/x86/entry/syscalls/syscall_64.tbl, asm/user_64.h (struct
user_regs_struct), linux/errno.h (ERESTART*), arch/x86/kernel/signal.c.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from ..errors import SnapError

MACHINE = "x86_64"
SYSCALL_INSTRUCTION = b"\x0f\x05"
NO_SYSCALL = (1 << 64) - 1
"""orig_rax of a thread that is in no system call: hand-made registers always carry it, or the
kernel might restart a call that was never made."""

EINTR = -4
ERESTARTSYS = -512
ERESTARTNOINTR = -513
ERESTARTNOHAND = -514
ERESTART_RESTARTBLOCK = -516
"""rax at the stop of a thread whose system call the kernel means to make again: it does so when
the thread goes on from an event stop without a signal handler; else the program gets EINTR, or the
call starts again, as each code says. -516 lives on in the thread's restart block only."""

# What /proc and smaps call the kernel's own mapping with `syscall` instructions in it.
VDSO_NAME = b"[vdso]"
AT_SYSINFO_EHDR = 33
XSTATE_MAX = 16384
"""Bytes that hold any NT_X86_XSTATE area of today (AMX included: about 11 KiB)."""

ARCH_SET_GS, ARCH_SET_FS, ARCH_GET_FS, ARCH_GET_GS = 0x1001, 0x1002, 0x1003, 0x1004
ARCH_MAP_VDSO_64 = 0x2003


class Registers(NamedTuple):
    """struct user_regs_struct, unsigned 64 bit each. `_replace` makes a changed copy."""

    r15: int
    r14: int
    r13: int
    r12: int
    rbp: int
    rbx: int
    r11: int
    r10: int
    r9: int
    r8: int
    rax: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    orig_rax: int
    rip: int
    cs: int
    eflags: int
    rsp: int
    ss: int
    fs_base: int
    gs_base: int
    ds: int
    es: int
    fs: int
    gs: int

    @classmethod
    def unpack(cls, data: bytes) -> Registers:
        return cls(*_REGISTERS.unpack(data))

    def pack(self) -> bytes:
        return _REGISTERS.pack(*self)

    @property
    def result(self) -> int:
        """rax as a signed number: a system call's result, -errno on failure."""
        return signed(self.rax)


_REGISTERS = struct.Struct("27Q")
REGISTERS_SIZE = _REGISTERS.size
CALL = struct.Struct("=80xq32xQQ16xQ56x")
"""Out of a struct user_regs_struct: rax as a signed number, orig_rax, rip, rsp."""


def signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def unsigned(value: int) -> int:
    return value & NO_SYSCALL


# fmt: off
class NR:
    """System call numbers by name, each range in its order: `NR.mmap`."""

    (
        read, write, open, close, stat, fstat, lstat, poll, lseek, mmap, mprotect, munmap, brk,
        rt_sigaction, rt_sigprocmask, rt_sigreturn, ioctl, pread64, pwrite64, readv, writev,
        access, pipe, select, sched_yield, mremap, msync, mincore, madvise, shmget, shmat, shmctl,
        dup, dup2, pause, nanosleep, getitimer, alarm, setitimer, getpid, sendfile, socket,
        connect, accept, sendto, recvfrom, sendmsg, recvmsg, shutdown, bind, listen, getsockname,
        getpeername, socketpair, setsockopt, getsockopt, clone, fork, vfork, execve, exit, wait4,
        kill, uname, semget, semop, semctl, shmdt, msgget, msgsnd, msgrcv, msgctl, fcntl, flock,
        fsync, fdatasync, truncate, ftruncate, getdents, getcwd, chdir, fchdir, rename, mkdir,
        rmdir, creat, link, unlink, symlink, readlink, chmod, fchmod, chown, fchown, lchown, umask,
        gettimeofday, getrlimit, getrusage, sysinfo, times, ptrace, getuid, syslog, getgid, setuid,
        setgid, geteuid, getegid, setpgid, getppid, getpgrp, setsid, setreuid, setregid, getgroups,
        setgroups, setresuid, getresuid, setresgid, getresgid, getpgid, setfsuid, setfsgid, getsid,
        capget, capset, rt_sigpending, rt_sigtimedwait, rt_sigqueueinfo, rt_sigsuspend,
        sigaltstack, utime, mknod, uselib, personality, ustat, statfs, fstatfs, sysfs, getpriority,
        setpriority, sched_setparam, sched_getparam, sched_setscheduler, sched_getscheduler,
        sched_get_priority_max, sched_get_priority_min, sched_rr_get_interval, mlock, munlock,
        mlockall, munlockall, vhangup, modify_ldt, pivot_root, _sysctl, prctl, arch_prctl,
        adjtimex, setrlimit, chroot, sync, acct, settimeofday, mount, umount2, swapon, swapoff,
        reboot, sethostname, setdomainname, iopl, ioperm, create_module, init_module,
        delete_module, get_kernel_syms, query_module, quotactl, nfsservctl, getpmsg, putpmsg,
        afs_syscall, tuxcall, security, gettid, readahead, setxattr, lsetxattr, fsetxattr,
        getxattr, lgetxattr, fgetxattr, listxattr, llistxattr, flistxattr, removexattr,
        lremovexattr, fremovexattr, tkill, time, futex, sched_setaffinity, sched_getaffinity,
        set_thread_area, io_setup, io_destroy, io_getevents, io_submit, io_cancel, get_thread_area,
        lookup_dcookie, epoll_create, epoll_ctl_old, epoll_wait_old, remap_file_pages, getdents64,
        set_tid_address, restart_syscall, semtimedop, fadvise64, timer_create, timer_settime,
        timer_gettime, timer_getoverrun, timer_delete, clock_settime, clock_gettime, clock_getres,
        clock_nanosleep, exit_group, epoll_wait, epoll_ctl, tgkill, utimes, vserver, mbind,
        set_mempolicy, get_mempolicy, mq_open, mq_unlink, mq_timedsend, mq_timedreceive, mq_notify,
        mq_getsetattr, kexec_load, waitid, add_key, request_key, keyctl, ioprio_set, ioprio_get,
        inotify_init, inotify_add_watch, inotify_rm_watch, migrate_pages, openat, mkdirat, mknodat,
        fchownat, futimesat, newfstatat, unlinkat, renameat, linkat, symlinkat, readlinkat,
        fchmodat, faccessat, pselect6, ppoll, unshare, set_robust_list, get_robust_list, splice,
        tee, sync_file_range, vmsplice, move_pages, utimensat, epoll_pwait, signalfd,
        timerfd_create, eventfd, fallocate, timerfd_settime, timerfd_gettime, accept4, signalfd4,
        eventfd2, epoll_create1, dup3, pipe2, inotify_init1, preadv, pwritev, rt_tgsigqueueinfo,
        perf_event_open, recvmmsg, fanotify_init, fanotify_mark, prlimit64, name_to_handle_at,
        open_by_handle_at, clock_adjtime, syncfs, sendmmsg, setns, getcpu, process_vm_readv,
        process_vm_writev, kcmp, finit_module, sched_setattr, sched_getattr, renameat2, seccomp,
        getrandom, memfd_create, kexec_file_load, bpf, execveat, userfaultfd, membarrier, mlock2,
        copy_file_range, preadv2, pwritev2, pkey_mprotect, pkey_alloc, pkey_free, statx,
        io_pgetevents, rseq,
    ) = range(335)
    (
        pidfd_send_signal, io_uring_setup, io_uring_enter, io_uring_register, open_tree,
        move_mount, fsopen, fsconfig, fsmount, fspick, pidfd_open, clone3, close_range, openat2,
        pidfd_getfd, faccessat2, process_madvise, epoll_pwait2, mount_setattr, quotactl_fd,
        landlock_create_ruleset, landlock_add_rule, landlock_restrict_self, memfd_secret,
        process_mrelease, futex_waitv, set_mempolicy_home_node, cachestat, fchmodat2,
        map_shadow_stack, futex_wake, futex_wait, futex_requeue, statmount, listmount,
    ) = range(424, 459)
    mseal = 462


# fmt: on


RESTARTABLE = (NR.nanosleep, NR.clock_nanosleep, NR.poll, NR.futex)
"""What leaves ERESTART_RESTARTBLOCK and goes on as restart_syscall, its own number forgotten."""


_CODE_BEFORE = 32
"""Bytes in which the number of a system call is looked for."""


def code_before(end: int, read: Callable[[int, int], bytes]) -> bytes:
    """Up to 32 bytes of code before `end`, less at the start of a mapping; b"" where nothing can
    be read. `read` gives (address, length) of the memory, or raises SnapError."""
    for length in (_CODE_BEFORE, len(SYSCALL_INSTRUCTION)):
        with suppress(SnapError):
            return read(end - length, length)
    return b""


def call_number_before(code: bytes) -> int | None:
    """The number of the system call that the program made, out of its code up to and with the
    `syscall` instruction: `mov eax, imm32` (b8), as every C library and Go have it just before.

    Only the calls that can have become restart_syscall are looked for. None: not found.
    """
    if not code.endswith(SYSCALL_INSTRUCTION):
        return None
    found = {code.rfind(b"\xb8" + nr.to_bytes(4, "little")): nr for nr in RESTARTABLE}
    nearest = max(found)
    return int(found[nearest]) if nearest >= 0 else None


def syscall_name(nr: int) -> str:
    return numbers().get(nr, f"system call {nr}")


def numbers() -> dict[int, str]:
    """Of all system calls: number -> name."""
    return {nr: name for name, nr in vars(NR).items() if not name.startswith("__")}
