"""File locks: seen in fdinfo, taken again where nobody else holds them.

flock and OFD locks belong to the struct file and are taken in `snap`; POSIX locks belong to the
process and are taken inside it. Leases are not put back.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Literal

from ..kernel.arch_x86_64 import NR
from ..manifest import OpenFile, Record
from .openfile import Opening, Placing, Seen

_FLOCK = struct.Struct("=hhxxxxqqixxxx")  # struct flock of x86-64: type, whence, start, len, pid
_KINDS: dict[bytes, Literal["flock", "ofd", "posix", "lease"]] = {
    b"FLOCK": "flock",
    b"OFDLCK": "ofd",
    b"POSIX": "posix",
}
F_OFD_SETLK = 37


class Lock(Record, frozen=True):
    kind: Literal["flock", "ofd", "posix", "lease"]
    write: bool
    start: int = 0  # bytes
    length: int = 0  # bytes, 0: to the end of the file, however long it grows


def parse(seen: Seen) -> tuple[Lock, ...]:
    """The `lock:` lines, e.g. `1: POSIX  ADVISORY  WRITE 359 00:13:11691 0 EOF` (proc_locks(5))."""
    found = []
    for line in seen.lines(b"lock:"):
        fields = line.split()
        if len(fields) < 8:
            continue
        start, end = int(fields[6]), fields[7]
        found.append(
            Lock(
                kind=_KINDS.get(fields[1], "lease"),
                write=fields[3] == b"WRITE",
                start=start,
                length=0 if end == b"EOF" else int(end) - start + 1,
            )
        )
    return tuple(found)


def take(file: OpenFile, locks: tuple[Lock, ...], fd: int, opening: Opening) -> None:
    """The locks of the struct file."""
    for lock in locks:
        try:
            if lock.kind == "flock":
                how = fcntl.LOCK_EX if lock.write else fcntl.LOCK_SH
                fcntl.flock(fd, how | fcntl.LOCK_NB)
            elif lock.kind == "ofd":
                fcntl.fcntl(fd, F_OFD_SETLK, _packed(lock))
            elif lock.kind == "lease":
                opening.warn(file, "its lease was not taken again")
        except OSError as error:
            opening.warn(file, f"its {_name(lock)} was not taken again: {_why(error.errno)}")


def take_inside(file: OpenFile, locks: tuple[Lock, ...], placing: Placing) -> None:
    """The locks of the process."""
    for lock in locks:
        if lock.kind != "posix":
            continue
        address = placing.remote.put(_packed(lock))
        fd = placing.fds[file.id][0]
        result = placing.call(NR.fcntl, fd, fcntl.F_SETLK, address)
        if result < 0:
            placing.warn(file, f"its {_name(lock)} was not taken again: {_why(-result)}")


def _packed(lock: Lock) -> bytes:
    kind = fcntl.F_WRLCK if lock.write else fcntl.F_RDLCK
    return _FLOCK.pack(kind, os.SEEK_SET, lock.start, lock.length, 0)


def _name(lock: Lock) -> str:
    until = lock.start + lock.length if lock.length else "the end"
    return f"{'write' if lock.write else 'read'} lock ({lock.kind}) of [{lock.start}, {until})"


def _why(code: int | None) -> str:
    if code in (errno.EAGAIN, errno.EACCES):
        return "another process holds it"
    return os.strerror(code or 0)
