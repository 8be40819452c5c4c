"""signalfd(2): its mask. What it reads are the signals pending for the reader."""

from __future__ import annotations

import os

from ..kernel import fdcalls
from ..manifest import OpenFile, Record
from .openfile import Captured, Opening, Seen, Table, state_of

NAME = "signalfd"


class State(Record, frozen=True):
    mask: int  # bit n-1 is signal n


def recognise(seen: Seen, table: Table) -> bool:
    return seen.link == b"anon_inode:[signalfd]"


def capture(seen: Seen, table: Table) -> Captured:
    mask = int(seen.value(b"sigmask:"), 16)
    return Captured(f"signalfd {mask:#x}", State(mask=mask))


def open(file: OpenFile, opening: Opening) -> int:
    return fdcalls.signalfd(state_of(file, State).mask, file.flags & os.O_NONBLOCK)
