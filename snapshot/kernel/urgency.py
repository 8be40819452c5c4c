"""Running before everybody else for a moment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

LEAST = 1


@contextmanager
def urgent() -> Iterator[None]:
    """The calling thread runs whenever it can (SCHED_FIFO), if it is an ordinary one and allowed to
    (CAP_SYS_NICE, RLIMIT_RTPRIO). For while others stand still because of it: on a busy machine an
    ordinary thread waits for its turn, again and again, which is seconds for a stop of 16 threads.

    What it starts meanwhile is ordinary again: SCHED_RESET_ON_FORK.
    """
    before = os.sched_getscheduler(0)
    if before & ~os.SCHED_RESET_ON_FORK != os.SCHED_OTHER:
        yield
        return
    try:
        policy = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
        os.sched_setscheduler(0, policy, os.sched_param(LEAST))
    except OSError:
        yield
        return
    try:
        yield
    finally:
        ordinary = os.sched_param(0)
        try:
            os.sched_setscheduler(0, before, ordinary)
        except PermissionError:  # the flag cannot be taken back without CAP_SYS_NICE
            with suppress(OSError):
                os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, ordinary)
