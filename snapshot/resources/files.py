"""Regular files: opened again by name, or, when deleted, rebuilt from the bytes of T0.

A file on tmpfs or a memfd that has no name is memory of the process: see memfd.py. File locks are
in locks.py.
"""

from __future__ import annotations

import os
import stat

from ..kernel import filesystem
from ..manifest import OpenFile, Record
from ..units import MIB, mib
from . import locks, memfd
from .openfile import (
    O_PATH,
    OPEN_ONCE,
    STANDARD,
    Cannot,
    Captured,
    Opening,
    Placing,
    Problem,
    Seen,
    Table,
    reopen,
    set_flags,
    state_of,
)

NAME = "files"

DELETED_LIMIT = 64 * MIB
"""The bytes of a larger deleted file are not kept."""
DELETED = b" (deleted)"
_PIECE = 16 * MIB


class State(Record, frozen=True):
    path: bytes
    device: int
    inode: int
    size: int
    mode: int
    deleted: bool = False
    data: tuple[tuple[int, bytes], ...] = ()  # (offset, bytes) of a deleted file, holes left out
    copied: bool = False  # `data` is here and not in another open file of the same inode
    locks: tuple[locks.Lock, ...] = ()
    inside: bool = False  # a file of /proc about the process itself: only it can open it


def recognise(seen: Seen, table: Table) -> bool:
    return stat.S_ISREG(seen.entry.mode) and not seen.flags & O_PATH and seen.link[:1] == b"/"


def capture(seen: Seen, table: Table) -> Captured:
    path, deleted = name_of(seen)
    held = locks.parse(seen)
    data: tuple[tuple[int, bytes], ...] = ()
    copied = False
    if deleted:
        copied = table.by_inode[seen.key][0] is seen
        _refuse_large(seen, path)
        if copied and table.stopped:
            data = _contents(seen, table)
    state = State(
        path=path,
        device=seen.entry.device,
        inode=seen.entry.inode,
        size=seen.entry.size,
        mode=stat.S_IMODE(seen.entry.mode),
        deleted=deleted,
        data=data,
        copied=copied,
        locks=held,
        inside=path.startswith(b"/proc/%d/" % table.pid),
    )
    return Captured(os.fsdecode(path) + (" (deleted)" if deleted else ""), state)


def name_of(seen: Seen) -> tuple[bytes, bool]:
    """(path, deleted). Cannot when the file is not what the path names for us."""
    if _is(seen, seen.link):
        return seen.link, False
    if seen.link.endswith(DELETED):
        path = seen.link.removesuffix(DELETED)
        # A name that came back as a link to the same file is a name again.
        return path, not _is(seen, path)
    raise Cannot(f"{os.fsdecode(seen.link)}: the name leads elsewhere in this mount namespace")


def _is(seen: Seen, path: bytes) -> bool:
    try:
        found = os.stat(path)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == seen.key


def _refuse_large(seen: Seen, path: bytes) -> None:
    used = min(seen.entry.size, seen.entry.blocks * 512)
    if used > DELETED_LIMIT:
        raise Cannot(
            f"{os.fsdecode(path)}: deleted, and its {mib(used)} are more than the"
            f" {mib(DELETED_LIMIT)} that are kept"
        )


def _contents(seen: Seen, table: Table) -> tuple[tuple[int, bytes], ...]:
    """The bytes of a deleted file without its holes, through a descriptor of our own."""
    pieces: list[tuple[int, bytes]] = []
    fd = os.open(table.path(seen), os.O_RDONLY | os.O_CLOEXEC)
    try:
        for start, end in filesystem.data_ranges(fd, seen.entry.size):
            at = start
            while at < end:
                piece = os.pread(fd, min(_PIECE, end - at), at)
                if not piece:
                    break
                pieces.append((at, piece))
                at += len(piece)
    finally:
        os.close(fd)
    return tuple(pieces)


# --- restore -------------------------------------------------------------------------------------


def open(file: OpenFile, opening: Opening) -> int:
    state = state_of(file, State)
    if state.inside:
        return _placeholder(file)
    flags = file.flags & ~(OPEN_ONCE | os.O_DIRECTORY)  # O_TMPFILE includes it
    memory = memfd.object_of(state.device, state.inode, opening)
    if memory is not None:
        fd = reopen(memory, flags)
    elif state.deleted:
        fd = reopen(_rebuilt(state, opening), flags)
    else:
        try:
            # Not to wait for ever where a FIFO has the name now; `set_flags` puts it right.
            fd = os.open(state.path, flags | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            standard = sorted(set(opening.fds.get(file.id, ())) & set(STANDARD))
            if not standard:
                raise Problem(f"{os.fsdecode(state.path)}: there is no such file") from None
            opening.warn(file, "there is no such file; it is now that of `snap restore`")
            return os.dup(opening.ctx.stdio[standard[-1]])
        _compare(file, state, fd, opening)
    os.lseek(fd, file.offset, os.SEEK_SET)
    set_flags(fd, file.flags)
    locks.take(file, state.locks, fd, opening)
    return fd


def _compare(file: OpenFile, state: State, fd: int, opening: Opening) -> None:
    now = os.fstat(fd)
    if not stat.S_ISREG(now.st_mode):
        os.close(fd)
        raise Problem(f"{os.fsdecode(state.path)}: no longer a regular file")
    if (now.st_dev, now.st_ino) != (state.device, state.inode):
        opening.warn(file, "another file has this name now")
    if now.st_size < file.offset <= state.size:
        opening.warn(file, f"{now.st_size} bytes are left of it, its offset is {file.offset}")


def _rebuilt(state: State, opening: Opening) -> int:
    """A file without a name that holds the bytes of T0, shared by all that had it open."""

    def make() -> int:
        directory = os.path.dirname(state.path)
        fd = filesystem.unnamed_file(directory, state.mode)
        opening.temporary(fd)
        os.ftruncate(fd, state.size)
        for candidate in opening.of_kind(NAME):
            other = state_of(candidate, State)
            if other.copied and (other.device, other.inode) == (state.device, state.inode):
                for offset, data in other.data:
                    filesystem.pwrite_all(fd, data, offset)
        return fd

    return opening.shared((NAME, state.device, state.inode), make)


def _placeholder(file: OpenFile) -> int:
    """/proc/PID does not exist before the process does: `finish` opens the real one."""
    return os.open("/dev/null", (file.flags & os.O_ACCMODE) | os.O_CLOEXEC)


def finish(file: OpenFile, placing: Placing) -> None:
    state = state_of(file, State)
    if state.inside:
        # Through /proc/self: with --pid new our own /proc knows the process by another number.
        about = b"/proc/self/" + state.path.split(b"/", 3)[3]
        placing.replace(file, about, file.flags & ~OPEN_ONCE, file.offset)
    locks.take_inside(file, state.locks, placing)
