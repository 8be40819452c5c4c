"""redis-server comes back: its first reply, and its first 10,000 GETs.

The client tries to connect all the time; GETs count when they were due after the first reply. They
are due 5,000 times a second, open loop, or each when the one before is answered.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import machine
from bench.client import Client, fill, latencies
from bench.commands import Failed, Snap
from bench.figures import Part, Plot, Row, Rows, Table, number, size, spread
from bench.peers import bgsave, criu
from bench.session import OURS, Bench, in_turn
from tests.harness import processes
from tests.harness.redis import Redis

CASE = "replies"
RATE = 5000
COUNT = 10_000
SECONDS = 3.5
"""From the end of the command on."""
LONGEST_SECONDS = 120
FULL, ONE = "5,000/s", "one by one"
MODES = (("lazy", FULL), ("lazy, again", FULL), ("eager", FULL), ("lazy", ONE), ("eager", ONE))
"""And the client. `again`: what the restore of that image before waited for comes first."""
LATE_US = 1000
ROUNDS = {1024: 2, 4096: 1}
"""Up to so many MiB of data."""


def run(bench: Bench) -> None:
    if reason := bgsave.why_not():
        bench.say(f"replies: {reason}")
        return
    if bench.peers and (reason := criu.why_not()):
        bench.emit(CASE, "criu", why_not=reason)
    for mib in bench.sizes([1024, 4096], [128]):
        machine.warm(2 * mib)
        for way in bench.snaps:
            with bench.directory() as place, bench.snap(way) as snap:
                _ours(bench, snap, place, mib, way)
        if bench.peers and not criu.why_not():
            with bench.directory() as place:
                _criu(bench, place, mib)


def _ours(bench: Bench, snap: Snap, place: Path, mib: int, way: str) -> None:
    rounds = bench.rounds(ROUNDS, mib)
    server = Redis(place)
    try:
        keys = fill(place, server.socket_path, mib)
        for image in itertools.product(range(rounds), (FULL, ONE)):
            snap("take", server.pid, "--name", _name(*image))
    finally:
        server.kill()
    # "Again" has to come after "lazy": the only two whose order is kept.
    for number_, (mode, requests) in itertools.product(range(rounds), MODES):
        bench.say(f"replies: {size(mib)}, {mode}, {requests}, {way}")
        machine.warm(mib + 512)
        client = _client(place, server, keys, requests)
        try:
            ran = snap("restore", _name(number_, requests), f"--{mode.partition(',')[0]}")
            row = {"seconds": ran.seconds, "ready_us": ran.answer["ready_us"]}
            row |= _felt(client, ran.began)
        finally:
            client.kill()
            snap.end()
        bench.emit(CASE, way, mib=mib, mode=mode, client=requests, round=number_, **row)


def _name(number_: int, requests: str) -> str:
    """Of an image of its own: none knows at first what comes first."""
    return f"image-{number_}-{'one' if requests == ONE else 'full'}"


def _criu(bench: Bench, place: Path, mib: int) -> None:
    server = Redis(place)
    try:
        keys = fill(place, server.socket_path, mib)
        if criu.dump(server.pid, place, leave_running=False)["exit_code"]:
            raise Failed("criu dump of redis")
    finally:
        server.kill()
    ways = [f"{mode}, {requests}" for mode in ("lazy", "eager") for requests in (FULL, ONE)]
    for number_, both in in_turn(bench.rounds(ROUNDS, mib), ways):
        mode, _, requests = both.partition(", ")
        bench.say(f"replies: {size(mib)}, {both}, criu")
        machine.warm(mib + 512)
        client = _client(place, server, keys, requests)
        pager = None
        try:
            measured, pager = criu.restore(place, lazy=mode == "lazy")
            row = {"seconds": measured["seconds"], **_felt(client, measured["began"])}
        finally:
            client.kill()
            processes.kill(server.pid)
            if pager is not None:
                pager.kill()
                pager.wait()
        bench.emit(CASE, "criu", mib=mib, mode=mode, client=requests, round=number_, **row)


def _client(place: Path, server: Redis, keys: int, requests: str) -> Client:
    closed = int(requests == ONE)
    options = {"get": 1, "closed": closed, "rate": RATE, "seconds": LONGEST_SECONDS}
    return Client(place, server.socket_path, keys, **options)


def _felt(client: Client, began: int) -> Row:
    time.sleep(SECONDS)
    requests = client.stop().requests
    first = min(one.answered for one in requests)
    counted = [one for one in requests if one.due >= first][:COUNT]
    late = [one.answered for one in counted if one.latency >= LATE_US * 1000]
    return {
        "first_reply_us": (first - began) / 1000,
        **latencies(counted, "get"),
        "late": len(late),
        "steady_us": (max(late, default=first) - first) / 1000,
    }


def report(rows: Rows) -> Sequence[Part]:
    notes = sorted({f"{row['way']}: {row['why_not']}." for row in rows if "why_not" in row})
    measured = Rows(row for row in rows if "mib" in row)
    lines = []
    for mib, requests, way, mode in measured.distinct("mib", "client", "way", "mode"):
        here = measured.where(mib=mib, client=requests, way=way, mode=mode)
        names = ["first_reply_us", *(f"get_{mark}_us" for mark in ("p50", "p99", "p999", "max"))]
        cells = [spread(here.values(name), 1e-3) for name in [*names, "steady_us"]]
        lines.append([size(mib), requests, way, mode, *cells, number(here.median("late"))])
    columns = ("data", "GETs", "way", "mode", "first reply", "p50", "p99", "p99.9", "max",
               "the last above 1 ms, after the first reply", "how many")  # fmt: skip
    title = f"redis comes back: the first reply, and {COUNT:,} GETs from then on, ms"
    return [Table(f"{title}: median (largest)", columns, lines), *notes, _plot(measured)]


def _plot(rows: Rows) -> Plot:
    marks = {"first reply": "first_reply_us", "GET p50": "get_p50_us", "GET p99": "get_p99_us",
             "GET p99.9": "get_p999_us", "GET max": "get_max_us"}  # fmt: skip

    def draw(axes: Any) -> None:
        for mib, way, mode in rows.where(client=FULL).distinct("mib", "way", "mode"):
            here = rows.where(mib=mib, client=FULL, way=way, mode=mode)
            values = [(here.median(name) or 0) / 1000 for name in marks.values()]
            name = mode if way == OURS else f"{way} {mode}"
            axes.plot(list(marks), values, marker="o", label=f"{size(mib)}, {name}")
        axes.set_yscale("log")
        axes.set_ylabel("ms")
        axes.legend()

    return Plot("replies", f"redis comes back, {FULL}", draw)
