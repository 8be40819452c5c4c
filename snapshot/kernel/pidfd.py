"""pidfd_open(2) and pidfd_getfd(2): a process held by a descriptor, and copies of its descriptors.

A copy shares the struct file with the original: offset and status flags are the target's. Close it
soon, a connection ends only with its last descriptor.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import DeniedError, KernelError, TargetError
from ._native import lib
from .errnames import error_name


def open(pid: int) -> int:
    """A pidfd of the process (close-on-exec). TargetError when there is no such process."""
    found = find(pid)
    if found < 0:
        raise TargetError(f"no process {pid}", f"ps -p {pid}")
    return found


THREAD = os.O_EXCL
"""PIDFD_THREAD: of one thread, with its own table of descriptors (Linux 6.9)."""


def find(pid: int, flags: int = 0) -> int:
    """The same; -1 when there is no such process, or this kernel knows no such flag. Its number may
    be a thread's by now, which the kernel calls ENOENT (EINVAL before Linux 6.16)."""
    try:
        return os.pidfd_open(pid, flags)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.ENOENT, errno.EINVAL):
            return -1
        message = f"pidfd_open of process {pid}: {error_name(error.errno or 0)}"
        raise KernelError(message, f"ps -p {pid}") from None


def getfd(pidfd: int, fd: int) -> int:
    """Descriptor `fd` of the process as one of ours (close-on-exec); the caller closes it.

    Raises DeniedError (no ptrace access), TargetError (gone), KernelError (not open there, …).
    """
    got = int(lib.snap_pidfd_getfd(pidfd, fd))
    if got >= 0:
        return got
    code = error_name(got)
    if got == -errno.EPERM:
        raise DeniedError(f"pidfd_getfd of descriptor {fd}: {code}", "sudo snap check PID")
    if got == -errno.ESRCH:
        raise TargetError(f"pidfd_getfd of descriptor {fd}: the process is gone", "snap list")
    raise KernelError(f"pidfd_getfd of descriptor {fd}: {code}", "snap check PID")


@contextmanager
def borrowed(pidfd: int, fd: int) -> Iterator[int]:
    """A copy of a descriptor of the process, closed at the end of the block."""
    copy = getfd(pidfd, fd)
    try:
        yield copy
    finally:
        os.close(copy)
