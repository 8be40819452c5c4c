"""How long a process stands still for being stopped and let go, on an idle and on a busy machine.

    bench/stops.py [--stops N] [--busy N] [--rounds N]

Two ways in turn: the stopping thread runs before all others (`kernel/urgency.py`), or as an
ordinary one. The target has 16 threads, asleep in all kinds of calls and at work
(tests/targets/threads16.c). JSON lines go to stdout, the table to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a file, Python looks for modules beside it alone

from snapshot import freeze  # noqa: E402
from snapshot.kernel import urgency  # noqa: E402
from tests.harness.victims import Victim, build, c_victim  # noqa: E402

GAP_SECONDS = 0.005
BUSY = "while True: pass"
WAYS = {"urgent": urgency.urgent, "ordinary": nullcontext}


@contextmanager
def busy(count: int) -> Iterator[None]:
    programs = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def stops(victim: Victim, count: int) -> list[int]:
    """Microseconds that the process stood still, in order of length."""
    found = []
    for _ in range(count):
        with freeze.freeze(victim.pid) as frozen:
            pass
        found.append(frozen.stopped_us)
        time.sleep(GAP_SECONDS)
    return sorted(found)


def summary(found: list[int]) -> dict[str, float]:
    """Milliseconds."""
    places = {"median": 0.5, "p90": 0.9, "p99": 0.99}
    marks = {name: found[int(len(found) * place)] for name, place in places.items()}
    return {name: us / 1000 for name, us in {**marks, "longest": found[-1]}.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stops", type=int, default=200, help="of each way in a round (200)")
    parser.add_argument("--busy", type=int, default=4, help="busy programs beside it (4)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    build()
    found: dict[tuple[int, str], list[int]] = {}
    with tempfile.TemporaryDirectory() as directory:
        victim = c_victim(Path(directory), "threads16", life=3600)
        try:
            for _ in range(options.rounds):
                for programs in (0, options.busy):
                    with busy(programs):
                        for way, urgent in WAYS.items():
                            with patch.object(freeze, "urgent", urgent):
                                measured = stops(victim, options.stops)
                            print(json.dumps({"way": way, "busy": programs, **summary(measured)}))
                            found.setdefault((programs, way), []).extend(measured)
            victim.healthy()
        finally:
            victim.kill()
    table = Table("busy programs", "way", "median", "p90", "p99", "longest", title="ms stood still")
    for (programs, way), measured in found.items():
        marks = summary(sorted(measured))
        table.add_row(str(programs), way, *(f"{ms:.2f}" for ms in marks.values()))
    console = Console(stderr=True)
    console.print(table)
    console.print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} CPUs")


if __name__ == "__main__":
    main()
