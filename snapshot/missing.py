"""Which pages of a process are still to come from an image, and from where in it. Pure.

A lazily restored process starts with everything missing. Pages leave this ledger when they are put
in place, unmapped, or given up by the process (they are zeros from then on); mremap moves them, so
the address where a page is wanted and its address in the image are kept apart. What is not in the
ledger and still faults is zeros.

Addresses are bytes, page aligned; ranges are half open.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_BEYOND = 1 << 64
"""More than any address."""


class Piece(NamedTuple):
    """[start, end) of the process is missing; its bytes are at `source` of the image."""

    start: int
    end: int
    source: int

    def within(self, start: int, end: int) -> Piece:
        """The part of it in [start, end), which must overlap it."""
        low, high = max(self.start, start), min(self.end, end)
        return Piece(low, high, self.source + low - self.start)


class Missing:
    """An interval map from addresses of the process to addresses of the image."""

    def __init__(self, pieces: Iterable[Piece] = ()) -> None:
        self._pieces = sorted(pieces)

    @classmethod
    def of(cls, ranges: Iterable[tuple[int, int]]) -> Missing:
        """Ranges whose bytes are in the image at the same addresses."""
        return cls(Piece(start, end, start) for start, end in ranges)

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def __iter__(self) -> Iterator[Piece]:
        return iter(self._pieces)

    def copy(self) -> Missing:
        """What a forked child misses."""
        return Missing(self._pieces)

    @property
    def size(self) -> int:
        """Bytes in the ledger, pages included that the image does not have."""
        return sum(piece.end - piece.start for piece in self._pieces)

    def at(self, address: int) -> Piece | None:
        """The piece that holds `address`."""
        index = self._index(address)
        if index < len(self._pieces) and self._pieces[index].start <= address:
            return self._pieces[index]
        return None

    def after(self, address: int) -> Piece | None:
        """What is missing at `address` or next above it; at the end, the lowest piece of all."""
        if not self._pieces:
            return None
        index = self._index(address)
        if index == len(self._pieces):
            return self._pieces[0]
        piece = self._pieces[index]
        return piece.within(address, piece.end) if piece.start < address else piece

    def within(self, start: int, end: int) -> list[Piece]:
        """The parts of pieces in [start, end)."""
        found = []
        for index in range(self._index(start), len(self._pieces)):
            piece = self._pieces[index]
            if piece.start >= end:
                break
            found.append(piece.within(start, end))
        return found

    def take(self, start: int, end: int) -> list[Piece]:
        """Takes [start, end) out of the ledger; what of it was missing."""
        if start >= end:
            return []  # nothing: it must not cut the piece that it lies in
        first = last = self._index(start)
        taken, left = [], []
        while last < len(self._pieces) and self._pieces[last].start < end:
            piece = self._pieces[last]
            taken.append(piece.within(start, end))
            if piece.start < start:
                left.append(piece.within(piece.start, start))
            if piece.end > end:
                left.append(piece.within(end, piece.end))
            last += 1
        self._pieces[first:last] = left
        return taken

    def move(self, old: int, new: int, length: int) -> None:
        """mremap: what was wanted in [old, old + length) is wanted at `new`; what was missing there
        was unmapped by it."""
        taken = self.take(old, old + length)
        self.take(new, new + length)
        for piece in taken:
            moved = Piece(piece.start - old + new, piece.end - old + new, piece.source)
            self._pieces.insert(self._index(moved.start), moved)

    def _index(self, address: int) -> int:
        """Of the first piece that ends above `address`."""
        index = bisect_right(self._pieces, (address, _BEYOND))  # tuples: a key is slow
        return index - (index > 0 and self._pieces[index - 1].end > address)
