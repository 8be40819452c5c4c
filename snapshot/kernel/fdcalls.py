"""Descriptors that Python's os module cannot make or look into: tee(2), timerfd, signalfd,
inotify, file handles; and the table that they are in.

Everything raises OSError; the caller knows what the descriptor is for.
"""

from __future__ import annotations

import fcntl
import os
import resource
from contextlib import suppress

from ._native import lib

TFD_TIMER_ABSTIME = 1
TFD_TIMER_CANCEL_ON_SET = 2


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def reserve(count: int) -> None:
    """Makes the table of this process large enough for `count` descriptors, if it may have so many.
    It grows by itself, but where threads share it that takes 5 to 10 ms: it waits for RCU
    (expand_fdtable, fs/file.c). It never gets smaller."""
    highest = min(count, resource.getrlimit(resource.RLIMIT_NOFILE)[0]) - 1
    with suppress(OSError):
        some = os.open("/", os.O_PATH | os.O_CLOEXEC)
        try:
            os.close(fcntl.fcntl(some, fcntl.F_DUPFD_CLOEXEC, highest))
        finally:
            os.close(some)


def close_others(keep: set[int]) -> None:
    """Closes all descriptors of this process but these."""
    first = 0
    for fd in sorted(keep):
        if first < fd:  # os.closerange(0, 0) closes them all
            os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))


def tee(source: int, to: int, length: int) -> int:
    """Duplicate up to `length` bytes of one pipe into another, consuming nothing and not waiting.
    BlockingIOError: the source is empty."""
    return _checked(int(lib.snap_tee(source, to, length)))


def timerfd_create(clock: int, flags: int = 0) -> int:
    return _checked(int(lib.snap_timerfd_create(clock, flags)))


def timerfd_settime(fd: int, flags: int, value_ns: int, interval_ns: int) -> None:
    """Times in ns; a value of 0 disarms. OSError(ECANCELED) after a clock change is no failure."""
    _checked(int(lib.snap_timerfd_settime(fd, flags, value_ns, interval_ns)))


def timerfd_set_ticks(fd: int, ticks: int) -> None:
    """How often the timer has expired unread, at least 1. ENOTTY: not in this kernel."""
    _checked(int(lib.snap_timerfd_set_ticks(fd, ticks)))


def signalfd(mask: int, flags: int = 0) -> int:
    """Bit n-1 of the mask is signal n. Whoever reads it gets his own signals, not the maker's."""
    return _checked(int(lib.snap_signalfd(mask, flags)))


def inotify_create(flags: int = 0) -> int:
    return _checked(int(lib.snap_inotify_create(flags)))


def inotify_add(fd: int, path: bytes, mask: int) -> int:
    """-> the number of the watch; the next new one is one higher than any before."""
    return _checked(int(lib.snap_inotify_add(fd, path, mask)))


def inotify_remove(fd: int, watch: int) -> None:
    _checked(int(lib.snap_inotify_remove(fd, watch)))


def open_handle(mount: int, kind: int, handle: bytes) -> int:
    """O_PATH of the file that a handle names on the file system of descriptor `mount`. ESTALE: it
    is not there; needs CAP_DAC_READ_SEARCH."""
    return _checked(int(lib.snap_open_handle(mount, kind, handle, len(handle))))
