"""How long the target stands still, by its size, its writers and its threads.

What `snap` says of itself is next to what a thread of the target saw that does nothing but read the
clock. That thread keeps one CPU busy all the time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from bench import machine, pages
from bench.figures import MISSING, Part, Plot, Row, Rows, Table, number, size, spread
from bench.pages import Pages
from bench.peers import criu, gcore, naive
from bench.session import OURS, Bench, in_turn

CASE = "pause"
WRITERS: dict[str, tuple[int, int]] = {
    "idle": (0, 0), "5,000 pages/s": (2, 5000), "unbound": (2, 0),
}  # fmt: skip
"""Threads, and pages a second of all of them together (0: without pause)."""
FEW = 4
"""Threads that there are always: the first, the clock, and two that write or sleep."""
MANY = (16, 200)
SIZES = (64, 1024, 4096, 8192)
ROUNDS = {64: 3, 1024: 2, 4096: 2}
THREADS_AT = 1024
NOTHING_SECONDS = 1.0
LARGE_MIB = 4096
PEERS = {"fork": None, "naive": naive, "gcore": gcore, "criu": criu}


def run(bench: Bench) -> None:
    sizes = bench.sizes(SIZES, [64, 256])
    threads_at = sizes[0] if bench.only_mib else bench.choose(THREADS_AT, 64)
    if bench.peers:
        for name, peer in PEERS.items():
            if peer is not None and (reason := peer.why_not()):
                bench.emit(CASE, name, why_not=reason)
    for mib in sizes:
        machine.warm(2 * mib + 512)
        with bench.directory() as place, pages.running(place / "pages", mib) as target:
            if mib == threads_at:
                _rounds(bench, target, "idle", 1)  # it has no other yet
            target.tell("clock", 1)
            target.tell("writers", 2, 0)
            few = bench.quick or mib >= LARGE_MIB
            for label in [name for name in WRITERS if not (few and name == "unbound")]:
                _rounds(bench, target, label, FEW)
            if mib == threads_at:
                for threads in MANY:
                    target.tell("sleepers", threads - FEW)
                    _rounds(bench, target, "5,000 pages/s", threads)


def _rounds(bench: Bench, target: Pages, label: str, threads: int) -> None:
    ways = ["nothing", *bench.snaps]
    if bench.peers:
        ways += [name for name, peer in PEERS.items() if peer is None or peer.why_not() is None]
    if threads > 1:
        target.tell("writers", *WRITERS[label])
    else:
        ways.remove("nothing")  # without a clock it feels nothing
    for number_, way in in_turn(bench.rounds(ROUNDS, target.mib), ways):
        many = number_ > 0 or label != "5,000 pages/s" or threads != FEW
        if way in ("gcore", "criu") and many and target.mib >= THREADS_AT:
            continue
        bench.say(f"pause: {size(target.mib)}, {label}, {threads} threads, {way}")
        with target.watched() as felt:
            measured = _one(bench, target, way)
        bench.emit(
            CASE, way, mib=target.mib, writers=label, threads=threads, round=number_,
            **measured, **(felt if threads > 1 else {}),
        )  # fmt: skip


def _one(bench: Bench, target: Pages, way: str) -> Row:
    if way in bench.snaps:
        return bench.take(way, target.pid)[1]
    if way == "fork":
        return {"pause_us": target.tell("fork")["fork_ns"] / 1000}
    if way == "naive":
        return naive.copy(target.pid)
    with bench.directory() as place:
        if way == "gcore":
            return gcore.dump(target.pid, place)
        if way == "criu":
            return criu.dump(target.pid, place)
    time.sleep(NOTHING_SECONDS)
    return {}


def report(rows: Rows) -> Sequence[Part]:
    return [*_stops(rows), *_felt(rows), *_stages(rows), _plot(rows)]


def _configurations(rows: Rows) -> list[tuple[Any, ...]]:
    return rows.distinct("mib", "writers", "threads")


def _named(configuration: tuple[Any, ...]) -> list[str]:
    mib, writers, threads = configuration
    return [size(mib), writers, str(threads)]


KEY = ("mib", "writers", "threads")


def _stops(rows: Rows) -> Sequence[Part]:
    lines = []
    for one in _configurations(rows):
        here = rows.where(**dict(zip(KEY, one, strict=True)))
        ours = here.where(way=OURS)
        cells = [spread(ours.values(name), 1e-3) for name in ("longest_stop_us", "pause_us")]
        cells += [spread(here.where(way="fork").values("pause_us"), 1e-3)]
        cells += [spread(here.where(way="naive").values("pause_us"), 1e-3)]
        for way in ("gcore", "criu"):
            cells.append(spread(here.where(way=way).values("target_stopped_longest_us"), 1e-3))
        failed = sum(row.get("exit_code", 0) != 0 for row in ours)
        lines.append([*_named(one), *cells, str(failed) if failed else ""])
    columns = (
        "size", "writers", "threads", "snap: longest stop", "snap: all stops", "fork",
        "stop and copy", "gcore", "criu", "failed",
    )  # fmt: skip
    notes = sorted({f"{row['way']}: {row['why_not']}." for row in rows if "why_not" in row})
    return [Table("The target stands still, ms: median (largest)", columns, lines), *notes]


def _felt(rows: Rows) -> Sequence[Part]:
    """By the target's own clock: a thread that was stopped, and what befell it otherwise."""
    lines = []
    for one in _configurations(rows):
        here = rows.where(**dict(zip(KEY, one, strict=True)))
        if not here.values("target_longest_us"):
            continue
        cells = []
        for way in ("nothing", OURS):
            some = here.where(way=way)
            stalls = [stall for row in some for stall in row["target_stalls"]]
            counts = [sum(cause == kind for _, cause in stalls) / max(len(some), 1)
                      for kind in ("stopped", "preempted", "machine")]  # fmt: skip
            cells += [
                spread(some.values("target_longest_us"), 1e-3),
                " / ".join(number(count) for count in counts) if some else MISSING,
            ]
        ours = here.where(way=OURS)
        cells.append(spread(ours.values("target_stopped_longest_us"), 1e-3))
        cells.append(spread(ours.values("writers_longest_us"), 1e-3))
        lines.append([*_named(one), *cells])
    columns = (
        "size", "writers", "threads", "idle: longest gap", "gaps > 1 ms", "snap: longest gap",
        "gaps > 1 ms", "longest of being stopped", "longest of a writer",
    )  # fmt: skip
    title = (
        "Gaps in the target's own clock, ms: median (largest); how many above 1 ms in a run, "
        "by cause: stopped / preempted / neither (the machine)"
    )
    return [Table(title, columns, lines)]


def _stages(rows: Rows) -> Sequence[Part]:
    ours = rows.where(way=OURS)
    names = list(dict.fromkeys(name for row in ours for name in row.get("stages_us", {})))
    lines = []
    for one in _configurations(rows):
        here = ours.where(**dict(zip(KEY, one, strict=True)))
        stages = Rows(row.get("stages_us", {}) for row in here)
        lines.append([*_named(one), *(number(stages.median(name)) for name in names)])
    return [Table("Where the second stop goes, µs, medians", ["size", "writers", "threads", *names],
                  lines)]  # fmt: skip


def _plot(rows: Rows) -> Plot:
    columns = {
        OURS: "longest_stop_us", "fork": "pause_us", "naive": "pause_us",
        "gcore": "target_stopped_longest_us", "criu": "target_stopped_longest_us",
    }  # fmt: skip
    some = rows.where(writers="5,000 pages/s", threads=FEW)

    def draw(axes: Any) -> None:
        for way, name in columns.items():
            here = some.where(way=way)
            sizes = [mib for (mib,) in here.distinct("mib")]
            times = [(here.where(mib=mib).median(name) or 0) / 1000 for mib in sizes]
            if any(times):
                axes.plot(sizes, times, marker="o", label=way)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("size, MiB of 4 KiB pages")
        axes.set_ylabel("longest stop, ms")
        axes.legend()

    return Plot("pause", "How long the target stands still", draw)
