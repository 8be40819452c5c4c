"""How soon a process runs again, and what its missing pages cost it.

The restored process says so itself: its clock stands still from T0 on, and its first reading
afterwards is when it ran. Then it reads a page at random 2,000 times a second, and times each.
"""

from __future__ import annotations

import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from bench import machine, pages
from bench.cases.increments import REWRITTEN
from bench.commands import Failed, Ran, Snap
from bench.figures import Part, Plot, Row, Rows, Table, distribution, number, size, spread
from bench.pages import Felt, Pages
from bench.session import OURS, Bench, in_turn, taken
from snapshot.kernel import pidfd

CASE = "restore"
TOUCHES = 2000
MISSING_NS = 2000
"""A page that is there is read in less."""
SHOWN = 5
AFTER_SECONDS = 0.3
STEADY_SECONDS = 60
LARGEST_EAGER_MIB = 4096
LARGEST_DELTAS_MIB = 1024
LAZY, AGAIN, EAGER, IDLE = "lazy", "lazy, again", "eager", "lazy, idle"
DELTAS = "lazy, idle, deltas"
FIRST = ("--lazy",)
"""Nothing is noted before it: it is what comes first the next time."""
MODES = {
    LAZY: ("--lazy", "--no-working-set"),
    AGAIN: ("--lazy",),
    EAGER: ("--eager",),
    IDLE: ("--lazy", "--no-working-set"),
    DELTAS: ("--lazy", "--no-working-set"),
}
"""`again`: what an earlier restore of the image waited for comes first. `idle`: of an image in
which the process has no clock, which keeps a processor busy, and reads IDLE_TOUCHES pages a
second. `deltas`: of one that was taken after that, when one page in ten was another."""
IMAGES = {IDLE: "idle", DELTAS: "deltas"}
IDLE_TOUCHES = 500
ROUNDS = {64: 4, 1024: 2}
STARTS = {
    "python": ["-c", "pass"],
    "snap --version": [],
}


def run(bench: Bench) -> None:
    for what, words in STARTS.items():
        for way, command in bench.snaps.items():
            words_ = [sys.executable, *words] if words else [*command, "--version"]
            for number_ in range(bench.rounds(15, quick=3)):
                bench.emit(CASE, way, what=what, round=number_, seconds=_wall(words_))
    for mib in bench.sizes([64, 1024, 4096, 8192], [64, 256]):
        machine.warm(2 * mib)
        for way in bench.snaps:
            with (
                bench.directory() as place,
                bench.snap(way) as snap,
                pages.running(place / "pages", mib) as target,
            ):
                _rounds(bench, snap, target, way)


def _wall(words: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(words, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def _rounds(bench: Bench, snap: Snap, target: Pages, way: str) -> None:
    target.tell("clock", 1)
    target.tell("touch", TOUCHES)
    target.tell("mark")
    row = taken(snap("take", target.pid, "--name", "one"))
    target.tell("clock", 0)
    target.tell("touch", IDLE_TOUCHES)
    target.tell("mark")
    snap("take", target.pid, "--name", "idle")
    if target.mib <= LARGEST_DELTAS_MIB:
        target.tell("rewrite", *REWRITTEN["10 %, page by page"])
        target.tell("mark")
        snap("take", target.pid, "--name", "deltas")
    target.kill()
    rounds = bench.rounds(ROUNDS, target.mib)
    for number_, mode in in_turn(rounds, list(MODES)):
        if mode == EAGER and target.mib > LARGEST_EAGER_MIB:
            continue
        if mode == DELTAS and target.mib > LARGEST_DELTAS_MIB:
            continue
        bench.say(f"restore: {size(target.mib)}, {mode}, {way}")
        machine.warm(target.mib + 256)
        try:
            options = FIRST if mode == LAZY and number_ == 0 else MODES[mode]
            image = IMAGES.get(mode, "one")
            measured = _one(snap, target, image, options, row["saved_bytes"])
        finally:
            target.kill()
            snap.end()
        bench.emit(CASE, way, mib=target.mib, mode=mode, round=number_, **measured)


def _one(snap: Snap, target: Pages, image: str, options: Sequence[str], saved: int) -> Row:
    ran = snap("restore", image, *options)
    target.became(ran.answer["pid"])
    ended = _drained(ran) if ran.answer["server_pid"] else ran.ended
    time.sleep(AFTER_SECONDS)
    felt = target.felt()
    runs = _first_touch(felt, ran) if image in IMAGES.values() else _runs_at(felt, ran)
    touches = [(at, ns) for at, ns in felt.touches if runs <= at]
    missing = [(at, ns) for at, ns in touches if at < ended and ns >= MISSING_NS]
    row: Row = {
        "runs_us": (runs - ran.began) / 1000,
        "command_us": (ran.ended - ran.began) / 1000,
        "ready_us": ran.answer["ready_us"],
        "saved_bytes": saved,
        "touched": len(touches),
        **{f"fault_{name}": value for name, value in distribution(
            (ns for _, ns in missing), "us", 1e-3).items()},
    }  # fmt: skip
    if ran.answer["server_pid"]:
        row["drain_seconds"] = (ended - runs) / 1e9
        row["drain_gb_per_second"] = saved / max(ended - runs, 1)
        row["last_fault_us"] = max((at - runs for at, _ in missing), default=0) / 1000
    return row


def _runs_at(felt: Felt, ran: Ran) -> int:
    """The end of the gap that spans the beginning of the restore."""
    for gap in felt.clock:
        if gap.begin < ran.began < gap.end:
            return gap.end
    gaps = ", ".join(
        f"{(g.begin - ran.began) / 1e6:.1f} to {(g.end - ran.began) / 1e6:.1f}"
        for g in felt.clock[:SHOWN]
    )
    raise Failed(
        f"{AFTER_SECONDS} s after a restore of {(ran.ended - ran.began) / 1e6:.0f} ms the process "
        f"has not read its clock; the first of {len(felt.clock)} gaps, in ms from the begin of the "
        f"command: {gaps or 'none'}"
    )


def _first_touch(felt: Felt, ran: Ran) -> int:
    """Up to a turn of its sleep later than it ran."""
    found = [at for at, _ in felt.touches if at > ran.began]
    if not found:
        raise Failed(f"{AFTER_SECONDS} s after a restore the process has not read a page")
    return min(found)


def _drained(ran: Ran) -> int:
    """When the page server had nothing left to do, and ended; of a small process that may have
    been before the command's own end, and counts until then."""
    handle = pidfd.find(ran.answer["server_pid"])
    if handle < 0:
        return ran.ended
    try:
        if not select.select([handle], [], [], STEADY_SECONDS)[0]:
            raise Failed("the page server does not end")
    finally:
        os.close(handle)
    return time.monotonic_ns()


def report(rows: Rows) -> Sequence[Part]:
    return [_starts(rows), _times(rows), _faults(rows), _plot(rows)]


def _starts(rows: Rows) -> Table:
    lines = []
    for (what,) in rows.distinct("what"):
        values = rows.where(what=what, way=OURS).values("seconds")
        lines.append([what, spread(values, 1e3)])
    return Table("What starting costs, ms: median (largest)", ("command", "wall"), lines)


def _times(rows: Rows) -> Table:
    lines = []
    for mib, mode in rows.distinct("mib", "mode"):
        here = rows.where(mib=mib, mode=mode, way=OURS)
        names = ("runs_us", "command_us", "ready_us")
        lines.append([size(mib), mode, *(spread(here.values(name), 1e-3) for name in names)])
    columns = ("size", "mode", "start of the command to running", "to the end of the command",
               "of which the restore itself")  # fmt: skip
    return Table("Until the process runs, ms: median (largest)", columns, lines)


def _faults(rows: Rows) -> Table:
    lines = []
    for mib, mode in rows.distinct("mib", "mode"):
        if mode == EAGER:
            continue
        here = rows.where(mib=mib, mode=mode, way=OURS)
        marks = [f"fault_{mark}_us" for mark in ("p50", "p99", "p999", "max")]
        counts = here.values("fault_count")
        lines.append([
            size(mib), mode, *(spread(here.values(mark)) for mark in marks),
            number(statistics.median(counts)), spread(here.values("last_fault_us"), 1e-6),
            spread(here.values("drain_seconds")),
            number(here.median("drain_gb_per_second")),
        ])  # fmt: skip
    columns = ("size", "mode", "p50", "p99", "p99.9", "max", "missing pages met",
               "the last after, s", "all there after, s", "GB/s")  # fmt: skip
    title = (
        f"A page that is missing, read by the process ({TOUCHES:,} reads a second; idle: "
        f"{IDLE_TOUCHES}), µs"
    )
    return Table(title, columns, lines)


def _plot(rows: Rows) -> Plot:
    def draw(axes: Any) -> None:
        for (mode,) in rows.distinct("mode"):
            here = rows.where(mode=mode, way=OURS)
            sizes = [mib for (mib,) in here.distinct("mib")]
            times = [(here.where(mib=mib).median("runs_us") or 0) / 1000 for mib in sizes]
            axes.plot(sizes, times, marker="o", label=mode)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("size, MiB")
        axes.set_ylabel("ms from the start of the command")
        axes.legend()

    return Plot("restore", "Until the process runs again", draw)
