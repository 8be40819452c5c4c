"""Threads that work when nobody else wants the processor."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

from ..errors import KernelError
from ._native import ffi, lib
from .errnames import error_text


class Background:
    """Threads enter it with `with background:`; they run after all ordinary ones (SCHED_IDLE), who
    take a processor from them at once. Where the kernel would not let them back (RLIMIT_NICE,
    without CAP_SYS_NICE) they stay ordinary, and only do not take a processor from others when they
    wake up (SCHED_BATCH).

    Where others leave them nothing they go on all the same, as ordinary threads for most of the
    time: one of them may hold the interpreter lock, so this is seen to in C.

    `hurry` is for who waits for something that one of them may hold. `keep_off` leaves processors
    to others altogether: who has to take one from a thread, even from one of these, gets it 12 us
    later than one that is free (measured on virtual ones).
    """

    def __init__(self) -> None:
        made = ffi.new("snap_background **")
        _check(lib.snap_background_new(_returns(), made))
        self._policies = ffi.gc(made[0], lib.snap_background_free)
        self._changed = threading.Lock()
        self._threads: set[int] = set()
        self._hurried = False
        self._may_run_on = os.sched_getaffinity(0)
        self._processors = self._may_run_on
        self._beside: set[int] = set()

    def __enter__(self) -> None:
        own = threading.get_native_id()
        _check(lib.snap_background_enter(self._policies))
        with self._changed:
            self._threads.add(own)
            _place(own, self._processors)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        own = threading.get_native_id()
        with self._changed:
            self._threads.remove(own)
            _place(own, self._may_run_on)
        lib.snap_background_leave(self._policies)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """The calling thread keeps off like them, and is scheduled as it wants."""
        own = threading.get_native_id()
        with self._changed:
            self._beside.add(own)
            _place(own, self._processors)
        try:
            yield
        finally:
            with self._changed:
                self._beside.remove(own)
                _place(own, self._may_run_on)

    def keep_off(self, processors: frozenset[int]) -> None:
        """Until the next call; not off all that there are."""
        with self._changed:
            left = self._may_run_on - processors or self._may_run_on
            if left == self._processors:
                return
            self._processors = left
            for thread in (*self._beside, *(() if self._hurried else self._threads)):
                _place(thread, left)

    def nudge(self, processors: frozenset[int]) -> None:
        """Until the next call: who runs on these shall not wait for them when he wakes up."""
        shared = processors & self._processors
        lib.snap_background_nudge(self._policies, sum(1 << one for one in shared if one < 64))

    def hurry(self) -> None:
        """All of them are ordinary threads, and run anywhere, until `calm`."""
        self._hurry(True)

    def calm(self) -> None:
        self._hurry(False)

    def _hurry(self, hurried: bool) -> None:
        lib.snap_background_hurry(self._policies, hurried)
        with self._changed:
            self._hurried = hurried
            for thread in self._threads:
                _place(thread, self._may_run_on if hurried else self._processors)


def _check(result: int) -> None:
    if result < 0:
        raise KernelError(f"threads in the background: {error_text(result)}", "free -m")


def _place(thread: int, processors: set[int]) -> None:
    with suppress(OSError):
        os.sched_setaffinity(thread, processors)


@functools.cache
def _returns() -> bool:
    """Whether a thread may come back from SCHED_IDLE: tried by one of its own."""
    allowed = False

    def attempt() -> None:
        nonlocal allowed
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
            allowed = True

    thread = threading.Thread(target=attempt, name="snap-attempt")
    thread.start()
    thread.join()
    return allowed
