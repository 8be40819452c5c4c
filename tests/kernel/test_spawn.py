"""A new process with a chosen pid, in this pid namespace and in one of its own."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshot.errors import RestoreError
from snapshot.kernel import spawn, stub_x86_64
from snapshot.kernel.spawn import Spawned
from tests.harness.processes import wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sudo pytest tests/kernel")


@pytest.fixture
def free_pid() -> int:
    """A pid that nobody has: that of a process that has just been reaped."""
    child = subprocess.Popen(["true"])
    child.wait()
    assert spawn.holder(child.pid) is None
    return child.pid


@pytest.fixture
def made() -> Iterator[list[Spawned]]:
    spawned: list[Spawned] = []
    yield spawned
    for each in spawned:
        each.kill()


def comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def descriptors(pid: int) -> set[int]:
    return set(map(int, os.listdir(f"/proc/{pid}/fd")))


def status(pid: int, field: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith(field + ":"))


def test_pid_signals_and_descriptors(free_pid: int, made: list[Spawned]) -> None:
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN  # Python's doing, not inherited
    read_end, write_end = os.pipe()
    other = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(other, True)
    try:
        process = spawn.spawn(free_pid, keep=[read_end, write_end])
        made.append(process)
        assert process.pid == process.waited == free_pid
        assert status(free_pid, "SigIgn") == "0" * 16
        assert (
            int(status(free_pid, "SigBlk"), 16)
            == ~(1 << signal.SIGTRAP - 1)
            & ~(1 << signal.SIGKILL - 1 | 1 << signal.SIGSTOP - 1)
            & (1 << 64) - 1
        )
        # execve lets the maker go on a moment before it closes what is close-on-exec
        kept = {0, 1, 2, read_end, write_end}
        wait_until(lambda: descriptors(free_pid) == kept, f"only {kept} open in the process")
        assert os.get_inheritable(other)  # nothing changed here
        assert not os.get_inheritable(read_end)
    finally:
        for fd in (read_end, write_end, other):
            os.close(fd)


def test_it_is_small(made: list[Spawned]) -> None:
    process = spawn.spawn(0)
    made.append(process)
    maps = Path(f"/proc/{process.pid}/maps")
    # execve lets the maker go on a moment before it maps the program
    begin = f"{stub_x86_64.BASE:08x}-"
    wait_until(lambda: maps.read_text().startswith(begin), "the stub at its address")
    lines = maps.read_text().splitlines()
    names = [line.split()[5] if len(line.split()) > 5 else "" for line in lines]
    assert len(lines) <= 6, names
    assert "[heap]" not in names


def test_kill_leaves_nothing(free_pid: int) -> None:
    process = spawn.spawn(free_pid)
    process.kill()
    process.kill()
    assert spawn.holder(free_pid) is None


def test_a_pid_in_use_is_named(made: list[Spawned]) -> None:
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        try:
            wait_until(lambda: comm(sleeper.pid) == "sleep", "sleep running")
            with pytest.raises(RestoreError) as caught:
                spawn.spawn(sleeper.pid)
        finally:
            sleeper.kill()
    assert caught.value.message == f"pid {sleeper.pid} is in use by process {sleeper.pid} (sleep)"
    assert caught.value.hint.endswith("--pid new")


def test_a_zombie_is_named() -> None:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    try:
        with pytest.raises(RestoreError, match=rf"zombie {child.pid} \(true\)"):
            spawn.spawn(child.pid)
    finally:
        child.wait()


def test_a_pid_that_is_still_a_process_group_is_named() -> None:
    leader = subprocess.Popen(
        ["sh", "-c", "sleep 60 & echo $!"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert leader.stdout is not None
    sleeper = int(leader.stdout.readline())
    try:
        leader.wait()
        wait_until(lambda: comm(sleeper) == "sleep", "sleep running")
        with pytest.raises(RestoreError, match=rf"group of process {sleeper} \(sleep\)"):
            spawn.spawn(leader.pid)
    finally:
        os.kill(sleeper, signal.SIGKILL)
        leader.stdout.close()


def test_an_impossible_pid() -> None:
    with pytest.raises(RestoreError, match="pid_max"):
        spawn.spawn(2**31 - 1)


def test_own_pid_namespace(made: list[Spawned]) -> None:
    process = spawn.spawn(os.getpid(), namespace=True)  # a pid that is in use out here
    made.append(process)
    assert status(process.pid, "NSpid").split()[-1] == str(os.getpid())
    assert status(process.waited, "NSpid").split()[-1] == "1"
    assert status(process.pid, "PPid") == str(process.waited)
    wait_until(lambda: not descriptors(process.waited), "pid 1 having no descriptor")
    mounts = Path(f"/proc/{process.pid}/mountinfo").read_text()
    assert mounts.count(" /proc ") == Path("/proc/self/mountinfo").read_text().count(" /proc ") + 1
    assert "shared:" not in mounts


def test_namespace_ends_with_the_process(made: list[Spawned]) -> None:
    process = spawn.spawn(4242, namespace=True)
    made.append(process)
    os.kill(process.pid, signal.SIGKILL)
    _, ended = os.waitpid(process.waited, 0)
    assert os.waitstatus_to_exitcode(ended) == 128 + signal.SIGKILL


def test_killing_pid_1_ends_the_namespace() -> None:
    process = spawn.spawn(4242, namespace=True)
    watch = os.pidfd_open(process.pid)
    process.kill()
    with pytest.raises(ProcessLookupError):
        signal.pidfd_send_signal(watch, 0)
    os.close(watch)
