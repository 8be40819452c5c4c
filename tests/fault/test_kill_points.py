"""`snap` is killed (SIGKILL) at every named point of a take, and at random instants: the target
goes on as if nothing had been, the store shows no half image, and the next take works."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import get_args

import pytest

from snapshot import faults
from snapshot.store import Store
from tests.conftest import ROOT, Snap, Spawn
from tests.harness import leftovers, processes
from tests.harness.processes import wait_until
from tests.harness.victims import Victim
from tests.live.test_harmless import observed, settled

pytestmark = [pytest.mark.live, pytest.mark.timeout(3600)]

POINTS: tuple[faults.Point, ...] = get_args(faults.Point)
SCRATCH_LEFT = ("created", "captured", "paired", "passed")
"""Points between two injected calls: docs/failure-modes.md names what is left."""
DEVICE = ("paired", "passed")
"""Points of the way through /dev/userfaultfd, which a target without CAP_SYS_PTRACE needs: two
sockets and the device may be left in it."""
IMAGE_EXISTS = ("committed", "synced")
SEED = int(os.environ.get("SNAP_SEED", "3"))
KILLS = int(os.environ.get("SNAP_KILLS", "500" if "SNAP_STRESS" in os.environ else "15"))


def nothing_watches() -> bool:
    found = processes.descendants(os.getpid())
    watching = [pid for pid in found if "snap-watchdog" in processes.command_line(pid)]
    return all(processes.ended(pid) for pid in watching)


def harm_done(
    pid: int, before: dict[str, str], *, scratch_allowed: bool, device_allowed: bool = False
) -> str:
    """What is different for longer than a moment, and should not be."""
    seen = [""]

    def none() -> bool:
        after = observed(pid)
        if device_allowed:
            after = leftovers.without_device(before, after)
        seen[0] = leftovers.harm(before, after, scratch_allowed=scratch_allowed)
        return not seen[0]

    with suppress(TimeoutError):
        wait_until(none, "the target being as before", 5.0)
    return seen[0]


def test_documented() -> None:
    """docs/failure-modes.md has one line for each point."""
    text = (ROOT / "docs" / "failure-modes.md").read_text()
    table = text.split("## `snap` is killed during a take")[1].split("\n## ")[0]
    assert tuple(re.findall(r"^\| `([\w-]+)` \|", table, re.M)) == POINTS


@pytest.mark.parametrize("point", POINTS)
def test_at_a_point(spawn: Spawn, snap: Snap, point: faults.Point) -> None:
    victim = spawn.powerless("threads16") if point in DEVICE else spawn("threads16")
    victim.goes_on()
    before = settled(lambda: observed(victim.pid))
    fault = ("env", f"SNAP_FAULT={point}")
    ran = snap("take", victim.pid, "--name", "image", prefix=fault, ok=False)
    assert ran.code == -signal.SIGKILL, f"{point} was not reached: {ran.err}"
    victim.goes_on()
    allowed, device = point in SCRATCH_LEFT, point in DEVICE
    assert not harm_done(victim.pid, before, scratch_allowed=allowed, device_allowed=device)
    wait_until(nothing_watches, "the end of the watchdog")
    if point in IMAGE_EXISTS:
        assert snap.names() == ["image"]
        assert snap("verify", "image").json["ok"]
    else:
        assert snap.names() == []
    before = settled(lambda: observed(victim.pid))
    snap("take", victim.pid, "--name", "next")
    assert harm_done(victim.pid, before, scratch_allowed=False) == ""
    assert snap("verify", "next").json["ok"]
    victim.goes_on()


# Imports once, then makes each take in a child of its own: the instants fall on the take.
ZYGOTE = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import snapshot, snapshot.take, snapshot.store
for line in sys.stdin:
    pid, store, name = line.split()
    child = os.fork()
    if child == 0:
        snapshot.take(int(pid), store=store, name=name).close()
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Taker:
    """Makes takes that can be killed at any instant."""

    def __init__(self, target: int, store: Path) -> None:
        self.target = target
        self.store = store
        self.process = subprocess.Popen(
            [sys.executable, "-c", ZYGOTE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, name: str, seconds: float | None = None) -> int:
        """The exit status of a take that is killed after `seconds`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{self.target} {self.store} {name}\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        if seconds is not None:
            time.sleep(seconds)  # the instant itself
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        return int(self.process.stdout.readline())

    def __enter__(self) -> Taker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()


def killed_at_random(pid: int, store: Path, kills: int, checked: Callable[[], object]) -> None:
    """`kills` takes, each killed at an instant of the seed's choice; `checked` after each."""
    chance = random.Random(SEED)
    print(f"SNAP_SEED={SEED} SNAP_KILLS={kills}")
    with Taker(pid, store) as taker:
        began = time.monotonic()
        assert taker("whole-0") == 0
        assert taker("whole-1") == 0
        length = (time.monotonic() - began) / 2
        died = scratches = 0
        for number in range(kills):
            before = settled(lambda: observed(pid))
            died += taker(f"image-{number}", chance.uniform(0, length * 1.1)) == -signal.SIGKILL
            checked()
            assert harm_done(pid, before, scratch_allowed=True) == "", f"kill {number}"
            scratches += leftovers.scratch(before["maps"], observed(pid)["maps"]) != 0
            if number % 50 == 49:
                whole(store)
                assert taker(f"whole-{number}") == 0
        assert taker("last") == 0
    wait_until(nothing_watches, "the end of the watchdogs")
    whole(store)
    print(f"{died} of {kills} died in a take of {length:.2f} s; {scratches} left a scratch")
    assert died > kills / 2


def whole(store: Path) -> None:
    """Every image that is there is good; then all but one are removed, to keep the disk small."""
    with Store.open(store) as opened:
        names = [info.image for info in opened.images()]
        for name in names:
            with opened.image(name) as image:
                assert not list(image.verify()), name
        for name in names[:-1]:
            opened.remove(name)
        opened.collect()


VICTIMS: dict[str, dict[str, object]] = {
    "writer": {"kind": "mixed", "mib": 16, "threads": 3, "sparse": 1},
    "threads16": {},
}


def each(victim: Victim) -> Callable[[], object]:
    return victim.goes_on


@pytest.mark.parametrize("name", VICTIMS)
def test_at_random(spawn: Spawn, store: Path, name: str) -> None:
    victim = spawn(name, life=7200, **VICTIMS[name])
    victim.goes_on()
    killed_at_random(victim.pid, store, KILLS // len(VICTIMS), each(victim))
    victim.verify()
