"""Character devices without a state of their own: /dev/null, zero, full, random, urandom, and the
one that makes userfaultfds (a take that was killed may leave it in its target)."""

from __future__ import annotations

import os
import stat
from contextlib import suppress

from ..manifest import OpenFile, Record
from .openfile import OPEN_ONCE, Cannot, Captured, Opening, Seen, Table, set_flags, state_of

NAME = "devices"

HARMLESS = {
    (1, 3): "null",
    (1, 5): "zero",
    (1, 7): "full",
    (1, 8): "random",
    (1, 9): "urandom",
}
"""By (major, minor): Documentation/admin-guide/devices.txt."""
USERFAULTFD = "userfaultfd"
"""Its minor number is another at each boot."""


class State(Record, frozen=True):
    path: bytes  # in the image's words; the device number decides
    major: int
    minor: int


def recognise(seen: Seen, table: Table) -> bool:
    return stat.S_ISCHR(seen.entry.mode) or stat.S_ISBLK(seen.entry.mode)


def capture(seen: Seen, table: Table) -> Captured:
    major, minor = os.major(seen.entry.rdev), os.minor(seen.entry.rdev)
    if stat.S_ISBLK(seen.entry.mode) or not _name(major, minor):
        what = "block" if stat.S_ISBLK(seen.entry.mode) else "character"
        raise Cannot(f"{os.fsdecode(seen.link)}: {what} device {major}:{minor}")
    return Captured(os.fsdecode(seen.link), State(path=seen.link, major=major, minor=minor))


def _name(major: int, minor: int) -> str:
    """The file in /dev, or ''."""
    with suppress(OSError):
        if os.stat(f"/dev/{USERFAULTFD}").st_rdev == os.makedev(major, minor):
            return USERFAULTFD
    return HARMLESS.get((major, minor), "")


def open(file: OpenFile, opening: Opening) -> int:
    state = state_of(file, State)
    flags = (file.flags & ~OPEN_ONCE) | os.O_CLOEXEC
    try:
        fd = os.open(state.path, flags)
        number = os.fstat(fd).st_rdev
        if _name(os.major(number), os.minor(number)) != _name(state.major, state.minor):
            os.close(fd)
            raise FileNotFoundError
    except FileNotFoundError:
        fd = os.open(f"/dev/{_name(state.major, state.minor)}", flags)
    set_flags(fd, file.flags)
    return fd
