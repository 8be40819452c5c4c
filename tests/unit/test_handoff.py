"""Many threads give, one works; failures reach those who gave."""

from __future__ import annotations

import threading

import pytest

from snapshot.handoff import Handoff


def test_everything_in_order() -> None:
    done: list[int] = []
    handoff = Handoff[int](done.extend, most=3)
    for item in range(100):
        handoff.give(item, 1)
    handoff.drain()
    assert done == list(range(100))
    handoff.close()


def test_what_gathers_is_done_together_and_not_more_than_the_most() -> None:
    gate, entered = threading.Event(), threading.Semaphore(0)
    parts: list[list[int]] = []

    def work(part: list[int]) -> None:
        parts.append(part)
        entered.release()
        gate.wait()

    handoff = Handoff[int](work, most=3)
    handoff.give(0, 1)
    entered.acquire()
    for item in (1, 2, 3):
        handoff.give(item, 1)
    late = threading.Thread(target=handoff.give, args=(4, 1))
    late.start()
    late.join(0.05)
    assert late.is_alive(), "it waits until there is room"
    gate.set()
    late.join()
    handoff.drain()
    assert parts == [[0], [1, 2, 3], [4]]
    handoff.close()


def test_a_failure_reaches_all_who_give_or_wait() -> None:
    def work(part: list[int]) -> None:
        raise OSError("full")

    handoff = Handoff[int](work, most=1)
    handoff.give(1, 1)
    for _ in range(2):
        with pytest.raises(OSError, match="full"):
            handoff.drain()
        with pytest.raises(OSError, match="full"):
            handoff.give(2, 1)
    handoff.close()


def test_closing_drops_what_waits_and_ends_the_thread() -> None:
    before = threading.active_count()
    handoff = Handoff[int](lambda part: None, most=1)
    handoff.close()
    handoff = Handoff[int](lambda part: None, most=1)
    handoff.give(1, 1)
    handoff.close()
    assert threading.active_count() == before
