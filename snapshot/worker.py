"""A thread of ours, whose end can be waited for whatever interrupts the waiting."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


class Worker:
    """A daemon thread that does `work` once. Not `threading.Thread.join`: an exception in it
    (Ctrl-C) makes Python 3.11 take a thread that runs for one that has ended."""

    def __init__(self, name: str, work: Callable[[], object]) -> None:
        self._work = work
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def native_id(self) -> int:
        assert self._thread.native_id is not None  # known when `start` returns
        return self._thread.native_id

    def wait(self, seconds: float) -> bool:
        """Whether the work has ended; waits up to `seconds` for it."""
        return self._ended.wait(seconds)

    def join(self) -> None:
        """Waits for the end of the work. An exception meanwhile is raised then, not before."""
        interrupted: BaseException | None = None
        while not self._ended.is_set():
            try:
                self._ended.wait()
            except BaseException as error:
                interrupted = interrupted or error
        if interrupted is not None:
            raise interrupted

    def _run(self) -> None:
        with suppress(OSError):  # for who looks at our threads: ps, gdb, the watchdog
            Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(self._thread.name)
        try:
            self._work()
        finally:
            self._ended.set()


def clear_frames(error: BaseException | None) -> None:
    """For who keeps an error: its frames, and those of the errors that it came from, hold views of
    memory that is to be closed. Frames that are running are left, those of other threads that
    raise the same error as well."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
