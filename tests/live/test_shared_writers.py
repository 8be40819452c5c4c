"""Shared memory, and who comes to write to it during a take: children forked then, other processes,
a descriptor, a mapping that grows. What is written after T0 is not in the image, whoever wrote it;
what was written before is, although it was copied ahead of that.

Victim: tests/targets/shares.c. Nothing depends on who is faster: what a writer may write unseen
it has written before the store takes a chunk of what is saved after T0.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import snapshot
from snapshot import examine
from snapshot.ahead import Ahead
from snapshot.errors import DeniedError
from snapshot.kernel import procfs
from snapshot.kernel.uffd import FEATURES, Uffd
from snapshot.manifest import TakeStats
from snapshot.pump import Pump
from snapshot.writer import RawChunk
from tests.conftest import Spawn
from tests.harness import oracle, processes
from tests.harness.victims import Victim

pytestmark = pytest.mark.live

LITTLE = 4 << 20
MIB = 24

# Another process, that has the file open or mapped, writes to all of it and stays.
OTHER = """
import mmap, os, sys
how, path = sys.argv[1:]
fd = os.open(path, os.O_RDWR)
size = os.fstat(fd).st_size
if how == "maps":
    area = mmap.mmap(fd, size)
    os.close(fd)
    area.write(b"o" * size)
else:
    os.pwrite(fd, b"o" * size, 0)
print("written", flush=True)
sys.stdin.read()
"""


class Others:
    """Other processes of the test, and what they have written."""

    def __init__(self) -> None:
        self.started: list[subprocess.Popen[str]] = []

    def write(self, how: str, path: Path) -> None:
        one = subprocess.Popen(
            [sys.executable, "-c", OTHER, how, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.started.append(one)
        assert one.stdout
        assert one.stdout.readline() == "written\n"

    def end(self) -> None:
        for one in self.started:
            one.kill()
            one.communicate()


@pytest.fixture
def others() -> Iterator[Others]:
    made = Others()
    yield made
    made.end()


@pytest.fixture
def file() -> Iterator[Path]:
    """The name of a file on a tmpfs."""
    path = Path(f"/dev/shm/snap-shares-{os.getpid()}")
    yield path
    path.unlink(missing_ok=True)


def written(victim: Victim, times: int = 1) -> None:
    processes.wait_until(
        lambda: victim.status().values[2] >= times, f"{victim.name} writing to shared memory", 60
    )


def write(victim: Victim, times: int = 1) -> None:
    victim.signal(signal.SIGUSR1)
    written(victim, times)


def storing_waits(monkeypatch: pytest.MonkeyPatch, until: Callable[[], None]) -> None:
    """The store takes nothing before `until` returns."""
    store = Pump.store

    def late(pump: Pump, sink: Callable[[Sequence[RawChunk]], None], threads: int) -> None:
        def take(chunks: Sequence[RawChunk]) -> None:
            until()
            sink(chunks)

        store(pump, take, threads)

    monkeypatch.setattr(Pump, "store", late)


def held() -> int:
    """Userfaultfds that this process has: one that is forgotten holds a child for ever."""
    links = [Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link) == "anon_inode:[userfaultfd]" for link in links if link.exists())


def exact(
    victim: Victim, store: Path, *, at_t0: Callable[[], None] = lambda: None, **options: Any
) -> TakeStats:
    """`at_t0` is called at the first T0, when the oracle has read it."""
    seen: list[oracle.Memory] = []

    def frozen(context: object) -> None:
        seen.append(oracle.read(victim.pid))
        if len(seen) == 1:
            at_t0()

    with snapshot.take(
        victim.pid, name="image", store=store, memory=LITTLE, hooks={"frozen": frozen}, **options
    ) as image:
        assert oracle.compare(seen[-1], image, victim.pid) == []
        assert held() == 0
        return image.manifest.stats


def between(monkeypatch: pytest.MonkeyPatch, then: Callable[[], None]) -> None:
    """Between the copying ahead and T0, once."""
    copy, done = Ahead.copy, list[bool]()

    def copied(ahead: Ahead, report: Callable[[], None], *, patient: bool) -> None:
        copy(ahead, report, patient=patient)
        if not done:
            done.append(True)
            then()

    monkeypatch.setattr(Ahead, "copy", copied)


# --- children ------------------------------------------------------------------------------------


@pytest.mark.parametrize("children", [1, 300])
def test_forked_after_t0(
    spawn: Spawn, store: Path, monkeypatch: pytest.MonkeyPatch, children: int
) -> None:
    """They wait, at their first write, until all shared memory is saved."""
    victim = spawn("shares", mib=MIB, children=children)
    storing_waits(monkeypatch, lambda: written(victim))
    stats = exact(victim, store, at_t0=lambda: victim.signal(signal.SIGUSR1), now=True)
    assert (stats.attempts, stats.remainder_bytes > MIB << 20) == (1, True)
    victim.healthy()


def test_a_child_is_known_wherever_it_has_the_memory(
    spawn: Spawn, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was forked after T0 and lives in an address space of the target's making."""
    victim = spawn("shares", mib=MIB, stay=1, move=1)
    storing_waits(monkeypatch, lambda: written(victim))

    def fork_in_a_later_tick() -> None:
        t0 = time.clock_gettime(time.CLOCK_BOOTTIME)
        tick = 1 / procfs.CLOCK_TICKS
        processes.wait_until(
            lambda: time.clock_gettime(time.CLOCK_BOOTTIME) > t0 + tick, "the next tick"
        )
        victim.signal(signal.SIGUSR1)

    assert exact(victim, store, at_t0=fork_in_a_later_tick, now=True).attempts == 1


@pytest.mark.parametrize("stay", [0, 1])
def test_forked_between_the_copy_and_t0(
    spawn: Spawn, store: Path, monkeypatch: pytest.MonkeyPatch, stay: int
) -> None:
    """Nothing that was copied ahead counts, nor is anything armed that they can write to."""
    victim = spawn("shares", mib=MIB, children=30, stay=stay)
    between(monkeypatch, lambda: write(victim))
    stats = exact(victim, store)
    assert (stats.attempts, stats.remainder_bytes > MIB << 20) == (1, True)
    write(victim, 2)


@pytest.mark.parametrize("now", [False, True])
def test_forked_before_events_are_told(
    spawn: Spawn, store: Path, monkeypatch: pytest.MonkeyPatch, now: bool
) -> None:
    """A child that was forked after the target was examined, and before anything was registered."""
    victim = spawn("shares", mib=MIB, stay=1)
    examined = examine.examine

    def then_fork(*arguments: Any) -> examine.Examination:
        found = examined(*arguments)
        if victim.status().values[2] == 0:
            write(victim)
        return found

    def by_the_child() -> None:
        (child,) = processes.descendants(victim.pid)
        with open(f"/proc/{child}/mem", "r+b", buffering=0) as memory:
            memory.seek(victim.status().values[0])
            assert memory.write(b"x" * (MIB << 20)) == MIB << 20

    monkeypatch.setattr(examine, "examine", then_fork)
    if now:
        stats = exact(victim, store, at_t0=by_the_child, now=True)
    else:
        between(monkeypatch, by_the_child)
        stats = exact(victim, store)
    assert (stats.attempts, stats.remainder_bytes > MIB << 20) == (1, True)


def test_that_shares_the_address_space(spawn: Spawn, store: Path) -> None:
    """No event tells of a child of vfork: its writes are the target's own."""
    victim = spawn("shares", how="vfork", mib=MIB)
    stats = exact(victim, store, at_t0=lambda: victim.signal(signal.SIGUSR1), now=True)
    written(victim)
    assert stats.attempts == 1


def test_a_fork_goes_on_when_snap_is_killed(spawn: Spawn, store: Path) -> None:
    """So does the child that waits: the kernel closes its userfaultfd."""
    victim = spawn("shares", mib=MIB)
    with subprocess.Popen(
        [sys.executable, "-c", STUCK, str(victim.pid), str(store)],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "resumed\n"
            victim.signal(signal.SIGUSR1)
            processes.wait_until(
                lambda: processes.descendants(victim.pid) != [], "the child being forked", 30
            )
            assert victim.status().values[2] == 0
        finally:
            process.kill()
    written(victim)
    victim.healthy()


# A take whose store takes nothing and that has nowhere to put what it saves.
STUCK = """
import os, sys, threading
from pathlib import Path
import snapshot
from snapshot.pump import Pump, Staging
store, init = Pump.store, Staging.__init__
Pump.store = lambda pump, sink, threads: store(pump, lambda _: threading.Event().wait(), threads)
def full(staging, *arguments):
    init(staging, *arguments)
    os.dup2(os.open("/dev/full", os.O_RDWR), staging.spill)
Staging.__init__ = full
snapshot.take(int(sys.argv[1]), name="image", store=Path(sys.argv[2]), memory=4 << 20, now=True,
              hooks={"resumed": lambda _: print("resumed", flush=True)})
"""


def test_not_told_of_children(spawn: Spawn, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CAP_SYS_PTRACE the kernel tells of none: shared memory is copied in the pause."""
    victim = spawn("shares", mib=MIB)
    api = Uffd.api

    def refused(uffd: Uffd, features: int) -> int:
        if features & FEATURES["EVENT_FORK"]:
            raise DeniedError("EVENT_FORK", "")
        return api(uffd, features)

    monkeypatch.setattr(Uffd, "api", refused)
    storing_waits(monkeypatch, lambda: written(victim))
    stats = exact(victim, store, at_t0=lambda: victim.signal(signal.SIGUSR1), now=True)
    assert stats.attempts == 1


# --- others --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["maps", "opens"])
def test_of_another_process_after_t0(
    spawn: Spawn, store: Path, others: Others, file: Path, how: str
) -> None:
    victim = spawn("shares", mib=MIB, file=file)
    stats = exact(victim, store, at_t0=lambda: others.write(how, file), now=True)
    assert stats.attempts == 2
    assert f"process {others.started[0].pid} " in stats.retry_reasons[0]


@pytest.mark.parametrize("how", ["maps", "opens"])
def test_of_another_process_between_the_copy_and_t0(
    spawn: Spawn,
    store: Path,
    others: Others,
    file: Path,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    victim = spawn("shares", mib=MIB, file=file)
    between(monkeypatch, lambda: others.write(how, file))
    assert exact(victim, store).attempts == 2


def test_of_another_process_with_a_descriptor_from_the_beginning(
    spawn: Spawn, store: Path, others: Others, file: Path
) -> None:
    """Nothing can be armed then; it is copied in the pause."""
    victim = spawn("shares", mib=MIB, file=file)
    others.write("opens", file)
    descriptor = f"/proc/{others.started[0].pid}/fd/3"

    def write_again() -> None:
        with open(descriptor, "r+b", buffering=0) as same:
            same.write(b"p" * (MIB << 20))

    assert exact(victim, store, at_t0=write_again, now=True).attempts == 1


@pytest.mark.parametrize(
    ("how", "reason"),
    [("open", "for writing"), ("grow", "mapped once more"), ("shrink", "grew")],
)
def test_by_itself_past_its_protection(
    spawn: Spawn, store: Path, monkeypatch: pytest.MonkeyPatch, file: Path, how: str, reason: str
) -> None:
    """With a descriptor, or through a mapping that has grown over what another one shows."""
    victim = spawn("shares", how=how, mib=MIB, **({"file": file} if how == "open" else {}))
    storing_waits(monkeypatch, lambda: written(victim))
    stats = exact(victim, store, at_t0=lambda: victim.signal(signal.SIGUSR1), now=True)
    assert stats.attempts == 2
    assert reason in stats.retry_reasons[0]


@pytest.mark.parametrize("how", ["grow", "shrink"])
def test_grown_between_the_copy_and_t0(
    spawn: Spawn, store: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    victim = spawn("shares", how=how, mib=MIB)
    between(monkeypatch, lambda: write(victim))
    assert exact(victim, store).attempts == 1
