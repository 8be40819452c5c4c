"""Memory that goes before it was saved: this T0 is given up, and the next one is exact."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import snapshot
from snapshot.errors import TakeError
from snapshot.store import Store
from tests.harness import oracle, processes

pytestmark = pytest.mark.live

STAGING = 4 << 20
# The handler runs at once after the pause and unmaps 32 MiB: the highest, which the sweep reaches
# last, after all that the small staging makes it wait for.
VICTIM = """
import mmap, signal, sys
areas = []
for number in range(8):
    area = mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.write(bytes([number + 1]) * len(area))
    areas.append(area)
signal.signal(signal.SIGUSR1, lambda *_: areas.pop(0).close())
print("ready", flush=True)
for line in sys.stdin:
    print(len(areas), flush=True)
"""


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", VICTIM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        processes.kill(process.pid)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()


def left(victim: subprocess.Popen[str]) -> int:
    assert victim.stdin
    assert victim.stdout
    victim.stdin.write("how many\n")
    victim.stdin.flush()
    return int(victim.stdout.readline())


def test_it_tries_again_and_at_last_copies_in_the_pause(
    victim: subprocess.Popen[str], store: Path
) -> None:
    seen: list[oracle.Memory] = []

    def frozen(context: object) -> None:
        seen.append(oracle.read(victim.pid))
        os.kill(victim.pid, signal.SIGUSR1)

    with snapshot.take(
        victim.pid, name="image", store=store, memory=STAGING, hooks={"frozen": frozen}
    ) as image:
        assert oracle.compare(seen[-1], image, victim.pid) == []
        stats = image.manifest.stats
        instants = len(seen)
        assert stats.attempts == instants == 3
        assert len(stats.retry_reasons) == 2
        assert all("unmapped" in reason for reason in stats.retry_reasons)
    assert left(victim) == 5
    with Store.open(store) as opened:
        assert [info.image for info in opened.images()] == ["image"]


def test_it_gives_up_in_the_end_and_leaves_nothing(
    victim: subprocess.Popen[str], store: Path
) -> None:
    from snapshot.hooks import Hooks
    from snapshot.take import take

    hooks = Hooks({"frozen": lambda _: os.kill(victim.pid, signal.SIGUSR1)}, installed=False)
    with pytest.raises(TakeError, match="no exact image of process"):
        take(victim.pid, store=store, name="image", memory=STAGING, hooks=hooks, attempts=1)
    assert left(victim) == 7
    with Store.open(store) as opened:
        assert opened.images() == []
