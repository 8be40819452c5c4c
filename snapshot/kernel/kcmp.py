"""kcmp(2): whether two descriptors of a process have one struct file (of a whole table:
fdtable.entries), which file an epoll watches, which processes share their memory.

Needs ptrace access to the process and a kernel with CONFIG_KCMP.
"""

from __future__ import annotations

import errno

from ..errors import DeniedError, KernelError, TargetError
from ._native import lib
from .errnames import error_name

SAME = int(lib.SNAP_KCMP_SAME)
_ORDERS = (SAME, int(lib.SNAP_KCMP_LESS), int(lib.SNAP_KCMP_GREATER))


def same_file(pid: int, a: int, b: int) -> bool:
    """Have two descriptors one struct file?"""
    result = int(lib.snap_kcmp_file(pid, a, b))
    return checked(result, pid, f"descriptors {a} and {b}") == SAME


def same_memory(pid: int, other: int) -> bool:
    """Have two processes one address space (CLONE_VM)? False when one has ended."""
    return int(lib.snap_kcmp_memory(pid, other)) == SAME


def watches(pid: int, fd: int, epoll: int, number: int, nth: int = 0) -> bool:
    """Is descriptor `fd` the file that descriptor `epoll` watches as its `nth` registration (in
    the order of fdinfo) under the number `number`? False also when either is not there."""
    result = int(lib.snap_kcmp_epoll(pid, fd, epoll, number, nth))
    if result in (-errno.ENOENT, -errno.EBADF):
        return False
    return checked(result, pid, f"epoll descriptor {epoll}") == SAME


def checked(result: int, pid: int, what: str) -> int:
    """One of the three orders; DeniedError, TargetError or KernelError for -errno."""
    if result in _ORDERS:
        return result
    code = error_name(result)
    message = f"kcmp of {what} of process {pid}: {code}"
    if result == -errno.EPERM:
        raise DeniedError(message, f"sudo snap check {pid}")
    if result == -errno.ESRCH:
        raise TargetError(message, f"ps -p {pid}")
    raise KernelError(message, f"snap check {pid}")
