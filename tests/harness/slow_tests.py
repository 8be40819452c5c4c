"""What the machine did while a test took long: for runs on one that cannot be looked at."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

LONG = 45.0
"""Seconds; the longest takes 20 on two quiet processors."""
NAMED = 5
"""Processes: those that have used most."""
_TICK = os.sysconf("SC_CLK_TCK")


@contextmanager
def told(item: pytest.Item) -> Iterator[None]:
    """A line says so at once when the test in the block took long: the tests may yet be killed."""
    begin = Machine.now()
    yield
    end = Machine.now()
    if end.clock - begin.clock > LONG:
        reporter = item.config.pluginmanager.getplugin("terminalreporter")
        reporter.write_line("")  # its dot stands alone in the line, of which `-q` keeps no account
        reporter.write_line(f"{item.nodeid} took {end.since(begin)}; most used by {busiest()}")


class Machine(NamedTuple):
    """Seconds since it started, summed over its processors where they are of processors."""

    clock: float
    used: float
    stolen: float
    """The host had a processor that somebody here wanted (as far as it tells)."""
    no_processor: float
    """Somebody had to wait for a processor (proc_pressure)."""
    no_disk: float

    @classmethod
    def now(cls) -> Machine:
        ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        used, stolen = sum(ticks[:3]) / _TICK, ticks[7] / _TICK
        return cls(time.monotonic(), used, stolen, _pressure("cpu"), _pressure("io"))

    def since(self, begin: Machine) -> str:
        took = [now - then for now, then in zip(self, begin, strict=True)]
        clock, used, stolen, no_processor, no_disk = (f"{one:.1f}" for one in took)
        return (
            f"{clock} s: processors used for {used} s, stolen for {stolen} s, waited for in "
            f"{no_processor} s, the disk in {no_disk} s"
        )


def _pressure(of: str) -> float:
    """NaN where the kernel does not tell."""
    try:
        some = Path(f"/proc/pressure/{of}").read_text().split("\n", 1)[0]
    except OSError:
        return float("nan")
    return int(some.rsplit("total=", 1)[1]) / 1e6


def busiest() -> str:
    """The processes that have used most of the processors, with the seconds that they did."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                name, fields = (entry / "stat").read_text(errors="replace").rsplit(") ", 1)
                ticks = sum(map(int, fields.split()[11:13]))  # utime, stime
                found.append((ticks / _TICK, f"{entry.name} {name.split('(', 1)[1]}"))
    return ", ".join(f"{name} {used:.0f} s" for used, name in sorted(found)[: -NAMED - 1 : -1])
