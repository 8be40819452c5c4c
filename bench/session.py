"""One run of the bench: what is compared, how thoroughly, and where the rows go."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TextIO, TypeVar

from . import machine
from .commands import Ran, Snap
from .figures import Row, Rows

OURS = "snap"
T = TypeVar("T")


class Choice(NamedTuple):
    """Of the command line: what a run measures instead of all there is."""

    quick: bool = False
    mib: Sequence[int] = ()
    rounds: int | None = None


@dataclass
class Bench:
    """`snaps`: the commands that are compared, by their names in the rows; ours is the first.
    With more than one the peers have nothing to do. `only_mib` and `only_rounds` take the place of
    what a case would choose, where it has a choice."""

    place: Path
    snaps: dict[str, list[str]]
    out: TextIO
    quick: bool = False
    say: Callable[[str], None] = lambda text: None
    only_mib: Sequence[int] = ()
    only_rounds: int | None = None
    rows: Rows = field(default_factory=Rows)
    _facts: Row = field(default_factory=machine.facts)
    _places: int = 0

    @property
    def peers(self) -> bool:
        return len(self.snaps) == 1

    def choose(self, full: T, quick: T) -> T:
        return quick if self.quick else full

    def sizes(self, full: Sequence[int], quick: Sequence[int]) -> Sequence[int]:
        """MiB."""
        return self.only_mib or self.choose(full, quick)

    def rounds(self, full: int | Mapping[int, int], mib: int = 0, quick: int = 1) -> int:
        """`full`: how many, or how many up to which size in MiB; above all of them one."""
        if self.only_rounds is not None:
            return self.only_rounds
        if isinstance(full, int):
            return self.choose(full, quick)
        most = next((rounds for size, rounds in sorted(full.items()) if mib <= size), 1)
        return self.choose(most, quick)

    def failed(self, case: str, reason: str) -> None:
        self.emit(case, OURS, failed=reason)

    def emit(self, case: str, way: str, **measured: object) -> Row:
        """One row: what was measured, with all that it depends on."""
        row: Row = {
            "case": case,
            "way": way,
            **measured,
            **self._facts,
            "load": machine.load(),
            "time": round(time.time(), 3),
            "quick": self.quick,
        }
        self.out.write(json.dumps(row) + "\n")
        self.out.flush()
        self.rows.append(row)
        return row

    @contextmanager
    def directory(self) -> Iterator[Path]:
        """A new one, removed at the end of the block."""
        self._places += 1
        made = self.place / str(self._places)
        made.mkdir()
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)

    @contextmanager
    def snap(self, way: str = OURS) -> Iterator[Snap]:
        """The command of that way on a store of its own."""
        with self.directory() as place:
            snap = Snap(place / "store", self.snaps[way])
            try:
                yield snap
            finally:
                snap.end()

    def take(self, way: str, pid: int, *options: object) -> tuple[Ran, Row]:
        """One take into a new store, and the numbers of it that every case wants."""
        with self.snap(way) as snap:
            ran = snap.run("take", pid, *options)
        return ran, taken(ran)


KEPT = (
    "pause_us", "longest_stop_us", "rounds", "remainder_bytes", "saved_bytes", "stored_bytes",
    "faults", "attempts", "guarded", "peak_staging_bytes", "stages_us", "spilled_chunks",
)  # fmt: skip


def taken(ran: Ran) -> Row:
    """Of a take that failed only the exit code and the reason."""
    row: Row = {"exit_code": ran.code, "seconds": ran.seconds}
    if ran.code:
        return {**row, "error": ran.answer.get("error", ran.notes)}
    return {
        **row,
        **{name: ran.answer[name] for name in KEPT if name in ran.answer},
        "take_seconds": ran.answer["seconds"],
    }


@contextmanager
def session(
    out: TextIO,
    snaps: dict[str, list[str]],
    choice: Choice,
    say: Callable[[str], None],
) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="snap-bench-", ignore_cleanup_errors=True) as name:
        yield Bench(Path(name), snaps, out, choice.quick, say, choice.mib, choice.rounds)


def in_turn(rounds: int, ways: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Every way once in each round, each round beginning with another: whatever slows the machine
    for a while slows all of them, and none always comes after the same one."""
    for number in range(rounds):
        shift = number % len(ways)
        for way in [*ways[shift:], *ways[:shift]]:
            yield number, way
