"""The cases: each measures one thing, and makes tables and plots of the rows it made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from bench.figures import Part, Rows
from bench.session import Bench

from . import command, hugepages, increments, latency, pause, replies, restore, take, writers


class Case(Protocol):
    """A module of this package; its name is the case's."""

    def run(self, bench: Bench) -> None: ...

    def report(self, rows: Rows) -> Sequence[Part]: ...


CASES: dict[str, Case] = {
    "pause": pause,
    "latency": latency,
    "writers": writers,
    "hugepages": hugepages,
    "take": take,
    "increments": increments,
    "restore": restore,
    "replies": replies,
    "command": command,
}
