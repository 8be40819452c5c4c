"""The keeper of a page server: holds its descriptors when guardian and server are killed at once.

A third process in the shared descriptor table (pageserver.py). It does nothing while one of the
other two lives: they replace each other, and it. When both are gone it becomes a guardian, and
nothing is lost: the userfaultfds, those of forked children too, and the journal are still open.
"""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress
from typing import Any, NoReturn

from . import pageserver
from .journal import RUNNING
from .kernel.spawn import twin
from .pageserver import Plan


def start(journal: Any, guardian: int) -> int:
    """A new keeper in the place of the one before, on record when this returns. -> its pid."""
    journal.keepers = number = journal.keepers + 1
    if journal.keeper >= 0:  # there are never two that would take over
        _end(journal.keeper)
        journal.keeper = -1  # not closed: a number on record may be of an earlier table
    watched = os.pidfd_open(guardian)
    begun, tell = os.pipe()
    pid = twin()
    if pid == 0:
        keep(journal, watched, tell, number)
    ended = os.pidfd_open(pid)
    with suppress(InterruptedError):
        select.select([begun, ended], [], [])
    for fd in (begun, tell, ended):
        os.close(fd)
    return pid


def keep(journal: Any, guardian: int, tell: int, number: int) -> NoReturn:
    pageserver.name(b"snap-keeper")
    own = os.pidfd_open(os.getpid())
    if journal.keepers == number:
        journal.keeper = own
    if journal.keepers != number:  # a server made us that was killed; the guardian made another
        os._exit(0)
    with suppress(OSError):  # who made us may be gone
        os.write(tell, b"!")
    _await(guardian)
    _await(journal.server)
    if journal.keepers != number:
        os._exit(0)
    # They may have made others in their last moments: none of those begins from here on (each says
    # that it is there and then looks at `turn`), and what has begun is ended.
    journal.turn += 1
    _end(journal.guardian)
    _end(journal.server)
    plan = Plan(journal.plan)
    if journal.state != RUNNING or not pageserver.needed(journal, plan):
        os._exit(0)
    pageserver.say(plan, "guardian and page server ended before all pages were in; starting others")
    journal.keeper = -1
    pageserver.resume(journal, plan)


def _end(pidfd: int) -> None:
    if pidfd >= 0 and pageserver.alive(pidfd):
        with suppress(OSError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            _await(pidfd)


def _await(pidfd: int) -> None:
    """Until the process has ended; at once when there is none."""
    while pidfd >= 0:
        with suppress(InterruptedError):
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll()
            return
