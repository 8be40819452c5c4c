"""Terminals other than those of stdin, stdout and stderr: the terminal of `snap restore`."""

from __future__ import annotations

import os
import stat

from ..manifest import OpenFile, Record
from .openfile import OPEN_ONCE, Captured, Opening, Seen, Table, reopen

NAME = "terminals"

_TTY = 4  # virtual consoles and serial lines
_TTY_AUX = 5  # /dev/tty 0, /dev/console 1, /dev/ptmx 2
_PTS = range(136, 144)


class State(Record, frozen=True):
    pass


def is_terminal(seen: Seen) -> bool:
    if not stat.S_ISCHR(seen.entry.mode):
        return False
    major, minor = os.major(seen.entry.rdev), os.minor(seen.entry.rdev)
    return major == _TTY or (major == _TTY_AUX and minor in (0, 1)) or major in _PTS


def recognise(seen: Seen, table: Table) -> bool:
    return is_terminal(seen)


def capture(seen: Seen, table: Table) -> Captured:
    return Captured(os.fsdecode(seen.link), State(), outside=True)


def open(file: OpenFile, opening: Opening) -> int:
    for fd in opening.ctx.stdio:
        if os.isatty(fd):
            try:
                return reopen(fd, file.flags)
            except OSError:  # its name is in another mount namespace, or another user's
                return os.dup(fd)
    opening.warn(file, "there is no terminal here; it is /dev/null")
    return os.open("/dev/null", (file.flags & ~OPEN_ONCE) | os.O_CLOEXEC)
