"""Signal-driven descriptors (O_ASYNC): who gets which signal when the file becomes ready."""

from __future__ import annotations

import fcntl
import os
import struct

from ..kernel.arch_x86_64 import NR
from ..manifest import OpenFile
from .openfile import FASYNC, Placing, Seen, Table

_F_SETOWN_EX, _F_GETOWN_EX = 15, 16
_F_SETSIG, _F_GETSIG = 10, 11
_OWNER = struct.Struct("ii")  # struct f_owner_ex: F_OWNER_TID 0, _PID 1, _PGRP 2; its number


def of(seen: Seen, table: Table) -> tuple[int, int, int] | None:
    """(F_OWNER_*, number, signal; 0 is SIGIO) of a file with O_ASYNC."""
    if not seen.flags & FASYNC:
        return None
    with table.borrowed(seen) as fd:
        kind, number = _OWNER.unpack(fcntl.fcntl(fd, _F_GETOWN_EX, bytes(_OWNER.size)))
        return kind, number, fcntl.fcntl(fd, _F_GETSIG)


def give(file: OpenFile, placing: Placing) -> None:
    """The same inside the new process: the owner must exist and O_ASYNC comes last."""
    if file.owner is None or file.id not in placing.fds:
        return
    kind, number, sent = file.owner
    fd = placing.fds[file.id][0]
    now = placing.call(NR.fcntl, fd, fcntl.F_GETFL)
    address = placing.remote.put(_OWNER.pack(kind, number))
    results = placing.calls(
        [
            (NR.fcntl, fd, _F_SETOWN_EX, address),
            (NR.fcntl, fd, _F_SETSIG, sent),
            (NR.fcntl, fd, fcntl.F_SETFL, now | FASYNC),
        ]
    )
    failed = next((result for result in results if result < 0), 0)
    if failed:
        placing.warn(file, f"does not signal its owner {number}: {os.strerror(-failed)}")
