"""A gate for working threads: closed for a moment, it keeps them from beginning anything new."""

from __future__ import annotations

import threading
from types import TracebackType

_PATIENCE = 0.25
"""Seconds after which a thread goes through all the same: whoever has closed the gate may wait for
the very place that this thread would make free."""


class Gate:
    """Threads work inside `with gate:`. Closing it waits until none of them does."""

    def __init__(self) -> None:
        self._inside = 0
        self._closed = False
        self._changed = threading.Condition()

    def close(self, timeout: float) -> None:
        """Nobody begins any more; waits up to `timeout` seconds for those that have begun."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._inside, timeout)

    def open(self) -> None:
        with self._changed:
            self._closed = False
            self._changed.notify_all()

    def __enter__(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._closed, _PATIENCE)
            self._inside += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()
