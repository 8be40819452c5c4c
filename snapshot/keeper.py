"""Who goes on when processes of a page server end: the line of succession.

The guardian has the *lead*: its pid stands in the journal. A keeper waits for the end of who has
it, and then takes it, in one atomic step; of several that try one succeeds, and the others wait for
that one. So there may be more than one keeper, and a new one is there before an old one ends.

A guardian that replaces a server has a descriptor table of its own from then on (exec). Keepers of
the former table hold nothing of what the new server reads: they are of an older *generation* and
act only as long as the new table has no keeper.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, NoReturn

from . import pageserver
from .errors import KernelError
from .kernel import pidfd as pidfds
from .kernel.spawn import twin

SUPERFLUOUS_SECONDS = 1.0
AGAIN_SECONDS = 0.1


def start(journal: Any, generation: int, patience: float = 0.0) -> None:
    """A new keeper beside those that there are, on record when this returns; see `start_twin`."""
    start_twin(lambda on_record: keep(journal, generation, on_record), patience)


def start_twin(run: Callable[[Callable[[], None]], NoReturn], patience: float) -> None:
    """A process that shares the descriptor table. Returns when it has called the function that
    `run` is given, to say that it is on record, or has ended. KernelError when none can be made,
    for `patience` seconds."""
    begun, tell = os.pipe()
    with ExitStack() as stack:
        stack.callback(os.close, begun)
        stack.callback(os.close, tell)
        pid = _twin(patience)
        if pid == 0:
            run(lambda: _say(tell))
        ended = os.pidfd_open(pid)
        stack.callback(os.close, ended)
        pageserver.await_any(begun, ended)


def _twin(patience: float) -> int:
    until = time.monotonic() + patience
    while True:
        try:
            return twin()
        except KernelError:  # EAGAIN, ENOMEM: others may end
            if time.monotonic() >= until:
                raise
        time.sleep(AGAIN_SECONDS)


def _say(tell: int) -> None:
    os.write(tell, b"!")


def keep(journal: Any, generation: int, on_record: Callable[[], None]) -> NoReturn:
    pageserver.name(b"snap-keeper")
    journal.keeper = os.pidfd_open(os.getpid())
    journal.newest = os.getpid()
    on_record()
    while True:
        lead = journal.lead
        _await_end(journal, lead)
        if generation < journal.generation:
            os._exit(0)
        if journal.claim(lead, os.getpid()):
            break
    # Who had the lead is dead, so the generation does not change any more.
    if generation < journal.generation:
        os._exit(0)
    pageserver.succeed(journal, generation)


def successor(journal: Any, generation: int) -> int:
    """A pidfd of the caller's own of a process that acts when the server ends: of the guardian, of
    a keeper, or of a keeper made here when there is neither. KernelError: none can be made."""
    while True:
        guardian = pidfds.find(journal.lead)
        if pageserver.alive(guardian):
            return guardian
        if guardian >= 0:
            os.close(guardian)
        newest = journal.keeper
        if pageserver.alive(newest):
            return os.dup(newest)
        start(journal, generation)


def end(pidfd: int) -> None:
    """Ends a keeper of which there is another, and waits for that."""
    if pageserver.alive(pidfd):
        with suppress(OSError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            pageserver.await_any(pidfd)


def _await_end(journal: Any, pid: int) -> None:
    """Until the process with the lead has ended, or another has the lead. A keeper beside which
    there is a newer one is not needed as soon as the guardian has had the time to notice that."""
    pidfd = pidfds.find(pid)
    while journal.lead == pid and not pageserver.await_any(pidfd, seconds=SUPERFLUOUS_SECONDS):
        if journal.newest != os.getpid():
            os._exit(0)
    if pidfd >= 0:
        os.close(pidfd)
