"""How fast a take is, next to zstd -1 alone on the same data and cores, and what memory it needs.

The memory is that of the whole process tree of the command, seen from outside: anonymous and shared
memory (PSS); pages of the store's file, which the kernel can drop at any time, are another column.
Looking at it slows a take down, so that one is not timed.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench import heaps, machine
from bench.figures import Part, Row, Rows, Table, number, ratio, size, spread
from bench.peers import file, zstd
from bench.session import OURS, Bench, in_turn, taken

CASE = "take"
ALONE = ("zstd", "file")
MIB = 1 << 20
SAMPLE_MIB = 1024
LARGE_MIB = 8192


def run(bench: Bench) -> None:
    for kind, mib in _targets(bench):
        if reason := heaps.why_not(kind):
            bench.emit(CASE, OURS, kind=kind, why_not=reason)
            continue
        machine.warm(2 * mib)
        with bench.directory() as place, heaps.running(place / "heap", kind, mib) as pid:
            rounds = bench.rounds({SAMPLE_MIB: 2}, mib)
            stored = 0
            for number_, way in in_turn(rounds, [*bench.snaps, *(ALONE if bench.peers else [])]):
                bench.say(f"take: {size(mib)}, {kind}, {way}")
                machine.warm(mib + 512)
                if way == "zstd":
                    row = zstd.compress(heaps.memory_of(pid, SAMPLE_MIB * MIB))
                elif way == "file":
                    row = file.write(bench.place, stored, mib * MIB)
                else:
                    row = _take(bench, way, pid)
                    stored = row.get("stored_bytes", stored)
                bench.emit(CASE, way, mib=mib, kind=kind, round=number_, **row)
            for way in bench.snaps:
                machine.warm(mib + 512)
                bench.emit(CASE, way, mib=mib, kind=kind, what="memory", **_memory(bench, way, pid))


def _targets(bench: Bench) -> list[tuple[str, int]]:
    if bench.only_mib:
        return [(kind, mib) for mib in bench.only_mib for kind in heaps.KINDS]
    full = [(kind, SAMPLE_MIB) for kind in heaps.KINDS] + [("mixed", LARGE_MIB)]
    return bench.choose(full, [("redis", 64), ("random", 64)])


def _memory(bench: Bench, way: str, pid: int) -> Row:
    with bench.snap(way) as snap:
        with machine.PeakMemory(snap.pid) as memory:
            ran = snap.run("take", pid)
        return {
            "exit_code": ran.code,
            "peak_bytes": memory.peak_bytes,
            "peak_with_files_bytes": memory.peak_with_files_bytes,
            "available_drop_mib": memory.available_before - memory.available_least,
        }


def _take(bench: Bench, way: str, pid: int) -> Row:
    with bench.snap(way) as snap:
        ran = snap.run("take", pid)
        row = taken(ran)
        if ran.code:
            return row
        files = sum(path.stat().st_blocks * 512 for path in snap.store.rglob("*") if path.is_file())
    return {
        **row,
        "mb_per_second": row["saved_bytes"] / row["seconds"] / 1e6,
        "take_mb_per_second": row["saved_bytes"] / row["take_seconds"] / 1e6,
        "store_bytes": files,
    }


def report(rows: Rows) -> Sequence[Part]:
    lines = []
    for kind, mib in rows.distinct("kind", "mib"):
        here = rows.where(kind=kind, mib=mib)
        ours, theirs = here.where(way=OURS), here.where(way="zstd")
        speed = ours.median("take_mb_per_second")
        zstd_speed = theirs.median("mb_per_second")
        lines.append([
            kind, size(mib),
            spread(ours.values("seconds")),
            number(ours.median("mb_per_second")),
            number(speed),
            number(zstd_speed),
            number(ratio(zstd_speed, speed), 100, " %"),
            number(here.where(way="file").median("mb_per_second")),
            _part(ours), _part(theirs),
            spread(ours.values("peak_bytes"), 1 / MIB),
            number(ours.median("peak_with_files_bytes"), 1 / MIB),
        ])  # fmt: skip
    columns = (
        "memory", "size", "command, s", "command, MB/s", "take, MB/s", "zstd -1 alone, MB/s",
        "take of zstd", "the file alone, MB/s", "stored", "zstd stored", "peak memory, MiB",
        "with its files",
    )  # fmt: skip
    notes = sorted({f"{row['kind']}: {row['why_not']}." for row in rows if "why_not" in row})
    return [Table("Takes: median (largest)", columns, lines), *notes]


def _part(rows: Rows) -> str:
    return number(ratio(rows.median("saved_bytes"), rows.median("stored_bytes")), 100, " %")
