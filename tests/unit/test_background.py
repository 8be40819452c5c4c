"""Threads that run after all others, and when they do not."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event

import pytest

from snapshot.kernel import awake, background, procfs
from snapshot.kernel.background import Background
from snapshot.kernel.busy import Busy, times
from snapshot.worker import Worker
from tests.harness import processes
from tests.harness.processes import wait_until


def policy_of(thread: int) -> int:
    return os.sched_getscheduler(thread)


class Inside:
    """A thread in a background until the end of the block."""

    def __init__(self, group: Background) -> None:
        self._group = group
        self._entered = threading.Event()
        self._end = threading.Event()

    def _work(self) -> None:
        with self._group:
            self._entered.set()
            self._end.wait()
        self.afterwards = policy_of(0)

    def __enter__(self) -> int:
        self._worker = Worker("work", self._work)
        self._entered.wait()
        return self._worker.native_id

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._worker.join()


def nudgers() -> dict[int, frozenset[int]]:
    """Threads of ours that run before all others: where they may."""
    found = {}
    for thread in map(int, os.listdir("/proc/self/task")):
        with suppress(OSError):
            if policy_of(thread) == os.SCHED_FIFO:
                found[thread] = frozenset(os.sched_getaffinity(thread))
    return found


def wakes(thread: int) -> int:
    """How often it has slept."""
    return procfs.status(os.getpid(), thread).number("voluntary_ctxt_switches")


def test_a_processor_is_nudged_as_long_as_asked(returns: None) -> None:
    group = Background()
    with Inside(group):
        assert nudgers() == {}
        group.nudge(frozenset({min(os.sched_getaffinity(0)), 4096}))
        wait_until(lambda: len(nudgers()) == 1, "a thread for it")
        [(thread, where)] = nudgers().items()
        assert where == {min(os.sched_getaffinity(0))}
        before = wakes(thread)
        wait_until(lambda: wakes(thread) > before + 100, "its waking up")
        group.nudge(frozenset())

        def rests() -> bool:
            seen = wakes(thread)
            Event().wait(0.02)
            return wakes(thread) == seen

        wait_until(rests, "its rest")
        group.nudge(frozenset({min(os.sched_getaffinity(0))}))
        before = wakes(thread)
        wait_until(lambda: wakes(thread) > before + 100, "its waking up again")
    assert nudgers() == {}
    group.nudge(frozenset({min(os.sched_getaffinity(0))}))  # nobody is in it
    assert nudgers() == {}


@pytest.fixture
def returns(monkeypatch: pytest.MonkeyPatch) -> None:
    if not background._returns():
        pytest.skip("CAP_SYS_NICE, or RLIMIT_NICE of 20, is missing")


@pytest.mark.usefixtures("returns")
def test_they_run_after_all_others_but_not_while_somebody_waits() -> None:
    group = Background()
    inside = Inside(group)
    with inside as thread:
        assert policy_of(thread) == os.SCHED_IDLE
        group.hurry()
        assert policy_of(thread) == os.SCHED_OTHER
        group.calm()
        assert policy_of(thread) == os.SCHED_IDLE
    assert inside.afterwards == os.SCHED_OTHER
    group.hurry()  # it is not there any more


def compute(times: int) -> None:
    hash(bytes(range(256)) * times)  # with the interpreter lock


def compress(times: int) -> None:
    zlib.compress(bytes(range(256)) * times)  # without it


@pytest.mark.usefixtures("returns")
@pytest.mark.parametrize("work", [compute, compress])
def test_who_is_starved_is_an_ordinary_thread_for_a_while(work: Callable[[int], None]) -> None:
    """Also when it holds the interpreter lock, so that nothing of Python's could see to it."""
    group, processor = Background(), {max(os.sched_getaffinity(0))}
    entered, ended = threading.Event(), threading.Event()

    def run() -> None:
        with group:
            os.sched_setaffinity(0, processor)
            entered.set()
            while not ended.is_set():
                work(10_000)

    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        os.sched_setaffinity(other.pid, processor)
        worker = Worker("work", run)
        try:
            entered.wait()
            wait_until(lambda: policy_of(worker.native_id) == os.SCHED_OTHER, "it being helped")
            if work is compress:
                wait_until(lambda: policy_of(worker.native_id) == os.SCHED_IDLE, "it yielding")
        finally:
            ended.set()
            worker.join()
            other.kill()


def test_one_after_another(returns: None) -> None:
    """The last one that leaves ends who looks after them; the next one starts it again."""
    group = Background()
    for _ in range(100):
        with Inside(group) as first, Inside(group) as second:
            assert policy_of(first) == policy_of(second) == os.SCHED_IDLE


def test_where_there_is_no_way_back_they_stay_ordinary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_returns", lambda: False)
    group = Background()
    with Inside(group) as thread:
        assert policy_of(thread) == os.SCHED_BATCH
        group.hurry()
        assert policy_of(thread) == os.SCHED_BATCH


@pytest.fixture
def processors() -> set[int]:
    found = os.sched_getaffinity(0)
    if len(found) < 2:
        pytest.skip("one processor")
    return found


def test_they_keep_off_processors(processors: set[int]) -> None:
    group = Background()
    taken = min(processors)
    group.keep_off(frozenset([taken]))
    with Inside(group) as thread, group.beside():
        assert os.sched_getaffinity(thread) == os.sched_getaffinity(0) == processors - {taken}
        group.hurry()
        assert os.sched_getaffinity(thread) == processors  # it may hold what somebody waits for
        group.calm()
        assert os.sched_getaffinity(thread) == processors - {taken}
        group.keep_off(frozenset(processors))
        assert os.sched_getaffinity(thread) == os.sched_getaffinity(0) == processors
        group.keep_off(frozenset([taken]))
    assert os.sched_getaffinity(0) == processors


@pytest.mark.parametrize(
    ("code", "is_busy"), [("while True: pass", True), ("input()", False)], ids=["busy", "asleep"]
)
def test_where_a_busy_thread_is(processors: set[int], code: str, is_busy: bool) -> None:
    here = max(processors)
    command = [sys.executable, "-c", f"print(flush=True)\n{code}"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as program:
        try:
            os.sched_setaffinity(program.pid, {here})
            assert program.stdout is not None
            program.stdout.readline()  # its start is over, which is work too
            wait_until(lambda: is_busy or processes.state(program.pid) == "S", "its sleep")
            busy = Busy(program.pid)
            assert busy.processors() == frozenset()  # there is nothing to compare with
            ran, _ = times(program.pid, program.pid)
            if is_busy:
                wait_until(lambda: times(program.pid, program.pid)[0] > ran + 10**8, "its work")
            assert busy.processors() == ({here} if is_busy else set())
        finally:
            program.kill()


def test_a_process_that_has_ended_is_nowhere() -> None:
    with subprocess.Popen(["true"]) as program:
        busy = Busy(program.pid)
    assert busy.processors() == frozenset()


def test_processors_stay_awake_as_long_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> list[str]:
        open_files = Path("/proc/self/fdinfo").iterdir()
        paths = [os.path.realpath(f"/proc/self/fd/{one.name}") for one in open_files]
        return [path for path in paths if path == "/dev/cpu_dma_latency"]

    if not os.access("/dev/cpu_dma_latency", os.W_OK):
        pytest.skip("/dev/cpu_dma_latency may not be written")
    with awake.awake():
        assert len(asked()) == 1
    assert asked() == []
    monkeypatch.setattr(awake, "_PATH", "/dev/nothing")
    with awake.awake():
        assert asked() == []
