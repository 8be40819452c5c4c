"""Running before everybody else for a moment."""

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
    if os.sched_getscheduler(0) != os.SCHED_OTHER or not _hurry():
        yield
        return
    try:
        yield
    finally:
        _calm_down()


def _hurry() -> bool:
    try:
        os.sched_setscheduler(0, _URGENT, os.sched_param(_LEAST))
    except OSError:
        return False
    return True


def _calm_down() -> None:
    try:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    except PermissionError:  # the flag cannot be taken back without CAP_SYS_NICE
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
