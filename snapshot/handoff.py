"""Work that several threads prepare and one thread carries out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

from .worker import Worker, clear_frames

T = TypeVar("T")


class Handoff(Generic[T]):
    """Takes items from any thread and gives `work` all that wait, in order, in a thread of its own.
    While that is busy (with the sync of a slow disk) the next ones gather; as long as they weigh
    `most` or more together, `give` waits. The thread lives inside `around`.

    The first exception of `work` ends it: `give` and `drain` raise it from then on.
    """

    def __init__(
        self,
        work: Callable[[list[T]], None],
        most: int,
        around: AbstractContextManager[None] | None = None,
    ) -> None:
        self._work = work
        self._most = most
        self._around = around or nullcontext()
        self._items: list[T] = []
        self._weight = 0
        self._busy = False
        self._closed = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._worker: Worker | None = None

    def give(self, item: T, weight: int) -> None:
        with self._changed:
            while self._weight >= self._most and not self._failure:
                self._changed.wait()
            self._check()
            self._items.append(item)
            self._weight += weight
            if self._worker is None:
                self._worker = Worker("snap-store", self._run)
            self._changed.notify_all()

    def drain(self) -> None:
        """Waits until everything given is done."""
        with self._changed:
            while (self._items or self._busy) and not self._failure:
                self._changed.wait()
            self._check()

    def close(self) -> None:
        """Ends the thread after what it does now; items that wait are dropped."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()
        if self._worker is not None:
            self._worker.join()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        with self._around:
            self._loop()

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not self._items and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                part, self._items, self._weight = self._items, [], 0
                self._busy = True
                self._changed.notify_all()
            try:
                self._work(part)
            except BaseException as error:
                clear_frames(error)
                part.clear()  # for the error keeps this frame too
                self._failure = error
                self._closed = True
            with self._changed:
                self._busy = False
                self._changed.notify_all()
