"""Missing pages served without a step of Python in between (native/fast_path.h)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ._native import ffi, lib
from .stored import Stored
from .uffd import UffdError, messages_at

RUN: int = lib.SNAP_FAST_RUN
"""Chunks that decoders are asked for and that are put in place together, when they follow each
other: each by itself would cost the server more than its pages."""
OWN: int = lib.SNAP_FAST_OWN
"""Beside the number of a slot in what `FastPath.stream` asks."""
GRACE_US = 50
"""A server runs before all others: a thread that it has just served may have been woken on this
very CPU, and gets there first."""


class Turn(NamedTuple):
    """What `FastPath.read_into` did."""

    faults: list[int]  # addresses of the chunks that were waited for
    filled: int  # pages that were put in place
    dealt_with: list[tuple[int, int]]  # [start, end) that is not missing any more
    others: bool  # a watched descriptor can be read
    lost: list[int]  # decoders that have ended
    streams: bool  # there are still chunks to be brought that nobody waits for


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

    def stream(self, memory: Any, each: int, pipes: Sequence[tuple[int, int]]) -> bool:
        """From here on `read_into` also brings what nobody waits for, from decoders: `pipes` are
        where to ask and who answers, -1 where there is none; each has `each` slots of RUN chunks of
        `memory`, a writable buffer. False: there are none, or too many."""
        if not pipes:
            return False
        self._memory = ffi.from_buffer(memory, require_writable=True)
        requests, answers = zip(*pipes, strict=True)
        count = len(pipes)
        error = lib.snap_fast_path_stream(
            self._fast, self._memory, count, each, requests, answers
        )
        return bool(error == 0)

    def alone(self) -> None:
        """Ends `stream`."""
        lib.snap_fast_path_alone(self._fast)

    def first(self, chunks: Sequence[int]) -> None:
        """Chunk addresses that are to be brought before all others."""
        lib.snap_fast_path_first(self._fast, chunks, len(chunks))

    def read_into(self, memory: Any, offset: int, most: int) -> int:
        """As Uffd.read_into, with the messages that are left to do: what was done `turn` has."""
        messages = messages_at(memory, offset, most)
        turn, wait = lib.snap_fast_path_turn, self.timeout_ms
        return int(turn(self._fast, wait, messages, most, GRACE_US, self._turn))

    def turn(self) -> Turn:
        """Of the last `read_into`. UffdError when that could do nothing more: after all that was
        done before."""
        turn = self._turn
        if turn.error and not turn.count:
            raise UffdError("userfaultfd", -turn.error)
        return Turn(
            list(turn.chunks[0 : turn.faults]),
            turn.filled,
            [(turn.ranges[i].start, turn.ranges[i].end) for i in range(turn.count)],
            turn.others > 0,
            [i for i in range(turn.lost.bit_length()) if turn.lost >> i & 1],
            turn.streams > 0,
        )
