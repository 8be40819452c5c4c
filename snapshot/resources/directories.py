"""Directories, and whatever was opened with O_PATH (which only names a place)."""

from __future__ import annotations

import os
import stat

from ..manifest import OpenFile, Record
from . import files
from .openfile import (
    O_PATH,
    OPEN_ONCE,
    Cannot,
    Captured,
    Opening,
    Problem,
    Seen,
    Table,
    set_flags,
    state_of,
)

NAME = "directories"


class State(Record, frozen=True):
    path: bytes
    device: int
    inode: int


def recognise(seen: Seen, table: Table) -> bool:
    return stat.S_ISDIR(seen.entry.mode) or bool(seen.flags & O_PATH)


def capture(seen: Seen, table: Table) -> Captured:
    if stat.S_ISLNK(seen.entry.mode):
        path, deleted = seen.link, not os.path.lexists(seen.link)
    else:
        path, deleted = files.name_of(seen)
    if deleted:
        raise Cannot(f"{os.fsdecode(path)}: a deleted directory, or a deleted place (O_PATH)")
    state = State(path=path, device=seen.entry.device, inode=seen.entry.inode)
    return Captured(os.fsdecode(path), state)


def open(file: OpenFile, opening: Opening) -> int:
    state = state_of(file, State)
    flags = file.flags & ~OPEN_ONCE
    if file.flags & O_PATH:
        flags |= file.flags & os.O_NOFOLLOW
    try:
        fd = os.open(state.path, flags | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "nothing there" if isinstance(error, FileNotFoundError) else "no longer a directory"
        raise Problem(f"{os.fsdecode(state.path)}: {what}") from None
    now = os.fstat(fd)
    if (now.st_dev, now.st_ino) != (state.device, state.inode):
        opening.warn(file, "another one has this name now")
    if not file.flags & O_PATH:
        os.lseek(fd, file.offset, os.SEEK_SET)
        set_flags(fd, file.flags)
    return fd
