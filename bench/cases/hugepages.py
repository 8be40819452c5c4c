"""Whether a target keeps its transparent huge pages, and what its writers get done with them.

By its own smaps: AnonHugePages before, and when the way is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench import machine, pages
from bench.figures import Part, Rows, Table, number, size, spread
from bench.pages import Pages
from bench.session import Bench, in_turn
from bench.ways import NOW, saved

CASE = "hugepages"
WRITERS = {"idle": (0, 0), "5,000 pages/s": (2, 5000)}
"""Threads, and pages a second of all of them together."""
QUIET_SECONDS = 1.0


def run(bench: Bench) -> None:
    for mib in bench.sizes([1024], [64]):
        machine.warm(3 * mib)
        with bench.directory() as place, pages.running(place / "pages", mib, huge=True) as target:
            target.tell("clock", 1)
            _rounds(bench, target)


def _rounds(bench: Bench, target: Pages) -> None:
    ways = ["nothing", *bench.snaps, *([NOW, "fork"] if bench.peers else [])]
    for label, writers in WRITERS.items():
        for number_, way in in_turn(bench.rounds(1), ways):
            bench.say(f"hugepages: {size(target.mib)}, {label}, {way}")
            machine.warm(target.mib + 512)
            target.tell("writers", 0, 0)
            target.tell("collapse")
            target.tell("writers", *writers)
            before = _huge_kib(target.pid)
            with target.watched() as felt:
                row = saved(bench, target, way, QUIET_SECONDS)
            kept = _huge_kib(target.pid)
            bench.emit(
                CASE, way, mib=target.mib, writers=label, round=number_, **row, **felt,
                huge_before_mib=before / 1024, huge_kept_mib=kept / 1024,
            )  # fmt: skip


def _huge_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages:"))


def report(rows: Rows) -> Sequence[Part]:
    lines = []
    for mib, writers, way in rows.distinct("mib", "writers", "way"):
        here = rows.where(mib=mib, writers=writers, way=way)
        lines.append([
            size(mib), writers, way,
            number(here.median("huge_before_mib")),
            number(here.median("huge_kept_mib")),
            spread(here.values("longest_stop_us") or here.values("pause_us"), 1e-3),
            spread(here.values("writers_longest_us"), 1e-3),
            spread(here.values("seconds")),
        ])  # fmt: skip
    columns = ("size", "writers", "way", "huge before, MiB", "kept, MiB", "longest stop, ms",
               "longest of a writer, ms", "seconds")  # fmt: skip
    return [Table("Transparent huge pages: median (largest)", columns, lines)]
