"""Pipes and FIFOs, with what is in them.

A pipe of which the process has only one end comes back without the other: a reader finds what was
in it at T0 and then the end, a writer gets EPIPE. A FIFO is opened again under its name.
"""

from __future__ import annotations

import array
import fcntl
import os
import select
import stat
import termios

from ..kernel import fdcalls
from ..manifest import OpenFile, Record
from . import files
from .openfile import (
    O_PATH,
    OPEN_ONCE,
    Captured,
    Opening,
    Problem,
    Seen,
    Table,
    reopen,
    set_flags,
    state_of,
)

NAME = "pipes"


class State(Record, frozen=True):
    device: int
    inode: int
    capacity: int  # bytes, F_GETPIPE_SZ
    path: bytes = b""  # of a FIFO
    packets: tuple[bytes, ...] = ()  # what is in it; more than one only with O_DIRECT
    filled: bool = False  # `packets` is here and not in another open file of the same pipe


def recognise(seen: Seen, table: Table) -> bool:
    if seen.flags & O_PATH:
        return False
    return seen.link.startswith(b"pipe:[") or stat.S_ISFIFO(seen.entry.mode)


def capture(seen: Seen, table: Table) -> Captured:
    ends = table.by_inode[seen.key]
    readers = [end for end in ends if end.access != os.O_WRONLY]
    writers = [end for end in ends if end.access != os.O_RDONLY]
    fifo = seen.link.startswith(b"/") and not files.name_of(seen)[1]
    filled = bool(readers) and readers[0] is seen
    with table.borrowed(seen) as fd:
        capacity = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
        packets = contents(fd, capacity) if filled and table.stopped else ()
        outside = not fifo and not (readers and writers)
        closed = outside and not _ended(fd)
    state = State(
        device=seen.entry.device,
        inode=seen.entry.inode,
        capacity=capacity,
        path=seen.link if fifo else b"",
        packets=packets,
        filled=filled,
    )
    return Captured(os.fsdecode(seen.link), state, outside, closed)


def _ended(fd: int) -> bool:
    """Is the other end closed everywhere?"""
    poll = select.poll()
    poll.register(fd, 0)  # only POLLHUP (of a reader) and POLLERR (of a writer)
    return bool(poll.poll(0))


def contents(fd: int, capacity: int) -> tuple[bytes, ...]:
    """What waits in the pipe behind a reading descriptor; nothing is consumed.

    With O_DIRECT writers each packet comes by itself, as read(2) would give it.
    """
    waiting = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, waiting)
    if not waiting[0]:
        return ()
    ours, fill = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.fcntl(fill, fcntl.F_SETPIPE_SZ, capacity)
        left = fdcalls.tee(fd, fill, waiting[0])
        packets = []
        while left > 0:
            packets.append(os.read(ours, left))
            left -= len(packets[-1])
        return tuple(packets)
    finally:
        os.close(ours)
        os.close(fill)


# --- restore -------------------------------------------------------------------------------------


def open(file: OpenFile, opening: Opening) -> int:
    state = state_of(file, State)
    key = (NAME, state.device, state.inode)
    if state.path:
        opening.shared(key, lambda: _open_fifo(state, file, opening))
        fd = os.open(state.path, (file.flags & ~OPEN_ONCE) | os.O_NONBLOCK | os.O_CLOEXEC)
    else:
        ends = opening.shared(key, lambda: _make(state, file, opening))
        fd = ends.take(file.flags)
    set_flags(fd, file.flags)
    return fd


class _Ends:
    """The two ends of a new pipe; each is given away once, further open files reopen it."""

    def __init__(self, opening: Opening) -> None:
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.fds = {
            os.O_RDONLY: opening.temporary(reader),
            os.O_WRONLY: opening.temporary(writer),
        }
        self.unused = {os.O_RDONLY, os.O_WRONLY}

    def take(self, flags: int) -> int:
        access = flags & os.O_ACCMODE
        if access in self.unused:
            self.unused.remove(access)
            return os.dup(self.fds[access])
        return reopen(self.fds[os.O_RDONLY], flags | os.O_NONBLOCK)


def _make(state: State, file: OpenFile, opening: Opening) -> _Ends:
    """A pipe with the content of T0."""
    ends = _Ends(opening)
    _fill(ends.fds[os.O_WRONLY], state, file, opening)
    return ends


def _open_fifo(state: State, file: OpenFile, opening: Opening) -> int:
    try:
        fd = opening.temporary(os.open(state.path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
    except FileNotFoundError:
        raise Problem(f"{os.fsdecode(state.path)}: there is no such FIFO") from None
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        raise Problem(f"{os.fsdecode(state.path)}: no longer a FIFO")
    _fill(fd, state, file, opening)
    return fd


def _fill(writer: int, state: State, file: OpenFile, opening: Opening) -> None:
    try:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, state.capacity)
    except OSError as error:
        opening.warn(file, f"its capacity is not {state.capacity} bytes: {error.strerror}")
    packets: tuple[bytes, ...] = ()
    for candidate in opening.of_kind(NAME):
        other = state_of(candidate, State)
        if other.filled and (other.device, other.inode) == (state.device, state.inode):
            packets = other.packets
    if len(packets) > 1:
        set_flags(writer, os.O_NONBLOCK | os.O_DIRECT)
    for packet in packets:
        if os.write(writer, packet) != len(packet):
            opening.warn(file, "not all that was in it fits")
    set_flags(writer, os.O_NONBLOCK)
