"""The tracer dies (SIGKILL) at every point of an injection: the thread goes home by itself."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from snapshot.freeze import freeze
from snapshot.kernel import refusal
from snapshot.kernel.arch_x86_64 import NR, Registers
from snapshot.kernel.remote import NOTHING, SCRATCH_SIZE, Call
from snapshot.kernel.room import find_syscall
from snapshot.maps import gap, parse_maps

from ..live.freezing import Victim, proc_state, wait_until
from ..live.test_freeze import BLOCKED, REGISTERS, TIMED_OUT, WOKEN
from .test_remote import DIFFICULT

ROOT = str(Path(__file__).parents[2])
POINTS = 64
"""More than one open, two batches and one close pass."""
RANDOM_KILLS = 1000 if os.environ.get("SNAP_STRESS") else 40

DYING = f"""
import os, sys
sys.path.insert(0, {ROOT!r})
from snapshot.freeze import freeze
from snapshot.kernel.arch_x86_64 import NR
from snapshot.kernel.remote import Call, Remote
pid, Remote.die_at = int(sys.argv[1]), int(sys.argv[2])
with freeze(pid) as frozen:
    frozen.remote.batch([Call(NR.getpid)] * 3)
    if len(sys.argv) > 3:
        os.kill(pid, int(sys.argv[3]))
        frozen.remote.batch([Call(NR.getpid)] * 3)
    frozen.remote.on(frozen.threads[-1]).batch([Call(NR.getpid)] * 3)
"""

MAKING = f"""
import sys
sys.path.insert(0, {ROOT!r})
from snapshot.freeze import freeze
from snapshot.kernel.arch_x86_64 import NR
from snapshot.kernel.remote import Call, Remote
pid, Remote.die_at = int(sys.argv[1]), int(sys.argv[2])
with freeze(pid) as frozen, frozen.remote.making(Call(NR.eventfd2, (0, 0))) as made:
    assert made > 2
"""

AMONG_OTHERS = f"""
import os, sys
sys.path.insert(0, {ROOT!r})
from snapshot.freeze import freeze
from snapshot.kernel.arch_x86_64 import NR
from snapshot.kernel.remote import SCRATCH_SIZE, Call, Packed, Remote, pack
from snapshot.maps import gap, parse_maps
pid, Remote.die_at = int(sys.argv[1]), int(sys.argv[2])
asked = [Call(NR.getpid), Call(NR.gettid)]
places = [(line.start, line.end) for line in parse_maps(open(f"/proc/{{pid}}/maps", "rb").read())]
with freeze(pid, scratch=gap(places, SCRATCH_SIZE)) as frozen:
    files = set(os.listdir(f"/proc/{{pid}}/fd"))
    found = frozen.make(Call(NR.eventfd2, (0, 0)), Packed(asked, pack(asked), 0), b"")
    assert found is not None
    (made, *results), _ = found.of(0)
    assert made > 2 and results == [pid, pid], (made, results)
    assert set(os.listdir(f"/proc/{{pid}}/fd")) == files
    assert "eventfd" in os.readlink(f"/proc/self/fd/{{found.fetched}}")
"""

# Those of glibc's own, 32 and 33, can only be blocked by the call itself.
SLEEPING = f"""
import ctypes, sys, time
mask = ctypes.c_uint64(int(sys.argv[1]))
assert ctypes.CDLL(None).syscall({int(NR.rt_sigprocmask)}, 2, ctypes.byref(mask), None, 8) == 0
print("on", flush=True)
time.sleep(1000)
"""

# A child of this process makes takes in an endless loop until it is killed from outside.
LOOPING = f"""
import sys
sys.path.insert(0, {ROOT!r})
from snapshot.freeze import freeze
from snapshot.kernel.arch_x86_64 import NR
from snapshot.kernel.remote import Call
print("on", flush=True)
while True:
    with freeze(int(sys.argv[1])) as frozen:
        for thread in frozen.threads:
            frozen.remote.on(thread).batch([Call(NR.getpid)] * 20)
"""


def die(pid: int, point: int, *send: int, script: str = DYING) -> bool:
    """Whether the tracer passed so many points, and died at that one. `send`: a signal that it
    sends between two batches."""
    command = [sys.executable, "-c", script, str(pid), str(point), *map(str, send)]
    ended = subprocess.run(command, check=False)
    assert ended.returncode in (0, -signal.SIGKILL)
    return ended.returncode != 0


def settles(pid: int, before: dict[str, object], when: int) -> None:
    """The thread needs a moment to get home."""
    deadline = time.monotonic() + 5
    while proc_state(pid) != before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert proc_state(pid) == before, when


@pytest.mark.parametrize("how", ["plain", "busy", "ignored", "blocked", "pending"])
def test_death_at_every_point(how: str) -> None:
    with Victim(DIFFICULT, how) as victim:
        before = None
        for point in range(1, POINTS):
            wait_until(lambda: how == "busy" or victim.system_call() == NR.read, "it reads")
            before = before or proc_state(victim.pid)
            died = die(victim.pid, point)
            wait_until(lambda: how == "busy" or victim.system_call() == NR.read, "it reads again")
            assert victim.alive, point
            settles(victim.pid, before, point)
            if not died:
                break
        assert not died, "POINTS is too small"
        assert point > 20
        assert (victim.get("bad"), victim.get("result")) == (0, 0)


@pytest.mark.parametrize(("script", "least"), [(MAKING, 16), (AMONG_OTHERS, 21)])
def test_a_descriptor_being_made_is_closed(script: str, least: int) -> None:
    """At whatever point the tracer dies, before it is made, when it is, or later: by the thread
    itself, and nothing else is."""
    with Victim(REGISTERS) as victim:
        before = proc_state(victim.pid)
        for point in range(1, POINTS):
            died = die(victim.pid, point, script=script)
            settles(victim.pid, before, point)
            count = victim.get("count")
            wait_until(lambda: victim.get("count") > count + 8, f"it runs on after {point}")  # noqa: B023
            assert victim.get("bad") == 0, point
            if not died:
                break
        assert not died, "POINTS is too small"
        assert point >= least


def test_registers_after_death_at_every_point() -> None:
    with Victim(REGISTERS) as victim:
        for point in range(1, POINTS):
            died = die(victim.pid, point)
            count = victim.get("count")
            wait_until(lambda: victim.get("count") > count + 8, f"it runs on after {point}")  # noqa: B023
            assert victim.get("bad") == 0, point
            if not died:
                break


@pytest.mark.parametrize("why", ["all signals blocked", "no room"])
def test_a_descriptor_that_cannot_be_made_among_others(why: str) -> None:
    """With no signal to tell by, or something where the scratch was to be: nothing is left."""
    blocked = str(2**64 - 1 if why == "all signals blocked" else 0)
    command = [sys.executable, "-c", SLEEPING, blocked]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as sleeping:
        try:
            assert sleeping.stdout is not None
            assert sleeping.stdout.readline() == b"on\n"
            before = proc_state(sleeping.pid)
            lines = parse_maps(Path(f"/proc/{sleeping.pid}/maps").read_bytes())
            places = [(line.start, line.end) for line in lines]
            scratch = places[0][0] if why == "no room" else gap(places, SCRATCH_SIZE)
            with freeze(sleeping.pid, scratch=scratch) as frozen:
                assert frozen.make(Call(NR.eventfd2, (0, 0)), NOTHING, b"") is None
                assert frozen.remote.call(NR.getpid) == sleeping.pid
            settles(sleeping.pid, before, 0)
        finally:
            sleeping.kill()


@pytest.mark.parametrize("mode", ["epoll_wait", "poll", "futex", "sigsuspend", "pause", "semop"])
def test_blocked_calls_sleep_on(mode: str) -> None:
    with Victim(BLOCKED, mode) as victim:
        for point in range(1, POINTS):
            wait_until(lambda: victim.system_call() >= 0, "the call sleeps")
            if not die(victim.pid, point):
                break
            assert victim.get("returned") == 0, (point, os.strerror(victim.get("error")))
        victim.wake()
        wait_until(lambda: victim.get("returned"), "the call came back")
        assert (victim.get("result"), victim.get("error")) == WOKEN[mode]


@pytest.mark.parametrize("mode", ["nanosleep", "poll_timed_out", "futex_timed_out"])
def test_timeouts_are_kept(mode: str) -> None:
    with Victim(BLOCKED, mode, "3000") as victim:
        for point in range(10, 20):
            die(victim.pid, point)
        wait_until(lambda: victim.get("returned"), "the call came back")
        assert (victim.get("result"), victim.get("error")) == TIMED_OUT[mode]
        assert 3_000_000 <= victim.get("elapsed_us") < 4_000_000


@pytest.mark.live
@pytest.mark.timeout(3600)
def test_death_at_random_instants() -> None:
    chance = random.Random(int(os.environ.get("SNAP_SEED", "1")))
    with Victim(REGISTERS) as victim:
        before = proc_state(victim.pid)
        for kill in range(RANDOM_KILLS):
            with subprocess.Popen(
                [sys.executable, "-c", LOOPING, str(victim.pid)], stdout=subprocess.PIPE
            ) as tracer:
                assert tracer.stdout is not None
                tracer.stdout.readline()
                time.sleep(chance.uniform(0.002, 0.02))
                tracer.kill()
            count = victim.get("count")
            wait_until(lambda: victim.get("count") > count + 4, f"it runs on after {kill}")  # noqa: B023
            assert victim.get("bad") == 0, kill
            settles(victim.pid, before, kill)


@pytest.mark.parametrize("mode", ["pause", "poll", "pipe_read", "semop"])
def test_a_signal_that_came_meanwhile_interrupts(mode: str) -> None:
    """Its handler runs and the call returns EINTR, or starts again (SA_RESTART: pipe_read), at
    whatever point of the batch after the signal the tracer dies. (open passes 12, a batch 10.)"""
    for point in range(23, 33):
        with Victim(BLOCKED, mode) as victim:
            wait_until(lambda: victim.system_call() >= 0, "the call sleeps")
            die(victim.pid, point, signal.SIGUSR1)
            if mode == "pipe_read":
                wait_until(lambda: victim.system_call() == NR.read, "it reads")
                assert victim.get("returned") == 0
            else:
                wait_until(lambda: victim.get("returned"), f"EINTR after {point}", 5)
                assert (victim.get("result"), victim.get("error")) == (-1, 4)


@pytest.mark.parametrize("mode", ["pause", "poll", "semop", "epoll_wait"])
def test_the_next_one_lets_who_is_on_the_way_go_home(mode: str) -> None:
    """In a process that is stopped (SIGSTOP) nobody gets home by himself when the tracer dies. The
    next one must not take those registers for the thread's own, nor write over what leads it."""
    with Victim(BLOCKED, mode) as victim:
        wait_until(lambda: victim.system_call() >= 0, "the call sleeps")
        maps = proc_state(victim.pid)["maps"]

        def stopped() -> bool:
            return refusal.status(victim.pid)["State"].startswith("T")

        os.kill(victim.pid, signal.SIGSTOP)
        wait_until(stopped, "it is stopped")
        on_the_way = 0
        for point in range(1, POINTS):
            died = die(victim.pid, point)
            on_the_way += proc_state(victim.pid)["maps"] != maps
            with freeze(victim.pid) as frozen:
                assert frozen.group_stopped
                place = Registers.unpack(frozen.registers(frozen.threads[0])).rip
                assert place < find_syscall(frozen.threads[0]), point
            assert proc_state(victim.pid)["maps"] == maps, point
            wait_until(stopped, "it is stopped again")
            if not died:
                break
        assert on_the_way > 5
        os.kill(victim.pid, signal.SIGCONT)
        wait_until(lambda: victim.system_call() >= 0, "the call sleeps again")
        assert victim.get("returned") == 0
        victim.wake()
        wait_until(lambda: victim.get("returned"), "the call came back")
        assert (victim.get("result"), victim.get("error")) == WOKEN[mode]
