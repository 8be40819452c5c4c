"""Rows of measurements, and what they come to: medians, percentiles, ratios, tables. Pure.

A row is one line of JSON: parameters and numbers side by side, all flat but for a few lists.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
MISSING = "-"


class Rows(list[Row]):
    """Rows of one case, or some of them."""

    def where(self, **wanted: object) -> Rows:
        return Rows(
            row for row in self if all(row.get(name) == value for name, value in wanted.items())
        )

    def distinct(self, *names: str) -> list[tuple[Any, ...]]:
        """Combinations of these parameters that occur, in the order of their first row."""
        found = (tuple(row[name] for name in names) for row in self if set(names) <= row.keys())
        return list(dict.fromkeys(found))

    def values(self, name: str) -> list[float]:
        return [row[name] for row in self if row.get(name) is not None]

    def median(self, name: str) -> float | None:
        return median(self.values(name))


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def percentile(ordered: Sequence[float], part: float) -> float:
    """The smallest value that at least `part` (0 to 1) of all are not above. `ordered` is sorted,
    and not empty."""
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]


MARKS = {"p50": 0.5, "p99": 0.99, "p999": 0.999}


def distribution(values: Iterable[float], unit: str, scale: float = 1.0) -> Row:
    """`p50_UNIT`, `p99_UNIT`, `p999_UNIT`, `max_UNIT` and `count`; of nothing only the count."""
    ordered = sorted(values)
    if not ordered:
        return {"count": 0}
    found = {name: percentile(ordered, part) for name, part in MARKS.items()}
    found["max"] = ordered[-1]
    return {
        **{f"{name}_{unit}": value * scale for name, value in found.items()},
        "count": len(ordered),
    }


def ratio(ours: float | None, theirs: float | None) -> float | None:
    """How many times larger theirs is."""
    return theirs / ours if ours and theirs is not None else None


def number(value: float | None, scale: float = 1.0, unit: str = "") -> str:
    """Three digits that count, for people: `0.123`, `4.56`, `78.9`, `1,234`."""
    if value is None:
        return MISSING
    value *= scale
    digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}{unit}"


def spread(values: Sequence[float], scale: float = 1.0) -> str:
    """`median (largest)`, or the one value."""
    middle = median(values)
    if middle is None:
        return MISSING
    if len(values) == 1:
        return number(middle, scale)
    return f"{number(middle, scale)} ({number(max(values), scale)})"


def size(mib: float) -> str:
    return f"{mib / 1024:g} GiB" if mib >= 1024 else f"{mib:g} MiB"


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Aligned, so that it can be read in a terminal as well."""
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]

        def line(cells: Sequence[str]) -> str:
            padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            return f"| {' | '.join(padded)} |"

        rule = f"|{'|'.join('-' * (width + 2) for width in widths)}|"
        return "\n".join([f"**{self.title}**", "", line(self.columns), rule, *map(line, self.rows)])


@dataclass(frozen=True)
class Plot:
    """`draw` is given the axes of a new figure."""

    name: str
    title: str
    draw: Callable[[Any], None]


Part = Table | Plot | str
"""What a case reports: tables, plots and sentences."""
