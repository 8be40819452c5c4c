"""Many questions put to a stopped thread in one round trip.

Each resource module adds its system calls to an Inquiry and says where their answers are written;
the Inquiry is built once and run in every thread. Only running it costs pause: what the answers
mean is worked out after the target runs on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from ..kernel.remote import CAPACITY, Call, Packed, pack

if TYPE_CHECKING:
    from ..kernel.remote import Remote

T_co = TypeVar("T_co", covariant=True)


class Slot(NamedTuple):
    """Bytes of the data area that a call writes: [address, address + size) in the target."""

    round: int
    offset: int
    size: int
    address: int


class Answers:
    """What one run brought back."""

    def __init__(self, results: list[int], data: list[bytes]) -> None:
        self._results = results
        self._data = data

    @classmethod
    def single(cls, results: list[int], data: bytes) -> Answers:
        """Of an inquiry that was one batch."""
        return cls(results, [data])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Answers):
            return NotImplemented
        return (self._results, self._data) == (other._results, other._data)

    __hash__ = None  # type: ignore[assignment]

    def result(self, call: int) -> int:
        """The raw result of a call, -errno when it failed."""
        return self._results[call]

    def bytes(self, slot: Slot) -> bytes:
        """What was written to `slot`. Meaningless when its call failed: look at `result` first."""
        return self._data[slot.round][slot.offset : slot.offset + slot.size]


class Inquiry:
    """System calls and room for their answers in [data, data + size) of the target.

    When the room is used up the calls go in a further batch; a call may only use slots that were
    reserved since the call before it.
    """

    def __init__(self, data: int, size: int) -> None:
        self._data = data
        self._size = size
        self._rounds: list[list[Call]] = [[]]
        self._used = [0]
        self._count = 0

    def space(self, size: int) -> Slot:
        """Reserve `size` bytes, aligned to 8."""
        size = -(-size // 8) * 8
        if self._used[-1] + size > self._size:
            self._rounds.append([])
            self._used.append(0)
        offset = self._used[-1]
        self._used[-1] += size
        return Slot(len(self._rounds) - 1, offset, size, self._data + offset)

    def call(self, nr: int, *args: int) -> int:
        """Add a call; the number to ask `Answers.result` with."""
        self._rounds[-1].append(Call(nr, args))
        self._count += 1
        return self._count - 1

    def packed(self) -> Packed | None:
        """All of it as one batch; None: it is more."""
        if len(self._rounds) > 1 or self._count > CAPACITY:
            return None
        return Packed(self._rounds[0], pack(self._rounds[0]), self._used[0])

    def run(self, remote: Remote, packed: Packed | None = None) -> Answers:
        """Make the calls in the thread of `remote`. `packed`: all of them, if that is known."""
        if packed is not None:
            return Answers.single(remote.ask(packed), remote.get(self._data, packed.size))
        results: list[int] = []
        data = []
        for calls, used in zip(self._rounds, self._used, strict=True):
            results += remote.batch(calls)
            data.append(remote.get(self._data, used) if used else b"")
        return Answers(results, data)


Answer = Callable[[Answers], T_co]
"""What a module leaves behind when it has asked: turns the answers into its state."""
