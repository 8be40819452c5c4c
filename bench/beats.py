"""`targets/beats.c`: when a processor of this machine did not run, which is its host's doing."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from .commands import Failed
from .targets import BIN, build, numbers

Span = tuple[int, int]
"""Begin and end, ns of CLOCK_MONOTONIC."""


def union(spans: Iterable[Span]) -> list[Span]:
    """What any of them covers, in order."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def overlap(spans: Sequence[Span], begin: int, end: int) -> int:
    """ns of [begin, end) that the spans, which do not overlap each other, have."""
    return sum(max(0, min(end, last) - max(begin, first)) for first, last in spans)


class Beats:
    """Started; `stop` ends it -> when there was a processor that did not run."""

    def __init__(self, directory: Path) -> None:
        build()
        self._log = directory / "beats.log"
        words = [str(BIN / "beats"), "--log", str(self._log)]
        self.process = subprocess.Popen(words, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)

    def stop(self) -> list[Span]:
        assert self.process.stderr is not None
        self.process.terminate()
        notes = self.process.stderr.read().decode()
        if self.process.wait():
            raise Failed(f"beats: {notes}")
        return union((due, came) for _, due, came in numbers(self._log, 3))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
