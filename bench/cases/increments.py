"""An image of the same process a moment later: time and bytes, by how much was rewritten."""

from __future__ import annotations

from collections.abc import Sequence

from bench import machine, pages
from bench.commands import Snap
from bench.figures import Part, Rows, Table, number, ratio, size, spread
from bench.pages import Pages
from bench.session import OURS, Bench, in_turn, taken

CASE = "increments"
MIB = 1 << 20
FIRST = "all of it is new"
REWRITTEN = {
    "nothing": (0, 1),
    "1 %, page by page": (10, 1), "1 %, 1 MiB in a row": (10, 256),
    "10 %, page by page": (100, 1), "10 %, 1 MiB in a row": (100, 256),
    "50 %, page by page": (500, 1), "50 %, 1 MiB in a row": (500, 256),
}  # fmt: skip
"""Per mille of the pages, and how many of them are neighbours: a chunk is 16."""


def run(bench: Bench) -> None:
    for mib in bench.sizes([1024], [64]):
        machine.warm(3 * mib)
        with bench.directory() as place, pages.running(place / "pages", mib) as target:
            for number_, way in in_turn(bench.rounds(2), list(bench.snaps)):
                with bench.snap(way) as snap:
                    _one(bench, snap, target, way, number_)


def _one(bench: Bench, snap: Snap, target: Pages, way: str, number_: int) -> None:
    for rewritten in (FIRST, *REWRITTEN):
        bench.say(f"increments: {size(target.mib)}, {rewritten}, {way}")
        if rewritten != FIRST:
            target.tell("rewrite", *REWRITTEN[rewritten])
        row = taken(snap.run("take", target.pid))
        bench.emit(CASE, way, mib=target.mib, rewritten=rewritten, round=number_, **row)


def report(rows: Rows) -> Sequence[Part]:
    lines = []
    for mib, rewritten in rows.distinct("mib", "rewritten"):
        here = rows.where(mib=mib, rewritten=rewritten, way=OURS)
        whole = rows.where(mib=mib, rewritten=FIRST, way=OURS)
        share = ratio(whole.median("stored_bytes"), here.median("stored_bytes"))
        lines.append([
            size(mib), rewritten, spread(here.values("seconds")),
            spread(here.values("stored_bytes"), 1 / MIB), number(share, 100, " %"),
        ])  # fmt: skip
    columns = ("size", "rewritten", "command, s", "stored, MiB", "of the first")
    return [Table("The same process taken again: median (largest)", columns, lines)]
