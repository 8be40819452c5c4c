"""Shared memory that is written through a mapping which is not protected, so that nothing tells of
it: one that mremap makes during the take (of no size, or leaving the old place mapped), or that of
another process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import snapshot
from snapshot.ahead import Ahead
from snapshot.manifest import TakeStats
from tests.harness import oracle, processes

pytestmark = pytest.mark.live

# Its answer comes when everything has been written through the mapping that was made last.
VICTIM = """
import ctypes, mmap, os, signal, sys
how, size = sys.argv[1], 128 << 20
mremap = ctypes.CDLL(None).mremap
mremap.restype = ctypes.c_void_p
mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
area = mmap.mmap(-1, size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
area.write(b"a" * size)
at = ctypes.addressof(ctypes.c_char.from_buffer(area))
reserved = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
to = ctypes.addressof(ctypes.c_char.from_buffer(reserved))

def again(*_):
    if how == "twice":
        other = mremap(at, 0, size, 1, None)
        ctypes.memset(other, ord("b"), size)
        ctypes.CDLL(None).munmap(ctypes.c_void_p(other), size)
    elif how == "kept":
        assert mremap(at, size, size, 1 | 2 | 4, to) == to
        ctypes.memset(at, ord("b"), size)
    elif how == "child":
        ctypes.memset(at, ord("b"), size)
    else:
        assert mremap(at, size, size, 1 | 2, to) == to
        ctypes.memset(to, ord("b"), size)
    print("written", flush=True)

signal.signal(signal.SIGUSR1, again)
if how == "child":
    while os.fork():
        signal.pause()
    print(os.getpid(), flush=True)
print("ready", flush=True)
while True:
    signal.pause()
"""


class Target:
    def __init__(self, how: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", VICTIM, how], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout
        self.pid = self.writer = self.process.pid
        if how == "child":
            self.writer = int(self.process.stdout.readline())
        self.says("ready")

    def says(self, word: str) -> None:
        assert self.process.stdout
        assert self.process.stdout.readline() == f"{word}\n"

    def go(self) -> None:
        os.kill(self.writer, signal.SIGUSR1)


@pytest.fixture
def start() -> Iterator[Callable[[str], Target]]:
    started: list[Target] = []

    def one(how: str) -> Target:
        started.append(Target(how))
        return started[-1]

    yield one
    for target in started:
        processes.kill(target.pid)
        target.process.wait()
        if target.writer != target.pid:
            processes.kill(target.writer)
        if target.process.stdout:
            target.process.stdout.close()


def exact(target: Target, store: Path, *, now: bool, after_t0: bool) -> TakeStats:
    seen: list[oracle.Memory] = []

    def frozen(context: object) -> None:
        seen.append(oracle.read(target.pid))
        if after_t0 and len(seen) == 1:
            target.go()

    with snapshot.take(
        target.pid, name="image", store=store, now=now, memory=4 << 20, hooks={"frozen": frozen}
    ) as image:
        assert oracle.compare(seen[-1], image, target.pid) == []
        return image.manifest.stats


def test_mapped_once_more_after_t0(start: Callable[[str], Target], store: Path) -> None:
    """mremap waits until its event is read: what shared memory is unsaved is saved before that."""
    target = start("twice")
    assert exact(target, store, now=True, after_t0=True).attempts == 1
    target.says("written")


def test_moved_and_kept_after_t0(start: Callable[[str], Target], store: Path) -> None:
    target = start("kept")
    stats = exact(target, store, now=True, after_t0=True)
    target.says("written")
    assert stats.attempts == 2
    assert "mapped once more" in stats.retry_reasons[0]


def test_only_moved_after_t0(start: Callable[[str], Target], store: Path) -> None:
    """Nothing is left behind that could be written unseen: no reason for another T0."""
    target = start("moved")
    assert exact(target, store, now=True, after_t0=True).attempts == 1
    target.says("written")


def test_written_by_a_child_after_t0(start: Callable[[str], Target], store: Path) -> None:
    """It is not stopped: what it shares with the target is copied while that stands still."""
    target = start("child")
    assert exact(target, store, now=True, after_t0=True).attempts == 1
    target.says("written")


@pytest.mark.parametrize("how", ["twice", "kept", "moved", "child"])
def test_between_the_copy_and_t0(
    start: Callable[[str], Target], store: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    target = start(how)
    copy = Ahead.copy

    def then_write(ahead: Ahead, report: Callable[[], None], *, patient: bool) -> None:
        copy(ahead, report, patient=patient)
        target.go()
        target.says("written")

    monkeypatch.setattr(Ahead, "copy", then_write)
    stats = exact(target, store, now=False, after_t0=False)
    assert (stats.attempts, stats.rounds > 0) == (1, True)
