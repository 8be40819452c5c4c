"""Threads that work when nobody else wants the processor."""

from __future__ import annotations

import functools
import os
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

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
    that they go on at all where others leave them nothing.
    """

    def __init__(self) -> None:
        self._changed = threading.Lock()
        self._threads: dict[int, tuple[int, int]] = {}
        self._hurried = False

    def __enter__(self) -> None:
        own = threading.get_native_id()
        with self._changed:
            self._threads[own] = _times(own)
            _schedule(own, self._policy(starved=False))

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

    def hurry(self) -> None:
        """All of them are ordinary threads until `calm`."""
        self._schedule_all(hurried=True)

    def calm(self) -> None:
        self._schedule_all(hurried=False)

    def _schedule_all(self, *, hurried: bool) -> None:
        with self._changed:
            self._hurried = hurried
            for thread in self._threads:
                _schedule(thread, self._policy(starved=False))

    def balance(self) -> None:
        """Who got next to nothing since the last call is an ordinary thread until the next."""
        with self._changed:
            for thread, (ran, waited) in self._threads.items():
                now = self._threads[thread] = _times(thread)
                waited = now[1] - waited
                starved = waited > max(_WAITED_NS, _WAITED_PART * (now[0] - ran))
                _schedule(thread, self._policy(starved=starved))

    def _policy(self, *, starved: bool) -> int:
        if not _returns():
            return os.SCHED_BATCH
        if self._hurried:
            return os.SCHED_OTHER
        return os.SCHED_BATCH if starved else os.SCHED_IDLE


def _times(thread: int) -> tuple[int, int]:
    """How long it has run, and been ready and not run, in ns. Zeros where the kernel does not tell
    (CONFIG_SCHED_INFO)."""
    with suppress(OSError, ValueError):
        ran, waited, _ = Path(f"/proc/self/task/{thread}/schedstat").read_bytes().split()
        return int(ran), int(waited)
    return 0, 0


def _schedule(thread: int, policy: int) -> None:
    """What the caller has made of itself (a realtime policy, say) is not touched."""
    with suppress(OSError):
        if os.sched_getscheduler(thread) in (os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_IDLE):
            os.sched_setscheduler(thread, policy, os.sched_param(0))


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
