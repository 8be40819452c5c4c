"""kcmp(2): which descriptors of a process are the same struct file, which file an epoll watches,
which processes share their memory.

Needs ptrace access to the process and a kernel with CONFIG_KCMP.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

from ..errors import DeniedError, KernelError, TargetError
from ._native import ffi, lib
from .errnames import error_name

SAME = int(lib.SNAP_KCMP_SAME)
_ORDERS = (SAME, int(lib.SNAP_KCMP_LESS), int(lib.SNAP_KCMP_GREATER))


def groups(pid: int, fds: Iterable[int]) -> list[list[int]]:
    """Descriptors by struct file: each group ascending, groups by their lowest descriptor.

    The kernel orders struct files, so this sorts: O(n log n) calls of about 0.5 µs.
    """
    ascending = sorted(fds)
    if len(ascending) < 2:
        return [ascending] if ascending else []
    numbers, same = ffi.new("int[]", ascending), bytearray(len(ascending))
    result = lib.snap_kcmp_sort(pid, numbers, ffi.from_buffer(same), len(ascending))
    if result < 0:
        _checked(result, pid, f"descriptors {ascending[0]} to {ascending[-1]}")
    together: list[list[int]] = []
    for fd, joins in zip(numbers, same, strict=True):
        if joins:
            together[-1].append(fd)
        else:
            together.append([fd])
    return sorted(together)


def same_memory(pid: int, other: int) -> bool:
    """Have two processes one address space (CLONE_VM)? False when one has ended."""
    return int(lib.snap_kcmp_memory(pid, other)) == SAME


def watches(pid: int, fd: int, epoll: int, number: int, nth: int = 0) -> bool:
    """Is descriptor `fd` the file that descriptor `epoll` watches as its `nth` registration (in
    the order of fdinfo) under the number `number`? False also when either is not there."""
    result = int(lib.snap_kcmp_epoll(pid, fd, epoll, number, nth))
    if result in (-errno.ENOENT, -errno.EBADF):
        return False
    return _checked(result, pid, f"epoll descriptor {epoll}") == SAME


def _checked(result: int, pid: int, what: str) -> int:
    if result in _ORDERS:
        return result
    code = error_name(result)
    message = f"kcmp of {what} of process {pid}: {code}"
    if result == -errno.EPERM:
        raise DeniedError(message, f"sudo snap check {pid}")
    if result == -errno.ESRCH:
        raise TargetError(message, f"ps -p {pid}")
    raise KernelError(message, f"snap check {pid}")
