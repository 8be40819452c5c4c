"""Threads that work when nobody else wants the processor."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

from .busy import times

_WAITED_NS = 50_000_000
_WAITED_PART = 4
"""A thread is starved that waited for a processor for so long, and so many times as long as it
ran."""


class Background:
    """Threads enter it with `with background:`; they run after all ordinary ones (SCHED_IDLE), who
    take a processor from them at once. Where the kernel would not let them back (RLIMIT_NICE,
    without CAP_SYS_NICE) they stay ordinary, and only do not take a processor from others when they
    wake up (SCHED_BATCH).

    `hurry` is for who waits for something that one of them may hold, such as the interpreter lock:
    on a busy machine it might not run for long. `balance`, called in regular intervals, sees to it
    that they go on at all where others leave them nothing. `keep_off` leaves processors to others
    altogether: who has to take one from a thread, even from one of these, gets it 12 us later than
    one that is free (measured on virtual ones).
    """

    def __init__(self) -> None:
        self._changed = threading.Lock()
        self._threads: dict[int, tuple[int, int]] = {}
        self._hurried = False
        self._may_run_on = os.sched_getaffinity(0)
        self._processors = self._may_run_on
        self._beside: set[int] = set()

    def __enter__(self) -> None:
        own = threading.get_native_id()
        with self._changed:
            self._threads[own] = times("self", own)
            _schedule(own, self._policy(starved=False))
            _place(own, self._processors)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        own = threading.get_native_id()
        with self._changed:  # from here on its number may be another's
            del self._threads[own]
            _schedule(own, os.SCHED_OTHER)
            _place(own, self._may_run_on)

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

    def hurry(self) -> None:
        """All of them are ordinary threads, and run anywhere, until `calm`."""
        self._schedule_all(hurried=True)

    def calm(self) -> None:
        self._schedule_all(hurried=False)

    def _schedule_all(self, *, hurried: bool) -> None:
        with self._changed:
            self._hurried = hurried
            for thread in self._threads:
                _schedule(thread, self._policy(starved=False))
                _place(thread, self._may_run_on if hurried else self._processors)

    def balance(self) -> None:
        """Who got next to nothing since the last call is an ordinary thread until the next."""
        with self._changed:
            for thread, (ran, waited) in self._threads.items():
                now = self._threads[thread] = times("self", thread)
                waited = now[1] - waited
                starved = waited > max(_WAITED_NS, _WAITED_PART * (now[0] - ran))
                _schedule(thread, self._policy(starved=starved))

    def _policy(self, *, starved: bool) -> int:
        if not _returns():
            return os.SCHED_BATCH
        if self._hurried:
            return os.SCHED_OTHER
        return os.SCHED_BATCH if starved else os.SCHED_IDLE


def _schedule(thread: int, policy: int) -> None:
    """What the caller has made of itself (a realtime policy, say) is not touched."""
    with suppress(OSError):
        if os.sched_getscheduler(thread) in (os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_IDLE):
            os.sched_setscheduler(thread, policy, os.sched_param(0))


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
