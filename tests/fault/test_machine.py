"""A disk with errors, a clock that jumps, memory that is short: the target does not notice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import ROOT, Snap, Spawn
from tests.fault.test_stall import unharmed
from tests.harness.cgroups import cgroup
from tests.harness.victims import BIN, build

pytestmark = pytest.mark.live

SHIM = f"LD_PRELOAD={BIN / 'badmachine.so'}"


@pytest.mark.parametrize("calls", ["write", "sync", "write,sync"])
@pytest.mark.parametrize("stage", ["before-freeze", "frozen", "resumed"])
def test_a_disk_with_errors(
    spawn: Spawn, snap: Snap, tmp_path: Path, calls: str, stage: str
) -> None:
    """From that stage on nothing can be written any more: one error, no half image; when it can be
    again, the store is as good as before."""
    victim = spawn("writer", kind="anon", mib=32, threads=2)
    snap("take", victim.pid, "--name", "first")
    bad = tmp_path / "bad"
    shim = ("env", SHIM, f"BAD_DISK={bad}", f"BAD_CALLS={calls}")
    hook = f"{stage}=: > {bad}"
    ran = snap("take", victim.pid, "--name", "second", "--hook", hook, prefix=shim, ok=False)
    bad.unlink()
    assert ran.code == 6, ran.err
    assert "Input/output error" in ran.json["error"]
    assert "Traceback" not in ran.err
    assert snap.names() == ["first"]
    assert snap("verify", "first").json["ok"]
    unharmed(victim)
    snap("take", victim.pid, "--name", "second")
    assert snap("verify", "second").json["ok"]


def test_a_clock_that_jumps(spawn: Spawn, snap: Snap) -> None:
    """The wall clock goes an hour back and forth at every look: nothing waits by it."""
    victim = spawn("threads16")
    shim = ("env", SHIM, "BAD_CLOCK=1")
    for name in ("one", "two"):
        snap("take", victim.pid, "--name", name, "--stall", 5, prefix=shim)
        victim.goes_on()
    victim.kill()
    for mode in ("--eager", "--lazy"):
        victim.became(snap("restore", "two", mode, prefix=shim).json["pid"])
        victim.goes_on()
        victim.kill()


def test_a_stop_while_the_clock_jumps() -> None:
    """Where a thread that reaps must run in time: a program that replaces itself all the while."""
    build()
    name = "tests/live/test_freeze.py::test_a_program_that_replaces_itself"
    environment = {**os.environ, "LD_PRELOAD": str(BIN / "badmachine.so"), "BAD_CLOCK": "1"}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / name)]
    ran = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout
    assert "1 passed" in ran.stdout


@contextmanager
def little_memory(mib: int) -> Iterator[tuple[str, ...]]:
    """Words before a command that then has so much memory, page cache included."""
    with cgroup("memory", "memory.limit_in_bytes", mib << 20) as members:
        yield ("sh", "-c", f'echo $$ > {members}; exec "$@"', "sh")


def test_little_memory(spawn: Spawn, snap: Snap) -> None:
    """Less than the process that is taken has: staging is bounded, and the store's pages are the
    kernel's to drop."""
    victim = spawn("writer", kind="anon", mib=256, threads=2)
    with little_memory(224) as prefix:
        ran = snap("take", victim.pid, "--name", "image", "--memory", "16M", prefix=prefix)
    assert ran.json["saved_bytes"] > 256 << 20
    assert snap("verify", "image").json["ok"]
    unharmed(victim)


def test_too_little_memory(spawn: Spawn, snap: Snap) -> None:
    """The kernel kills it (OOM), somewhere."""
    victim = spawn("writer", kind="anon", mib=64, threads=2)
    with little_memory(48) as prefix:
        ran = snap("take", victim.pid, "--memory", "64M", "--now", prefix=prefix, ok=False)
    assert ran.code == -signal.SIGKILL
    assert snap.names() == []
    unharmed(victim)
    snap("take", victim.pid, "--name", "next")
    assert snap("verify", "next").json["ok"]
