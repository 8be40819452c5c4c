"""eventfd(2): count and semaphore mode."""

from __future__ import annotations

import os

from ..manifest import OpenFile, Record
from .openfile import Captured, Opening, Seen, Table, state_of

NAME = "eventfd"


class State(Record, frozen=True):
    count: int
    semaphore: bool = False


def recognise(seen: Seen, table: Table) -> bool:
    return seen.link == b"anon_inode:[eventfd]"


def capture(seen: Seen, table: Table) -> Captured:
    # hexadecimal: eventfd_show_fdinfo, fs/eventfd.c
    count = int(seen.value(b"eventfd-count:"), 16)
    semaphore = any(value != b"0" for value in seen.lines(b"eventfd-semaphore:"))
    return Captured("eventfd", State(count=count, semaphore=semaphore))


def open(file: OpenFile, opening: Opening) -> int:
    state = state_of(file, State)
    flags = os.EFD_CLOEXEC | (file.flags & os.O_NONBLOCK)
    fd = os.eventfd(0, flags | (os.EFD_SEMAPHORE if state.semaphore else 0))
    if state.count:
        os.eventfd_write(fd, state.count)
    return fd
