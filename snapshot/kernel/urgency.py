"""Running before everybody else, or after everybody else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_URGENT = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
_LEAST = 1


@contextmanager
def urgent() -> Iterator[None]:
    """The calling thread runs whenever it can (SCHED_FIFO), if it is an ordinary one and allowed to
    (CAP_SYS_NICE, RLIMIT_RTPRIO). For while others stand still because of it: on a busy machine an
    ordinary thread waits for its turn, again and again (bench/stops.py). Never for waiting in a
    loop without sleep: the thread that is waited for may be on this very processor.

    What it starts meanwhile is ordinary again: SCHED_RESET_ON_FORK.
    """
    if os.sched_getscheduler(0) != os.SCHED_OTHER or not hurry():
        yield
        return
    try:
        yield
    finally:
        calm_down()


def hurry() -> bool:
    """From here on as in `urgent`, until `calm_down`. False: not allowed."""
    try:
        os.sched_setscheduler(0, _URGENT, os.sched_param(_LEAST))
    except OSError:
        return False
    return True


def calm_down() -> None:
    """An ordinary thread again."""
    try:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    except PermissionError:  # the flag cannot be taken back without CAP_SYS_NICE
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))


def last() -> None:
    """The calling thread runs where nobody else wants to (SCHED_IDLE): whoever wakes up takes its
    CPU at once, which he does not take from an ordinary thread, however nice."""
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def ordinary(pid: int) -> None:
    """Ends `last` for a process of one thread; needs CAP_SYS_NICE."""
    with suppress(OSError):
        os.sched_setscheduler(pid, os.SCHED_OTHER, os.sched_param(0))
