"""The command itself: where the time of a small take goes, a store of many images, verifying."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from blake3 import blake3

from bench import heaps, pages
from bench.commands import ROOT, Snap
from bench.figures import Part, Row, Rows, Table, number, spread
from bench.peers import zstd
from bench.session import OURS, Bench, in_turn, taken
from snapshot.store import Store
from tests.unit.images import manifest, raw

CASE = "command"
MIB = 1 << 20
SMALL_MIB = 20
PIECE = 64 * 1024
WORST = 8
ALONE = ("blake3", "reading", "zstd")
_IMPORTED = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \|\s*(\S+)")


def run(bench: Bench) -> None:
    rounds = bench.rounds(11, quick=3)
    with bench.directory() as place, pages.running(place / "pages", SMALL_MIB) as target:
        for number_, way in in_turn(rounds, list(bench.snaps)):
            row = bench.take(way, target.pid)[1]
            bench.emit(CASE, way, what="take", mib=SMALL_MIB, round=number_, **row)
    bench.say("command: imports")
    for number_ in range(rounds):
        bench.emit(CASE, OURS, what="imports", round=number_, **_imports())
    _many(bench, rounds)
    _verify(bench, rounds)


def _imports() -> Row:
    """ms of each package that a take imports, by the interpreter's own account, which has a cost
    too; and the same without that account."""
    words = "import cli, snapshot.take, snapshot.store"
    listed = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", words],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    packages: Counter[str] = Counter()
    for own, _, name in _IMPORTED.findall(listed.stderr):
        packages[name.split(".")[0]] += int(own)
    walls = []
    for code in ("pass", words):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
        walls.append(time.perf_counter() - began)
    return {
        "python_us": walls[0] * 1e6,
        "imports_us": (walls[1] - walls[0]) * 1e6,
        "packages_us": dict(packages.most_common(WORST)),
    }


def _many(bench: Bench, rounds: int) -> None:
    count = bench.choose(1000, 100)
    bench.say(f"command: a store of {count} images")
    with bench.directory() as place:
        _fill(place / "store", count)
        for number_, way in in_turn(rounds, list(bench.snaps)):
            ran = Snap(place / "store", bench.snaps[way])("list")
            assert len(ran.answer) == count
            bench.emit(CASE, way, what=f"list of {count} images", round=number_,
                       seconds=ran.seconds)  # fmt: skip


def _fill(path: Path, count: int) -> None:
    with Store.open(path, create=True) as store:
        for number_ in range(count):
            name = f"image-{number_:04}"
            with store.begin(name) as writer:
                writer.put([raw(name.encode() * 4096)])
                writer.commit(manifest(name))


def _verify(bench: Bench, rounds: int) -> None:
    mib = bench.sizes([1024], [64])[0]
    with bench.directory() as place, heaps.running(place / "heap", "mixed", mib) as pid:
        store = place / "store"
        row = taken(Snap(store)("take", pid, "--name", "one"))
        memory = heaps.memory_of(pid, mib * MIB)
        ways = [*bench.snaps, *(ALONE if bench.peers else [])]
        for number_, way in in_turn(min(rounds, 5), ways):
            bench.say(f"command: verify, {way}")
            if way in bench.snaps:
                seconds = Snap(store, bench.snaps[way])("verify", "one").seconds
                done = row["saved_bytes"]
            else:
                seconds, done = _alone(way, memory, store)
            bench.emit(CASE, way, what="verify", mib=mib, round=number_, seconds=seconds,
                       mb_per_second=done / seconds / 1e6)  # fmt: skip


def _alone(way: str, memory: list[bytes], store: Path) -> tuple[float, int]:
    """-> seconds, and bytes of memory that an image of so much has."""
    began = time.perf_counter()
    done = sum(map(len, memory))
    if way == "blake3":
        for piece in memory:
            blake3(piece).digest()
    elif way == "reading":
        done = 0
        for path in store.rglob("data.mdb"):
            with path.open("rb", buffering=0) as file:
                while data := file.read(MIB):
                    done += len(data)
    else:
        return zstd.decompress(memory), done
    return time.perf_counter() - began, done


def report(rows: Rows) -> Sequence[Part]:
    return [_take(rows), _packages(rows), _others(rows)]


def _take(rows: Rows) -> Table:
    here = rows.where(what="take", way=OURS)
    imports = rows.where(what="imports", way=OURS)
    stages = Rows(row.get("stages_us", {}) for row in here)
    lines = [
        ["the command, start to end", spread(here.values("seconds"), 1e3)],
        ["of which the take itself", spread(here.values("take_seconds"), 1e3)],
        ["Python alone", spread(imports.values("python_us"), 1e-3)],
        ["all imports of a take", spread(imports.values("imports_us"), 1e-3)],
        ["the target stood still, in all", spread(here.values("pause_us"), 1e-3)],
    ]
    for name in dict.fromkeys(name for row in stages for name in row):
        lines.append([f"in the second stop: {name}", spread(stages.values(name), 1e-3)])
    return Table(f"A take of {SMALL_MIB} MiB, ms: median (largest)", ("what", "ms"), lines)


def _packages(rows: Rows) -> Table:
    found = Rows(row["packages_us"] for row in rows.where(what="imports", way=OURS))
    names = dict.fromkeys(name for row in found for name in row)
    middle = {name: found.median(name) or 0 for name in names}
    lines = [
        [name, number(us, 1e-3)] for name, us in sorted(middle.items(), key=lambda one: -one[1])
    ]
    return Table("What imports cost, by package (-X importtime), ms", ("package", "ms"), lines)


def _others(rows: Rows) -> Table:
    lines = []
    for what, way in rows.distinct("what", "way"):
        if what in ("take", "imports"):
            continue
        here = rows.where(what=what, way=way)
        cells = [spread(here.values("seconds"), 1e3), number(here.median("mb_per_second"))]
        lines.append([what, way if way == OURS else f"{way} alone", *cells])
    columns = ("what", "by", "ms", "MB/s of memory")
    return Table("Other commands: median (largest)", columns, lines)
