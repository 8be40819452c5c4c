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
from enum import IntEnum
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
NR = IntEnum(
    "NR",
    {
        "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7,
        "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13,
        "rt_sigprocmask": 14, "rt_sigreturn": 15, "ioctl": 16, "pread64": 17, "pwrite64": 18,
        "readv": 19, "writev": 20, "access": 21, "pipe": 22, "select": 23, "sched_yield": 24,
        "mremap": 25, "msync": 26, "mincore": 27, "madvise": 28, "shmget": 29, "shmat": 30,
        "shmctl": 31, "dup": 32, "dup2": 33, "pause": 34, "nanosleep": 35, "getitimer": 36,
        "alarm": 37, "setitimer": 38, "getpid": 39, "sendfile": 40, "socket": 41, "connect": 42,
        "accept": 43, "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "shutdown": 48,
        "bind": 49, "listen": 50, "getsockname": 51, "getpeername": 52, "socketpair": 53,
        "setsockopt": 54, "getsockopt": 55, "clone": 56, "fork": 57, "vfork": 58, "execve": 59,
        "exit": 60, "wait4": 61, "kill": 62, "uname": 63, "semget": 64, "semop": 65, "semctl": 66,
        "shmdt": 67, "msgget": 68, "msgsnd": 69, "msgrcv": 70, "msgctl": 71, "fcntl": 72,
        "flock": 73, "fsync": 74, "fdatasync": 75, "truncate": 76, "ftruncate": 77, "getdents": 78,
        "getcwd": 79, "chdir": 80, "fchdir": 81, "rename": 82, "mkdir": 83, "rmdir": 84,
        "creat": 85, "link": 86, "unlink": 87, "symlink": 88, "readlink": 89, "chmod": 90,
        "fchmod": 91, "chown": 92, "fchown": 93, "lchown": 94, "umask": 95, "gettimeofday": 96,
        "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100, "ptrace": 101, "getuid": 102,
        "syslog": 103, "getgid": 104, "setuid": 105, "setgid": 106, "geteuid": 107, "getegid": 108,
        "setpgid": 109, "getppid": 110, "getpgrp": 111, "setsid": 112, "setreuid": 113,
        "setregid": 114, "getgroups": 115, "setgroups": 116, "setresuid": 117, "getresuid": 118,
        "setresgid": 119, "getresgid": 120, "getpgid": 121, "setfsuid": 122, "setfsgid": 123,
        "getsid": 124, "capget": 125, "capset": 126, "rt_sigpending": 127, "rt_sigtimedwait": 128,
        "rt_sigqueueinfo": 129, "rt_sigsuspend": 130, "sigaltstack": 131, "utime": 132,
        "mknod": 133, "uselib": 134, "personality": 135, "ustat": 136, "statfs": 137,
        "fstatfs": 138, "sysfs": 139, "getpriority": 140, "setpriority": 141, "sched_setparam": 142,
        "sched_getparam": 143, "sched_setscheduler": 144, "sched_getscheduler": 145,
        "sched_get_priority_max": 146, "sched_get_priority_min": 147, "sched_rr_get_interval": 148,
        "mlock": 149, "munlock": 150, "mlockall": 151, "munlockall": 152, "vhangup": 153,
        "modify_ldt": 154, "pivot_root": 155, "_sysctl": 156, "prctl": 157, "arch_prctl": 158,
        "adjtimex": 159, "setrlimit": 160, "chroot": 161, "sync": 162, "acct": 163,
        "settimeofday": 164, "mount": 165, "umount2": 166, "swapon": 167, "swapoff": 168,
        "reboot": 169, "sethostname": 170, "setdomainname": 171, "iopl": 172, "ioperm": 173,
        "create_module": 174, "init_module": 175, "delete_module": 176, "get_kernel_syms": 177,
        "query_module": 178, "quotactl": 179, "nfsservctl": 180, "getpmsg": 181, "putpmsg": 182,
        "afs_syscall": 183, "tuxcall": 184, "security": 185, "gettid": 186, "readahead": 187,
        "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "getxattr": 191, "lgetxattr": 192,
        "fgetxattr": 193, "listxattr": 194, "llistxattr": 195, "flistxattr": 196,
        "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199, "tkill": 200, "time": 201,
        "futex": 202, "sched_setaffinity": 203, "sched_getaffinity": 204, "set_thread_area": 205,
        "io_setup": 206, "io_destroy": 207, "io_getevents": 208, "io_submit": 209, "io_cancel": 210,
        "get_thread_area": 211, "lookup_dcookie": 212, "epoll_create": 213, "epoll_ctl_old": 214,
        "epoll_wait_old": 215, "remap_file_pages": 216, "getdents64": 217, "set_tid_address": 218,
        "restart_syscall": 219, "semtimedop": 220, "fadvise64": 221, "timer_create": 222,
        "timer_settime": 223, "timer_gettime": 224, "timer_getoverrun": 225, "timer_delete": 226,
        "clock_settime": 227, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
        "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233, "tgkill": 234, "utimes": 235,
        "vserver": 236, "mbind": 237, "set_mempolicy": 238, "get_mempolicy": 239, "mq_open": 240,
        "mq_unlink": 241, "mq_timedsend": 242, "mq_timedreceive": 243, "mq_notify": 244,
        "mq_getsetattr": 245, "kexec_load": 246, "waitid": 247, "add_key": 248, "request_key": 249,
        "keyctl": 250, "ioprio_set": 251, "ioprio_get": 252, "inotify_init": 253,
        "inotify_add_watch": 254, "inotify_rm_watch": 255, "migrate_pages": 256, "openat": 257,
        "mkdirat": 258, "mknodat": 259, "fchownat": 260, "futimesat": 261, "newfstatat": 262,
        "unlinkat": 263, "renameat": 264, "linkat": 265, "symlinkat": 266, "readlinkat": 267,
        "fchmodat": 268, "faccessat": 269, "pselect6": 270, "ppoll": 271, "unshare": 272,
        "set_robust_list": 273, "get_robust_list": 274, "splice": 275, "tee": 276,
        "sync_file_range": 277, "vmsplice": 278, "move_pages": 279, "utimensat": 280,
        "epoll_pwait": 281, "signalfd": 282, "timerfd_create": 283, "eventfd": 284,
        "fallocate": 285, "timerfd_settime": 286, "timerfd_gettime": 287, "accept4": 288,
        "signalfd4": 289, "eventfd2": 290, "epoll_create1": 291, "dup3": 292, "pipe2": 293,
        "inotify_init1": 294, "preadv": 295, "pwritev": 296, "rt_tgsigqueueinfo": 297,
        "perf_event_open": 298, "recvmmsg": 299, "fanotify_init": 300, "fanotify_mark": 301,
        "prlimit64": 302, "name_to_handle_at": 303, "open_by_handle_at": 304, "clock_adjtime": 305,
        "syncfs": 306, "sendmmsg": 307, "setns": 308, "getcpu": 309, "process_vm_readv": 310,
        "process_vm_writev": 311, "kcmp": 312, "finit_module": 313, "sched_setattr": 314,
        "sched_getattr": 315, "renameat2": 316, "seccomp": 317, "getrandom": 318,
        "memfd_create": 319, "kexec_file_load": 320, "bpf": 321, "execveat": 322,
        "userfaultfd": 323, "membarrier": 324, "mlock2": 325, "copy_file_range": 326,
        "preadv2": 327, "pwritev2": 328, "pkey_mprotect": 329, "pkey_alloc": 330, "pkey_free": 331,
        "statx": 332, "io_pgetevents": 333, "rseq": 334, "pidfd_send_signal": 424,
        "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428,
        "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433,
        "pidfd_open": 434, "clone3": 435, "close_range": 436, "openat2": 437, "pidfd_getfd": 438,
        "faccessat2": 439, "process_madvise": 440, "epoll_pwait2": 441, "mount_setattr": 442,
        "quotactl_fd": 443, "landlock_create_ruleset": 444, "landlock_add_rule": 445,
        "landlock_restrict_self": 446, "memfd_secret": 447, "process_mrelease": 448,
        "futex_waitv": 449, "set_mempolicy_home_node": 450, "cachestat": 451, "fchmodat2": 452,
        "map_shadow_stack": 453, "futex_wake": 454, "futex_wait": 455, "futex_requeue": 456,
        "statmount": 457, "listmount": 458, "mseal": 462,
    },
)
# fmt: on
"""System call numbers by name: `NR.mmap`; `NR(9).name` is "mmap"."""


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
    try:
        return NR(nr).name
    except ValueError:
        return f"system call {nr}"
