"""stdin, stdout and stderr that lead outside the process: those of `snap restore`."""

from __future__ import annotations

import fcntl
import os
import stat
from contextlib import suppress

from ..manifest import OpenFile, Record
from .openfile import STANDARD, Captured, Opening, Seen, Table, reopen, state_of

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
    """A duplicate of ours. If the program counts on O_NONBLOCK, a terminal or pipe is opened anew
    instead: setting the flag on the duplicate would set it for the caller's shell too."""
    ours = opening.ctx.stdio[state_of(file, State).stream]
    now = fcntl.fcntl(ours, fcntl.F_GETFL)
    wanted = file.flags & os.O_NONBLOCK and not now & os.O_NONBLOCK
    if wanted and (stat.S_ISFIFO(os.fstat(ours).st_mode) or os.isatty(ours)):
        with suppress(OSError):
            return reopen(ours, (now & os.O_ACCMODE) | os.O_NONBLOCK)
    return os.dup(ours)
