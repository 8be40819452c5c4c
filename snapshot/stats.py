"""What take and restore say of themselves: progress while they run, timings when they are done.

Pure but for the clock. Statistics are always collected, whether or not anybody prints them; those
of a take are `manifest.TakeStats` and stay in the image.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from msgspec import Struct, field

from .units import mib


class Progress(Struct, frozen=True):
    """One moment of a take, as its progress callback sees it. Bytes, seconds since its start.

    `phase` is a word for people: "arming", "saving", "storing", …; `armed_bytes` is what is to be
    saved in all as far as known now, and may still grow.
    """

    phase: str
    saved_bytes: int = 0
    armed_bytes: int = 0
    faults: int = 0
    seconds: float = 0.0

    @property
    def fraction(self) -> float:
        """Saved of armed, 0.0 to 1.0; 0.0 while nothing is armed."""
        if self.armed_bytes <= 0:
            return 0.0
        return min(1.0, self.saved_bytes / self.armed_bytes)

    @property
    def rate(self) -> float:
        """Bytes saved per second since the start, 0.0 before any time has passed."""
        return self.saved_bytes / self.seconds if self.seconds > 0 else 0.0

    def line(self) -> str:
        """`saving  312.0 MiB of 512.0 MiB, 184 faults, 640.0 MiB/s`"""
        return (
            f"{self.phase}  {mib(self.saved_bytes)} of {mib(self.armed_bytes)}, "
            f"{self.faults} faults, {mib(int(self.rate))}/s"
        )


ProgressCallback = Callable[[Progress], None]


class Stopwatch(Struct):
    """Where time went, by name, in µs: `with clock.stage("capture"): …`; stages add up.

    Monotonic. `elapsed_us` and `seconds` count from the construction.
    """

    stages_us: dict[str, int] = field(default_factory=dict)
    started_ns: int = field(default_factory=time.monotonic_ns)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.monotonic_ns()
        try:
            yield
        finally:
            spent = (time.monotonic_ns() - begin) // 1000
            self.stages_us[name] = self.stages_us.get(name, 0) + spent

    @property
    def elapsed_us(self) -> int:
        return (time.monotonic_ns() - self.started_ns) // 1000

    @property
    def seconds(self) -> float:
        return (time.monotonic_ns() - self.started_ns) / 1e9


def microseconds(value: int) -> str:
    """A time for people: `870 µs`, `12.4 ms`, `3.20 s`."""
    if value < 1000:
        return f"{value} µs"
    if value < 1_000_000:
        return f"{value / 1000:.1f} ms"
    return f"{value / 1_000_000:.2f} s"
