"""What clients of redis-server feel: SETs at a fixed rate, before, during and after a take.

Open loop: a request counts from when it was due. "During" is from the start of the command to its
end, for BGSAVE until the child has written. Two ways are for comparison: "nothing", and "busy",
in which the processors have as much to do as in a take and nobody touches the server.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import machine
from bench.beats import Beats
from bench.client import MACHINE, Client, Log, Stall, fill, latencies
from bench.commands import Failed
from bench.figures import Part, Plot, Row, Rows, Table, number, size, spread
from bench.peers import bgsave, criu, gcore
from bench.session import OURS, Bench, in_turn, taken
from tests.harness.redis import Redis

CASE = "latency"
RATE = 5000
LONGEST_SECONDS = 120
IDLE_SECONDS = 3.0
IDLE_SECONDS_A_GIB = 3.0
BUSY = [sys.executable, "-c", "while True: pass"]
LARGEST_CORE_MIB = 1024
NEAR_NS = 1_000_000
PEERS = {"bgsave": bgsave, "gcore": gcore, "criu": criu}
PHASES = {"before": "before", "during": "during", "own": "during, without the machine's",
          "after": "after"}  # fmt: skip


def run(bench: Bench) -> None:
    if reason := bgsave.why_not():
        bench.say(f"latency: {reason}")
        return
    if bench.peers:
        for name, peer in PEERS.items():
            if reason := peer.why_not():
                bench.emit(CASE, name, why_not=reason)
    for mib in bench.sizes([1024, 4096], [128]):
        machine.warm(2 * mib)
        with bench.directory() as place:
            server = Redis(place)
            try:
                _rounds(bench, server, place, mib)
            finally:
                server.kill()


def _rounds(bench: Bench, server: Redis, place: Path, mib: int) -> None:
    keys = fill(place, server.socket_path, mib)
    ways = ["nothing", "busy", *bench.snaps]
    if bench.peers:
        ways += [name for name, peer in PEERS.items() if peer.why_not() is None]
        if mib > LARGEST_CORE_MIB:
            ways = [way for way in ways if way not in ("gcore", "criu")]
    for number_, way in in_turn(bench.rounds({1024: 2}, mib), ways):
        if way in ("gcore", "criu") and number_ > 0:
            continue
        bench.say(f"latency: {size(mib)}, {way}")
        machine.warm(mib)
        row, log = _one(bench, server, place, keys, way, mib)
        bench.emit(CASE, way, mib=mib, rate=RATE, round=number_, **row, **_felt(row, log))


def _one(
    bench: Bench, server: Redis, place: Path, keys: int, way: str, mib: int
) -> tuple[Row, Log]:
    quiet = bench.choose(2.0, 1.0)
    beats = Beats(place)
    client = Client(
        place, server.socket_path, keys, rate=RATE, seconds=LONGEST_SECONDS, watch=server.pid
    )
    try:
        time.sleep(0.5)
        began = time.monotonic_ns()
        time.sleep(quiet)
        row = {"client_began": began, **_way(bench, server, place, way, mib)}
        time.sleep(quiet)
        log = client.stop()
        return row, replace(log, silent=beats.stop())
    except Failed as error:
        raise Failed(f"latency, {way}: {error}") from None
    finally:
        client.kill()
        beats.kill()


def _way(bench: Bench, server: Redis, place: Path, way: str, mib: int) -> Row:
    """Does it -> its numbers, with `began` and `ended`, and `t0` where that is known."""
    if way in bench.snaps:
        with bench.snap(way) as snap:
            ran = snap.run("take", server.pid, "--name", "one")
            row = {**taken(ran), "began": ran.began, "ended": ran.ended}
            if not ran.code:
                row["t0"] = machine.monotonic_of(snap("show", "one").answer["taken_at"])
        return row
    if way == "bgsave":
        return bgsave.save(server)
    if way == "gcore":
        return gcore.dump(server.pid, place)
    if way == "criu":
        return criu.dump(server.pid, place)
    return _idle(way, IDLE_SECONDS + IDLE_SECONDS_A_GIB * mib / 1024)


def _idle(way: str, seconds: float) -> Row:
    """Nothing at all, or all processors busy with threads that run where nobody else wants to."""
    with ExitStack() as stack:
        began = time.monotonic_ns()
        for _ in os.sched_getaffinity(0) if way == "busy" else ():
            hog = subprocess.Popen(BUSY)
            stack.callback(hog.wait)
            stack.callback(hog.kill)
            os.sched_setscheduler(hog.pid, os.SCHED_IDLE, os.sched_param(0))
        time.sleep(seconds)
        return {"began": began, "ended": time.monotonic_ns()}


def _felt(row: Row, log: Log) -> Row:
    """Latencies of the three phases, and the stalls of the second; latencies of that also without
    the requests that were due in a stall of the machine's."""
    spans = {
        "before": (row["client_began"], row["began"]),
        "during": (row["began"], row["ended"]),
        "after": (row["ended"], log.requests[-1].due),
    }
    found: Row = {}
    for name, (begin, end) in spans.items():
        found |= latencies(log.between(begin, end), name)
    stalls = log.stalls(*spans["during"])
    silent = [one for one in stalls if one.cause == MACHINE]
    others = [
        one
        for one in log.between(*spans["during"])
        if not any(stall.begin <= one.due <= stall.end for stall in silent)
    ]
    found |= latencies(others, "own")
    found["during_stalls"] = len(stalls)
    found["stalls"] = [
        {
            "at_ms": (one.begin - row["began"]) / 1e6, "ms": one.length / 1e6,
            "requests": one.requests, "cause": one.cause, "stage": _stage(one, row),
            "client_ms": one.client / 1e6, "no_cpu_ms": one.waited / 1e6, "ran_ms": one.ran / 1e6,
            "stolen_ms": one.stolen / 1e6, "silent_ms": one.silent / 1e6,
        }
        for one in stalls
    ]  # fmt: skip
    return found


def _stage(stall: Stall, row: Row) -> str:
    """Where in a take of ours it was: T0 is known from the image, and the stop of T0 ends there."""
    if "t0" not in row:
        return ""
    pause = row.get("longest_stop_us", 0) * 1000
    if stall.end < row["t0"] - pause - NEAR_NS:
        return "copying ahead"
    return "at T0" if stall.begin < row["t0"] + NEAR_NS else "saving"


def report(rows: Rows) -> Sequence[Part]:
    notes = sorted({f"{row['way']}: {row['why_not']}." for row in rows if "why_not" in row})
    measured = Rows(row for row in rows if "mib" in row)
    plots = [_plot(measured, mib) for (mib,) in measured.distinct("mib")]
    return [_latencies(measured), *notes, _stalls(measured), *plots]


def _latencies(rows: Rows) -> Table:
    lines = []
    for mib, way in sorted(rows.distinct("mib", "way"), key=lambda one: one[0]):
        here = rows.where(mib=mib, way=way)
        for phase in PHASES if way == OURS else ("during", "own"):
            names = [f"{phase}_{mark}_us" for mark in ("p50", "p99", "p999", "max")]
            cells = [spread(here.values(name), 1e-3) for name in names]
            seconds = number(here.median("seconds")) if phase == "during" else ""
            lines.append([size(mib), way, PHASES[phase], *cells, seconds])
    columns = ("data", "way", "phase", "p50", "p99", "p99.9", "max", "seconds")
    return Table(f"Latency of {RATE:,} SETs a second, ms: median of rounds (largest)", columns,
                 lines)  # fmt: skip


def _stalls(rows: Rows) -> Table:
    """Every stall above a millisecond in the time of the way, by cause and stage."""
    lines = []
    for mib, way in sorted(rows.distinct("mib", "way"), key=lambda one: one[0]):
        here = rows.where(mib=mib, way=way)
        stalls = [stall for row in here for stall in row["stalls"]]
        for stage, cause in dict.fromkeys((one["stage"], one["cause"]) for one in stalls):
            some = [one["ms"] for one in stalls if (one["stage"], one["cause"]) == (stage, cause)]
            above = sum(ms > 5 for ms in some)
            each = [number(count / len(here)) for count in (len(some), above)]
            cells = [*each, spread(some), number(sum(some) / len(here))]
            lines.append([size(mib), way, stage, cause, *cells])
    columns = ("data", "way", "where", "the server", "in a run", "above 5 ms", "length, ms",
               "ms in all")  # fmt: skip
    title = (
        "Stalls above 1 ms in that time, by what the server's main thread did for most of it: "
        "stopped (or in a fault), no CPU (others had it), busy; stolen: by the host, as far as it "
        "tells (in steps of 10 ms); client: the client woke late; the machine: a processor did not "
        "run (beats)"
    )
    return Table(title, columns, lines)


def _plot(rows: Rows, mib: int) -> Plot:
    marks = {"p50": "p50", "p99": "p99", "p99.9": "p999", "max": "max"}

    def draw(axes: Any) -> None:
        for (way,) in rows.where(mib=mib).distinct("way"):
            here = rows.where(mib=mib, way=way)
            values = [here.median(f"during_{mark}_us") for mark in marks.values()]
            axes.plot(list(marks), [(us or 0) / 1000 for us in values], marker="o", label=way)
        axes.set_yscale("log")
        axes.set_ylabel("ms")
        axes.legend()

    return Plot(f"latency-{mib}", f"SETs to redis with {size(mib)}, during", draw)
