"""`targets/pages.c`: memory of 4 KiB pages, and threads that tell what they felt."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness.processes import wait_until
from tests.harness.victims import Victim

from .figures import Row
from .targets import BIN, build

LONG_NS = 1_000_000
"""A gap of the target's own clock that counts as a stall."""


@dataclass(frozen=True)
class Gap:
    """ns of CLOCK_MONOTONIC, and how often the thread was switched away: by itself (stopped, or
    waiting in a fault), or for somebody else."""

    begin: int
    end: int
    waited: int
    preempted: int

    @property
    def length(self) -> int:
        return self.end - self.begin

    @property
    def cause(self) -> str:
        """`stopped` has the say when both occurred: then the target did stand still."""
        if self.waited:
            return "stopped"
        return "preempted" if self.preempted else "machine"


@dataclass(frozen=True)
class Felt:
    """What the threads of the target have felt since the last mark."""

    now: int
    clock: list[Gap]
    writers: list[Gap]
    operations: int  # of all writers, since they began
    touches: list[tuple[int, int]]  # when, and ns that it took

    def row(self) -> Row:
        stopped = [gap.length for gap in self.clock if gap.cause == "stopped"]
        longest = max(self.clock, key=lambda gap: gap.length, default=None)
        return {
            "target_longest_us": longest.length / 1000 if longest else 0.0,
            "target_longest_cause": longest.cause if longest else "",
            "target_stopped_longest_us": max(stopped, default=0) / 1000,
            "target_stopped_us": sum(stopped) / 1000,
            "target_stalls": [
                [round(gap.length / 1000), gap.cause]
                for gap in self.clock
                if gap.length >= LONG_NS
            ],
            "writers_longest_us": max((gap.length for gap in self.writers), default=0) / 1000,
            "writers_stalls": sum(gap.length >= LONG_NS for gap in self.writers),
        }


class Pages(Victim):
    """Started, filled and ready. Its threads are asleep until they are told otherwise."""

    def __init__(
        self, directory: Path, mib: int, fill: str = "mixed", huge: bool = False
    ) -> None:
        build()
        self.mib = mib
        self.answer_path = directory / "answer"
        self.commands_path = directory / "commands"
        self.commands = 0
        words = [str(BIN / "pages"), "--mib", str(mib), "--fill", fill, "--life", "7200"]
        words += ["--huge", str(int(huge))]
        words += ["--commands", str(self.commands_path), "--answer", str(self.answer_path)]
        super().__init__(directory, words)

    def tell(self, *words: object, seconds: float = 120.0) -> dict[str, Any]:
        """A command, and the target's answer to it."""
        self.commands += 1
        self.commands_path.write_text(f"{self.commands} {' '.join(map(str, words))}\n")
        self.signal(signal.SIGUSR1)
        found: dict[str, Any] = {}

        def answered() -> bool:
            found.update(json.loads(self.answer_path.read_text()))
            return bool(found["number"] == self.commands)

        wait_until(self._has_answered, f"the first answer of {self.name}", seconds)
        wait_until(answered, f"{self.name} carrying out {words[0]}", seconds)
        return found

    def _has_answered(self) -> bool:
        return self.answer_path.exists() or not self._or_dead()

    def felt(self) -> Felt:
        found = self.tell("report")
        lanes = [[Gap(*gap) for gap in lane["gaps"]] for lane in found["lanes"]]
        return Felt(
            now=found["now"],
            clock=lanes[0],
            writers=[gap for lane in lanes[1:] for gap in lane],
            operations=sum(lane["operations"] for lane in found["lanes"][1:]),
            touches=[(at, ns) for at, ns in found["touches"]],
        )

    @contextmanager
    def watched(self, before: float = 0.2) -> Iterator[Row]:
        """What the target feels while the block runs is in the row when it is over."""
        time.sleep(before)
        self.tell("mark")
        row: Row = {}
        yield row
        row |= self.felt().row()


@contextmanager
def running(
    directory: Path, mib: int, fill: str = "mixed", huge: bool = False
) -> Iterator[Pages]:
    directory.mkdir()
    target = Pages(directory, mib, fill, huge)
    try:
        yield target
    finally:
        target.kill()
