"""Missing pages served without a step of Python in between (native/fast_path.h)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ._native import ffi, lib
from .stored import Stored
from .uffd import MESSAGE_BYTES, UffdError

ROW = 4
"""Batches of faults, one right after the other, until the caller has its turn."""
GRACE_US = 50
"""A server runs before all others: a thread that it has just served may have been woken on this
very CPU, and gets there first."""


class Turn(NamedTuple):
    """What `FastPath.turn` did. An error is raised by the next one, when this one is accounted
    for."""

    faults: int
    filled: int  # pages that were put in place
    others: bool  # a watched descriptor can be read
    full: bool  # faults came as fast as they were served
    served: list[tuple[int, int]]  # address of a chunk, bitmap of its pages that are dealt with


class FastPath:
    def __init__(self, made: Any, stored: Stored) -> None:
        self._fast = ffi.gc(made, lib.snap_fast_path_free)
        self._stored = stored
        self._turn = ffi.new("snap_fast_turn *")
        self.timeout_ms = 0
        """`read_into` waits so long for a message or one of the descriptors that are watched."""

    @classmethod
    def new(cls, stored: Stored, uffd: int) -> FastPath | None:
        """For a userfaultfd that stays open. None: there is no memory for it."""
        made = lib.snap_fast_path_new(stored.handle, uffd)
        return cls(made, stored) if made else None

    def allow(self, start: int, end: int) -> None:
        """What is missing in [start, end) is in the image at the same address."""
        lib.snap_fast_path_allow(self._fast, start, end)

    def forbid(self, start: int, end: int) -> None:
        """Nothing in [start, end) is to be brought from the image any more."""
        lib.snap_fast_path_forbid(self._fast, start, end)

    def watch(self, descriptors: Sequence[int]) -> bool:
        """What `read_into` waits for besides. False: they are too many."""
        return bool(lib.snap_fast_path_watch(self._fast, descriptors, len(descriptors)) == 0)

    def pending(self) -> bool:
        """Whether there is a message to be read."""
        return bool(lib.snap_fast_path_pending(self._fast))

    def read_into(self, memory: Any, offset: int, most: int) -> int:
        """As Uffd.read_into, with the messages that are left to do: what was done `turn` has."""
        if offset + most * MESSAGE_BYTES > len(memory):
            raise ValueError("messages would not fit into the buffer")
        address = ffi.cast("char *", ffi.from_buffer(memory, require_writable=True)) + offset
        messages = ffi.cast("uffd_message *", address)
        turn, wait = lib.snap_fast_path_turn, self.timeout_ms
        return int(turn(self._fast, wait, messages, most, ROW, GRACE_US, self._turn))

    def turn(self) -> Turn:
        """Of the last `read_into`. UffdError when the userfaultfd could not be read any more."""
        turn = self._turn
        if turn.error and not turn.faults:
            raise UffdError("read(userfaultfd)", -turn.error)
        served = [(turn.chunks[i].address, turn.chunks[i].pages) for i in range(turn.count)]
        return Turn(turn.faults, turn.filled, turn.others > 0, turn.in_a_row == ROW, served)


def runs(pages: int) -> Iterator[tuple[int, int]]:
    """[first, end) of each run of set bits of a bitmap."""
    first = 0
    while pages:
        skip = (pages & -pages).bit_length() - 1
        pages >>= skip
        count = (~pages & pages + 1).bit_length() - 1
        yield first + skip, first + skip + count
        pages >>= count
        first += skip + count
