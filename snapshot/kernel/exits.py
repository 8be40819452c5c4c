"""The thread that stays seized after T0, so that no process ends before its memory is saved."""

from __future__ import annotations

import errno
from typing import Any

from ..errors import KernelError
from ._native import ffi, lib
from .closing import Closing
from .errnames import error_text
from .ptrace import call_set


class Exits(Closing):
    """Holds the end of the process `pid` up, for at most `seconds`; native/exits.h.

    `again`: system calls that are made again when a signal that nobody handles interrupts them.
    """

    def __init__(self, pid: int, seconds: float, again: frozenset[int]) -> None:
        made = ffi.new("snap_exits **")
        result = lib.snap_exits_new(pid, max(1, int(seconds * 1000)), call_set(again), made)
        if result < 0:
            raise KernelError(f"memory: {error_text(result)}")
        self.handle: Any = made[0]
        """For C: snap_exits *."""

    def serve(self) -> bool:
        """By the OS thread whose tracees they are: until `end`, or they are all gone. They are let
        go when that thread ends, which it is to do at once. False: held up for too long."""
        return bool(lib.snap_exits_serve(self.handle) != -errno.ETIMEDOUT)

    def end(self) -> None:
        """From any thread, at any time."""
        lib.snap_exits_end(self.handle)

    def close(self) -> None:
        lib.snap_exits_free(self.handle)


def await_thread(tid: int) -> None:
    """Waits for the very end of an OS thread of this process that is about to end: when it has let
    its tracees go. `threading.Thread.join` returns before."""
    lib.snap_exits_await_thread(tid)
