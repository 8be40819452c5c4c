"""Progress for people: one line on a terminal, and nothing at all when stderr is none."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .stats import Progress, ProgressCallback
from .units import mib

if TYPE_CHECKING:
    from rich.progress import TaskID

QUIET_SECONDS = 1.0
"""A take that is done sooner shows nothing: a line that flashes by helps nobody."""


@contextmanager
def shown(fd: int = 2) -> Iterator[ProgressCallback | None]:
    """A callback that draws what it is told on the terminal `fd`; None when that is no terminal.

    The line is gone when the context ends, whatever ended it.
    """
    if not os.isatty(fd):
        yield None
        return
    line = _Line(fd)
    try:
        yield line
    finally:
        line.close()


class _Line:
    """Imports and starts rich only at the first report that is late enough."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._started = time.monotonic()
        self._bar: Any = None
        self._task: TaskID | None = None

    def __call__(self, progress: Progress) -> None:
        if self._bar is None:
            if time.monotonic() - self._started < QUIET_SECONDS:
                return
            self._open()
        self._bar.update(
            self._task,
            description=progress.phase,
            completed=progress.saved_bytes,
            total=progress.armed_bytes or None,
            saved=f"{mib(progress.saved_bytes)} of {mib(progress.armed_bytes)}",
            faults=f"{progress.faults} faults",
            rate=f"{mib(int(progress.rate))}/s",
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar.console.file.close()
            self._bar = None

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        stream = os.fdopen(os.dup(self._fd), "w")
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[saved]}  {task.fields[faults]}  {task.fields[rate]}"),
            console=Console(file=stream),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task("", total=None, saved="", faults="", rate="")
        self._bar.start()
