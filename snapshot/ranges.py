"""Sets of half-open integer ranges [start, end), kept sorted, disjoint and merged. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

from .units import align_down, align_up


class Ranges:
    """A set of integers (addresses, offsets) held as ranges; touching ranges become one.

    Kept as one flat sorted list of bounds, start and end in turn: a position found by bisection
    lies inside a range exactly when its index is odd. Every operation below rests on that.
    """

    __slots__ = ("_bounds",)

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._bounds: list[int] = []
        for start, end in ranges:
            self.add(start, end)

    def add(self, start: int, end: int) -> None:
        """Adds [start, end); nothing when it is empty. ValueError when end < start."""
        if _is_empty(start, end):
            return
        first, last = bisect_left(self._bounds, start), bisect_right(self._bounds, end)
        self._bounds[first:last] = [start] * (first % 2 == 0) + [end] * (last % 2 == 0)

    def remove(self, start: int, end: int) -> None:
        """Takes [start, end) out, whether or not any of it was in."""
        if _is_empty(start, end):
            return
        first, last = bisect_left(self._bounds, start), bisect_right(self._bounds, end)
        self._bounds[first:last] = [start] * (first % 2) + [end] * (last % 2)

    def clear(self) -> None:
        self._bounds.clear()

    def copy(self) -> Ranges:
        new = Ranges()
        new._bounds = self._bounds.copy()
        return new

    def covers(self, start: int, end: int) -> bool:
        """Whether every integer of [start, end) is in; an empty range is always covered."""
        if _is_empty(start, end):
            return True
        position = bisect_right(self._bounds, start)
        return position % 2 == 1 and end <= self._bounds[position]

    def overlaps(self, start: int, end: int) -> bool:
        """Whether any integer of [start, end) is in."""
        if _is_empty(start, end):
            return False
        position = bisect_right(self._bounds, start)
        return position % 2 == 1 or (position < len(self._bounds) and self._bounds[position] < end)

    def within(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of the set inside [start, end), cut at its edges, in order."""
        bounds = self._bounds
        position = bisect_right(bounds, start) // 2 * 2
        while position < len(bounds) and bounds[position] < end:
            low, high = max(bounds[position], start), min(bounds[position + 1], end)
            if low < high:
                yield low, high
            position += 2

    def gaps(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """What [start, end) has that the set lacks, in order."""
        for low, high in self.within(start, end):
            if start < low:
                yield start, low
            start = high
        if start < end:
            yield start, end

    def range_at(self, value: int) -> tuple[int, int] | None:
        """The range that holds `value`."""
        position = bisect_right(self._bounds, value)
        if position % 2 == 0:
            return None
        return self._bounds[position - 1], self._bounds[position]

    def aligned(self, unit: int) -> Ranges:
        """Every range grown to multiples of `unit`."""
        return Ranges((align_down(start, unit), align_up(end, unit)) for start, end in self)

    @property
    def size(self) -> int:
        """How many integers are in."""
        return sum(self._bounds[1::2]) - sum(self._bounds[::2])

    def __or__(self, other: Ranges) -> Ranges:
        new = self.copy()
        for start, end in other:
            new.add(start, end)
        return new

    def __sub__(self, other: Ranges) -> Ranges:
        new = self.copy()
        for start, end in other:
            new.remove(start, end)
        return new

    def __and__(self, other: Ranges) -> Ranges:
        new = Ranges()
        for start, end in other:
            for part in self.within(start, end):
                new.add(*part)
        return new

    def __contains__(self, value: int) -> bool:
        return bisect_right(self._bounds, value) % 2 == 1

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """The ranges in order. The set must not change meanwhile."""
        return zip(self._bounds[::2], self._bounds[1::2], strict=True)

    def __len__(self) -> int:
        """How many ranges there are."""
        return len(self._bounds) // 2

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranges) and self._bounds == other._bounds

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Ranges({', '.join(f'{start:#x}-{end:#x}' for start, end in self)})"


def _is_empty(start: int, end: int) -> bool:
    if end < start:
        raise ValueError(f"range ends before it starts: {start:#x}-{end:#x}")
    return start == end
