"""What is written right before T0 is copied while the target runs: rounds of what faults list
(decision 33)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import snapshot
from snapshot.pump import Pump
from tests.harness import oracle, processes

pytestmark = pytest.mark.live

WRITTEN = 50
"""Pages, each in a chunk of its own."""
PAGE = 4096
TARGET = f"""
import mmap, sys
area = mmap.mmap(-1, 512 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(mmap.MADV_NOHUGEPAGE)
for at in range(0, len(area), {PAGE}):
    area[at] = 1
print(flush=True)
for turn, line in enumerate(sys.stdin):
    for number in range({WRITTEN}):
        area[(number << 20) + turn % 16 * {PAGE}] = 2 + turn % 200
    print(flush=True)
"""


@pytest.fixture
def target() -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", TARGET]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"
            yield process
        finally:
            processes.kill(process.pid)


def write(target: subprocess.Popen[bytes]) -> None:
    assert target.stdin is not None
    assert target.stdout is not None
    os.write(target.stdin.fileno(), b"\n")
    assert os.read(target.stdout.fileno(), 1) == b"\n"


@pytest.mark.parametrize("watched", [False, True], ids=["one call", "step by step"])
def test_what_is_listed_is_copied_before_the_stop(
    listed: None,
    target: subprocess.Popen[bytes],
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    watched: bool,
) -> None:
    """It writes before each of the two rounds: without them all of that is left to the pause,
    beside what is copied there in any case (files' pages, of which nothing tells)."""
    seen: list[oracle.Memory] = []
    hooks = {"frozen": lambda _: seen.append(oracle.read(target.pid))} if watched else {}

    def pages_left(*, rounds: bool) -> int:
        def before(pump: Pump, report: Callable[[], None]) -> None:
            write(target)
            if rounds:
                real(pump, report)

        seen.clear()
        with monkeypatch.context() as patched:
            real = Pump.listed_round
            patched.setattr(Pump, "listed_round", before)
            with snapshot.take(target.pid, store=store, writers="pass", hooks=hooks) as image:
                stats = image.manifest.stats
                for memory in seen[-1:]:
                    assert oracle.compare(memory, image, target.pid) == []
        assert len(seen) == (stats.attempts if watched else 0)
        assert stats.listed
        return stats.remainder_bytes // PAGE

    write(target)  # for the first time: then the interpreter's own pages have been written, too
    without = pages_left(rounds=False)
    assert without >= 2 * WRITTEN
    assert pages_left(rounds=True) <= without - WRITTEN
