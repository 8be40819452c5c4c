"""Threads that run after all others, and when they do not."""

from __future__ import annotations

import os
import threading

import pytest

from snapshot.kernel import background
from snapshot.kernel.background import Background
from snapshot.worker import Worker


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


@pytest.mark.usefixtures("returns")
def test_who_is_starved_is_an_ordinary_thread_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Background()
    times = iter([(0, 0), (1_000_000, 90_000_000), (50_000_000, 130_000_000)])
    monkeypatch.setattr(background, "_times", lambda thread: next(times))
    with Inside(group) as thread:
        group.balance()
        assert policy_of(thread) == os.SCHED_BATCH
        group.balance()
        assert policy_of(thread) == os.SCHED_IDLE


def test_where_there_is_no_way_back_they_stay_ordinary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_returns", lambda: False)
    group = Background()
    with Inside(group) as thread:
        assert policy_of(thread) == os.SCHED_BATCH
        group.hurry()
        assert policy_of(thread) == os.SCHED_BATCH
