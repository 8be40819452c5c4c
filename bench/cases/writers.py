"""What a program that writes without pause gets done: before, and while it is copied.

Two threads write to pages at random. fork's copy-on-write and our first-write faults cost them the
same kind of thing; both ways compress what they copy, on the same CPUs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from bench import machine, pages
from bench.figures import Part, Row, Rows, Table, number, size, spread
from bench.pages import Pages
from bench.session import Bench, in_turn
from bench.ways import NOW, saved

CASE = "writers"
BEFORE_SECONDS = 1.0
WRITERS = 2


def run(bench: Bench) -> None:
    for mib in bench.sizes([1024], [64]):
        machine.warm(3 * mib)
        _rounds(bench, mib)


def _rounds(bench: Bench, mib: int) -> None:
    with bench.directory() as place, pages.running(place / "pages", mib) as target:
        target.tell("writers", WRITERS, 0)
        ways = ["nothing", *bench.snaps, *([NOW, "fork"] if bench.peers else [])]
        for number_, way in in_turn(bench.rounds(2), ways):
            bench.say(f"writers: {size(mib)}, {way}")
            machine.warm(2 * mib)
            bench.emit(CASE, way, mib=mib, round=number_, **_one(bench, target, way))


def _one(bench: Bench, target: Pages, way: str) -> Row:
    target.tell("mark")
    before = target.felt()
    time.sleep(BEFORE_SECONDS)
    began = target.felt()
    row = saved(bench, target, way, 2 * BEFORE_SECONDS)
    ended = target.felt()
    usual = _rate(before, began)
    during = _rate(began, ended)
    return {
        **row,
        "before_per_second": usual,
        "during_per_second": during,
        "during_share": during / usual,
        "during_seconds": (ended.now - began.now) / 1e9,
        "lost_operations": (usual - during) * (ended.now - began.now) / 1e9,
        "longest_us": max((one.length for one in ended.writers), default=0) / 1000,
    }


def _rate(first: pages.Felt, last: pages.Felt) -> float:
    return (last.operations - first.operations) / (last.now - first.now) * 1e9


def report(rows: Rows) -> Sequence[Part]:
    lines = []
    for mib, way in rows.distinct("mib", "way"):
        here = rows.where(mib=mib, way=way)
        lines.append([
            size(mib), way,
            spread(here.values("before_per_second"), 1e-6),
            spread(here.values("during_per_second"), 1e-6),
            number(here.median("during_share"), 100, " %"),
            number(here.median("during_seconds")),
            number(here.median("lost_operations"), 1e-6),
            spread(here.values("longest_us"), 1e-3),
        ])  # fmt: skip
    columns = ("size", "way", "before, M/s", "during, M/s", "share", "seconds",
               "writes lost in all, M", "longest write, ms")  # fmt: skip
    return [Table("Page writes a second of two threads: median (largest)", columns, lines)]
