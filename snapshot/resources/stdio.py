"""stdin, stdout and stderr that lead outside the process: those of `snap restore`."""

from __future__ import annotations

import os

from ..manifest import OpenFile, Record
from .openfile import STANDARD, Captured, Opening, Seen, Table, state_of

NAME = "stdio"


class State(Record, frozen=True):
    stream: int  # 0, 1 or 2


def recognise(seen: Seen, table: Table) -> bool:
    """Never by itself: descriptors.py knows which of the three lead outside."""
    return False


def stream_for_others(seen: Seen) -> int:
    """Which stream stands for further descriptors of a file that several of 0, 1 and 2 share (a
    terminal mostly): one that can be written to, if the file could."""
    standard = [fd for fd in seen.fds if fd in STANDARD]
    if seen.access == os.O_RDONLY:
        return standard[0]
    return next((fd for fd in (1, 2) if fd in standard), 0)


def capture(seen: Seen, table: Table) -> Captured:
    return Captured(os.fsdecode(seen.link), State(stream=stream_for_others(seen)))


def open(file: OpenFile, opening: Opening) -> int:
    return os.dup(opening.ctx.stdio[state_of(file, State).stream])
