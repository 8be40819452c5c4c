"""The OS thread that makes the second stop, and stays the target's tracer while memory is unsaved.

A thread of the target can only be let go when it stands still, or by the end of its tracer: Linux
detaches what an ending thread has traced, wherever it is. So whoever stays has to be a thread that
can end, and as ptrace belongs to one OS thread it makes the whole stop.

Nothing of the caller's runs in it: hooks belong to the thread that has called `take`, and an
exception that interrupts that one (Ctrl-C) waits until the target runs on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from .errors import SnapError
from .kernel.closing import Closing
from .kernel.exits import Exits, await_thread
from .worker import Worker

T = TypeVar("T")

log = logging.getLogger("snap")


class Tracer(Closing):
    """For one stop. `close` returns when the target is let go, and has no tracer any more."""

    def __init__(self, exits: Exits, pid: int) -> None:
        self.exits = exits
        self._pid = pid
        self._changed = threading.Condition()
        self._work: Callable[[], None] | None = None
        self._asked: Callable[[], None] | None = None
        """What the calling thread is to do; None: nothing, or it is done."""
        self._failed: BaseException | None = None
        """How that, or the work, has ended."""
        self._over = False
        """The work has ended, well or not."""
        self._left = False
        """Nobody is in `run` any more."""
        self._closed = False
        self._gone = False
        self._worker = Worker("snap-tracer", self._live)

    # --- the thread that calls `take` -----------------------------------------------------------

    def run(self, work: Callable[[], T]) -> T:
        """Has the thread do `work`, which is the stop, and returns what that returns (or raises).
        If the target has stayed, the thread then serves it until the end of `exits`."""
        results: list[T] = []
        interrupted: BaseException | None = None
        try:
            with self._changed:
                self._work = lambda: results.append(work())
                self._changed.notify_all()
            while not self._over:
                try:
                    self._answer(interrupted)
                except BaseException as error:
                    interrupted = error
        finally:  # whatever Ctrl-C did between two lines
            with self._changed:
                self._left = True
                self._changed.notify_all()
        if interrupted is not None:
            raise interrupted
        if self._failed is not None:
            raise self._failed
        return results[0]

    def _answer(self, interrupted: BaseException | None) -> None:
        """Waits for the end of the work, or to be asked for a call."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._asked is not None)
            call = self._asked
        if call is None:
            return
        failed = interrupted
        if failed is None:
            try:
                call()
            except BaseException as error:
                failed = error
        with self._changed:
            self._asked, self._failed = None, failed
            self._changed.notify_all()

    # --- the thread of its own ------------------------------------------------------------------

    def elsewhere(self, call: Callable[[], None]) -> None:
        """In the work: the thread that has called `run` makes a call. Raises what that raises."""
        with self._changed:
            self._asked = call
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._asked is None or self._left)
            if self._failed is not None:
                raise self._failed
            if self._asked is not None:
                raise SnapError("the take was interrupted")

    def _live(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._work is not None or self._closed)
        if self._work is None:
            return
        failed = None
        try:
            self._work()
        except BaseException as error:
            failed = error
        with self._changed:
            self._over, self._failed = True, failed
            self._changed.notify_all()
        if failed is None and not self.exits.serve():
            log.info("%d: held up at its end for too long, let go", self._pid)

    # --- the end, any thread --------------------------------------------------------------------

    def let_go(self, seconds: float) -> bool:
        """Ends the serving; whether the target has no tracer: waits up to `seconds` for that."""
        self.exits.end()
        return self._work is None or self._ended(seconds)

    def _ended(self, seconds: float) -> bool:
        if not self._worker.wait(seconds):
            return False
        if not self._gone:  # later its number may be another's
            await_thread(self._worker.native_id)
            self._gone = True
        return True

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.exits.end()
        while not self._ended(1.0):
            continue
