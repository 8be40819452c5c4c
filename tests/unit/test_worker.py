"""The end of a thread, waited for in spite of Ctrl-C."""

from __future__ import annotations

import signal
import threading

import pytest

from snapshot.worker import Worker


def test_a_join_that_is_interrupted_waits_for_the_end() -> None:
    done = threading.Event()
    worker = Worker("work", done.wait)

    def handler(*_: object) -> None:
        threading.Timer(0.05, done.set).start()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            worker.join()
        assert worker.wait(0)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_wait_that_is_interrupted_leaves_it_running() -> None:
    done = threading.Event()
    worker = Worker("work", done.wait)

    def handler(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            worker.wait(20)
        assert not worker.wait(0.01)  # Thread.join of Python 3.11 would say that it has ended
        done.set()
        assert worker.wait(20)
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_end_is_told_of_work_that_fails_too() -> None:
    def fails() -> None:
        raise ValueError

    worker = Worker("work", fails)
    worker.join()
    assert worker.wait(0)
    for thread in threading.enumerate():  # pytest is told of the error after that, in this test
        if thread.name == "work":
            thread.join()
