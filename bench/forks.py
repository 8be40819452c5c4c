"""What a take costs a target that forks: how long fork takes, and its child until it has written.

    bench/forks.py [--rounds N]

Without shared memory, where the kernel is not asked to tell of forks, and with it; before a take
and during one, in both modes. Medians and maxima of all rounds. Needs root.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a file, Python looks for modules beside it alone

import snapshot  # noqa: E402
from tests.harness.victims import Victim, build, c_victim  # noqa: E402

SIZES = [(256, 0), (256, 16), (16, 256)]
"""MiB of private and of shared memory, in 4 KiB pages."""
WAYS = {"ahead": False, "at once": True}
BEFORE_SECONDS = 0.5

Samples = list[tuple[int, int]]  # ns: fork, the child has written


def samples(path: Path, since: int, until: int) -> Samples:
    lines = [tuple(map(int, line.split())) for line in path.read_text().splitlines()]
    return [(fork, wrote) for began, fork, wrote in lines if since <= began < until]


def take(victim: Victim, store: Path, now: bool) -> tuple[int, int]:
    """-> from when to when, about, it was protected"""
    began: list[int] = []
    hooks = {"before-freeze": lambda _: began.append(time.monotonic_ns())}
    with snapshot.take(victim.pid, name="i", store=store, now=now, hooks=hooks) as image:
        seconds = image.manifest.stats.seconds
    return began[0], began[0] + int(seconds * 1e9)


def one_round(private: int, shared: int, now: bool) -> tuple[Samples, Samples]:
    """Before the take, and during it."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        times = place / "times"
        victim = c_victim(place, "shares", how="time", mib=shared, private=private, times=times)
        try:
            began = time.monotonic_ns()
            time.sleep(BEFORE_SECONDS)
            first, last = take(victim, place / "store", now)
            victim.goes_on()
            return samples(times, began, first), samples(times, first, last)
        finally:
            victim.kill()


def figures(values: list[int]) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values) / 1e6:.1f} / {max(values) / 1e6:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    build()
    found: dict[tuple[int, int, str], Samples] = {}
    for _ in range(rounds):
        for private, shared in SIZES:
            for way, now in WAYS.items():
                before, during = one_round(private, shared, now)
                found.setdefault((private, shared, "none"), []).extend(before)
                found.setdefault((private, shared, way), []).extend(during)
    table = Table(title="ms, median / maximum")
    for column in ("private MiB", "shared MiB", "take", "forks", "fork", "the child has written"):
        table.add_column(column)
    for (private, shared, way), some in sorted(found.items()):
        forks, writes = figures([one for one, _ in some]), figures([one for _, one in some])
        table.add_row(str(private), str(shared), way, str(len(some)), forks, writes)
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
