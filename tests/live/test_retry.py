"""Memory that goes before it was saved: this T0 is given up, and the next one is exact."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import snapshot
from snapshot import faults
from snapshot.errors import TakeError
from snapshot.manifest import TakeStats
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


def take_and_unmap(victim: subprocess.Popen[str], store: Path, **options: Any) -> TakeStats:
    """An exact image, although memory goes right after each T0."""
    seen: list[oracle.Memory] = []

    def frozen(context: object) -> None:
        seen.append(oracle.read(victim.pid))
        os.kill(victim.pid, signal.SIGUSR1)

    hooks = {"frozen": frozen}
    with snapshot.take(
        victim.pid, name="image", store=store, memory=STAGING, hooks=hooks, **options
    ) as image:
        assert oracle.compare(seen[-1], image, victim.pid) == []
        stats = image.manifest.stats
        assert stats.attempts == len(seen) == len(stats.retry_reasons) + 1
        assert left(victim) == 8 - len(seen)
    with Store.open(store) as opened:
        assert [info.image for info in opened.images()] == ["image"]
    return stats


@pytest.mark.parametrize("writers", ["wait", "pass"])
def test_what_was_copied_ahead_cannot_be_lost(
    victim: subprocess.Popen[str], store: Path, writers: str
) -> None:
    stats = take_and_unmap(victim, store, writers=writers)
    assert stats.writers == writers
    assert stats.attempts == 1
    assert stats.rounds >= 1
    assert stats.remainder_bytes < 2 << 20


def test_what_goes_before_the_list_is_proved(
    listed: None, victim: subprocess.Popen[str], store: Path
) -> None:
    """Where T0 did with a list of faults, memory that is unmapped before all was looked at makes it
    void, if it is that fast; the next one looks at all."""
    stats = take_and_unmap(victim, store, writers="pass")
    assert stats.attempts in (1, 2)
    assert stats.listed == (stats.attempts == 1)
    assert all("unmapped" in reason for reason in stats.retry_reasons)


def test_who_writes_without_a_fault_is_found(
    listed: None, victim: subprocess.Popen[str], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process writes between the last look and T0, and no fault tells of it: that T0 is
    given up, and the next one looks at all."""
    line = next(line for line in oracle.maps(victim.pid) if line.end - line.start >= 32 << 20)
    seen: list[oracle.Memory] = []

    def write(name: str) -> None:
        if name == "second-stop":
            text = b"%d" % len(seen)
            with open(f"/proc/{victim.pid}/mem", "r+b", buffering=0) as memory:
                assert os.pwrite(memory.fileno(), text, line.end - (1 << 20)) == len(text)

    monkeypatch.setattr(faults, "point", write)
    hooks = {"frozen": lambda _: seen.append(oracle.read(victim.pid))}
    with snapshot.take(victim.pid, store=store, writers="pass", hooks=hooks) as image:
        assert oracle.compare(seen[-1], image, victim.pid) == []
        stats = image.manifest.stats
    assert len(seen) == stats.attempts == 2
    assert not stats.listed
    assert "no page fault told of it" in stats.retry_reasons[0]


def test_t0_at_once_loses_it_and_another_is_tried(
    victim: subprocess.Popen[str], store: Path
) -> None:
    """The second copies ahead, and what is left while the target stands still."""
    stats = take_and_unmap(victim, store, now=True, writers="wait")
    assert stats.attempts == 2
    assert stats.guarded
    assert stats.rounds >= 1
    assert all("unmapped" in reason for reason in stats.retry_reasons)


def test_guarded_from_the_first(victim: subprocess.Popen[str], store: Path) -> None:
    stats = take_and_unmap(victim, store, now=True, guard="always")
    assert (stats.attempts, stats.rounds, stats.guarded) == (1, 0, True)
    assert stats.remainder_bytes > 256 << 20


def test_never_guarded_it_fails(victim: subprocess.Popen[str], store: Path) -> None:
    with pytest.raises(TakeError, match="unmapped") as raised:
        take_and_unmap(victim, store, now=True, guard="never")
    assert "--guard always" in raised.value.hint
    assert left(victim) == 7
    with Store.open(store) as opened:
        assert opened.images() == []


def test_it_gives_up_in_the_end_and_leaves_nothing(
    victim: subprocess.Popen[str], store: Path
) -> None:
    from snapshot.hooks import Hooks
    from snapshot.take import take

    hooks = Hooks({"frozen": lambda _: os.kill(victim.pid, signal.SIGUSR1)}, installed=False)
    with pytest.raises(TakeError, match="no exact image of process"):
        take(
            victim.pid,
            store=store,
            name="image",
            memory=STAGING,
            hooks=hooks,
            now=True,
            attempts=1,
        )
    assert left(victim) == 7
    with Store.open(store) as opened:
        assert opened.images() == []


GIVEN_UP = """
import mmap, sys
area = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.write(b"x" * len(area))
area.madvise(mmap.MADV_FREE)
print("ready", flush=True)
sys.stdin.read()
"""
PROCESS_MADVISE, MADV_PAGEOUT = 440, 21


def reclaim(pid: int) -> None:
    """Its memory, as the kernel does it when memory is short: what was given up is gone then."""
    lines = [line for line in oracle.maps(pid) if not line.name and line.writable]
    largest = max(lines, key=lambda line: line.end - line.start)
    piece = (ctypes.c_size_t * 2)(largest.start, largest.end - largest.start)
    handle = os.pidfd_open(pid)
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.syscall(PROCESS_MADVISE, handle, piece, 1, MADV_PAGEOUT, 0)
    os.close(handle)
    assert done > 0, os.strerror(ctypes.get_errno())


def test_what_no_event_tells_is_not_waited_for(store: Path) -> None:
    """Pages given up by MADV_FREE go without an event: another T0 follows at once."""
    with subprocess.Popen(
        [sys.executable, "-c", GIVEN_UP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            seen: list[oracle.Memory] = []

            def frozen(context: object) -> None:
                seen.append(oracle.read(process.pid))
                if len(seen) == 1:
                    reclaim(process.pid)

            with snapshot.take(
                process.pid, name="image", store=store, now=True, hooks={"frozen": frozen}
            ) as image:
                assert oracle.compare(seen[-1], image, process.pid) == []
                stats = image.manifest.stats
        finally:
            process.kill()
    assert stats.attempts == 2
    assert "lost its protection" in stats.retry_reasons[0]
    assert stats.seconds < 8
