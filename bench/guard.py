"""What each way to an exact image costs: copied ahead or T0 at once, guarded or not.

    bench/guard.py [--rounds N] [--mib N]

For a target that writes everywhere and one that maps and unmaps all the time, the ways are taken in
turn, several rounds; medians. JSON lines with every single take go to stdout, the table to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a file, Python looks for modules beside it alone

from bench.commands import Snap  # noqa: E402
from tests.harness.victims import Victim, build, c_victim  # noqa: E402

WAYS = {
    "ahead": [],
    "ahead, guarded": ["--guard", "always"],
    "at once": ["--now"],
    "at once, guarded": ["--now", "--guard", "always"],
    "at once, never guarded": ["--now", "--guard", "never"],
}
BEFORE_SECONDS = 1.0


def targets(mib: int) -> dict[str, dict[str, Any]]:
    return {
        "writes: 2 threads, at random, without pause": {
            "name": "writer", "kind": "anon", "mib": mib, "threads": 2,
        },
        "writes: 5,000 pages a second": {
            "name": "writer", "kind": "anon", "mib": mib, "threads": 2, "rate": 2500,
        },
        "maps and unmaps: 2 threads": {
            "name": "storm", "what": "munmap", "mib": mib // 4, "threads": 2,
        },
    }


def done(victim: Victim) -> int:
    return sum(victim.status().progress)


def take(victim: Victim, snap: Snap, options: list[str]) -> dict[str, Any]:
    """One take, with what the target got done in a second before it and during it."""
    before = done(victim)
    time.sleep(BEFORE_SECONDS)
    usual = (done(victim) - before) / BEFORE_SECONDS
    before = done(victim)
    ran = snap.run("take", victim.pid, *options)
    during = (done(victim) - before) / ran.seconds
    found = ran.answer
    if "image" in found:
        snap("rm", found["image"])
    kept = ("pause_us", "longest_stop_us", "attempts", "rounds", "remainder_bytes", "saved_bytes")
    return {
        "exit_code": ran.code,
        "seconds": ran.seconds,
        "throughput": during / usual if usual else 0.0,
        **{name: found.get(name, 0) for name in kept},
    }


def measure(rounds: int, mib: int) -> list[dict[str, Any]]:
    taken = []
    for label, options in targets(mib).items():
        with tempfile.TemporaryDirectory(prefix="snap-bench-", ignore_cleanup_errors=True) as name:
            path = Path(name)
            victim = c_victim(path, **options, life=3600)
            try:
                for number in range(rounds):
                    for way, flags in WAYS.items():
                        row = {"target": label, "way": way, "round": number, "mib": mib}
                        row |= take(victim, Snap(path / "store"), flags)
                        print(json.dumps(row), flush=True)
                        taken.append(row)
            finally:
                victim.kill()
    return taken


def table(taken: list[dict[str, Any]]) -> Table:
    columns = ("target", "way", "all stops", "longest", "takes", "attempts", "rounds", "remainder",
               "target's throughput", "failed")
    made = Table(*columns)
    for label, way in dict.fromkeys((row["target"], row["way"]) for row in taken):
        rows = [row for row in taken if (row["target"], row["way"]) == (label, way)]
        good = [row for row in rows if row["exit_code"] == 0]

        def median(name: str, good: list[dict[str, Any]] = good) -> float:
            return statistics.median(row[name] for row in good) if good else 0.0

        made.add_row(
            label,
            way,
            f"{median('pause_us') / 1000:.1f} ms",
            f"{median('longest_stop_us') / 1000:.1f} ms",
            f"{median('seconds'):.2f} s",
            f"{median('attempts'):g}",
            f"{median('rounds'):g}",
            f"{median('remainder_bytes') / (1 << 20):.1f} MiB",
            f"{median('throughput'):.0%}",
            f"{len(rows) - len(good)} of {len(rows)}",
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=256)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the victim is ended with us
    build()
    taken = measure(options.rounds, options.mib)
    console = Console(stderr=True, width=200)
    console.print(table(taken))
    console.print(f"load average at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
