"""A process that ends this one when it stands still, so that its target is not kept waiting."""

from __future__ import annotations

from typing import Any

from ..errors import KernelError
from ._native import ffi, lib
from .closing import Closing
from .errnames import error_text


class Watchdog(Closing):
    """Kills this process (SIGKILL) when nobody has called `beat` for `seconds`, in which the
    machine ran; a context manager.

    The kernel lets the target go then: the last close of its userfaultfd and the end of its tracer.
    """

    def __init__(self, target: int, seconds: float) -> None:
        made = ffi.new("snap_watchdog **")
        result = lib.snap_watchdog_start(target, max(1, int(seconds * 1000)), made)
        if result < 0:
            raise KernelError(f"a watchdog process: {error_text(result)}", "ulimit -u")
        self.handle: Any = made[0]
        """For C: snap_watchdog *."""

    def beat(self) -> None:
        lib.snap_watchdog_beat(self.handle)

    def rest(self) -> None:
        """The target does not wait for this process any more, until the next beat."""
        lib.snap_watchdog_rest(self.handle)

    def know(self, uffd: int) -> None:
        """The target's userfaultfd, by which it is let go if this process is stuck in the kernel
        and does not even end when it is killed; -1: it is closed."""
        lib.snap_watchdog_know(self.handle, uffd)

    def close(self) -> None:
        lib.snap_watchdog_stop(self.handle)
