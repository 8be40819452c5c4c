"""`snap restore --wait`: standing in for a restored process, as if it had been started by hand.

Signals that reach `snap` are passed on, the terminal is handed over where the process has a group
of its own, and its exit status becomes ours.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .restore import Restored

PASSED_ON = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
FROM_THE_TERMINAL = (signal.SIGINT, signal.SIGQUIT)


def wait(restored: Restored, terminal: int = 0) -> int:
    """Until the process ends: its exit status, 128+n when signal n ended it."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        # Ctrl-C reaches a whole process group: one of ours has had it already.
        shared = _group(restored.pid) == os.getpgrp() and os.isatty(terminal)
        if not (number in FROM_THE_TERMINAL and shared):
            with suppress(ProcessLookupError):
                os.kill(restored.pid, number)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        with _terminal_of(restored.pid, terminal):
            status = restored.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 - status if status < 0 else status


def _group(pid: int) -> int:
    """Its process group; 0 when it has ended."""
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


@contextmanager
def _terminal_of(pid: int, terminal: int) -> Iterator[None]:
    """The process reads the terminal while the block runs, when it has a group in our session."""
    ours, group = os.getpgrp(), _group(pid)
    try:
        hand_over = group not in (0, ours) and os.tcgetpgrp(terminal) == ours
        if hand_over:
            os.tcsetpgrp(terminal, group)
    except OSError:  # no terminal, or the process has a session of its own
        hand_over = False
    try:
        yield
    finally:
        if hand_over:
            # Taking it back from the background would stop us.
            ignored = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
            with suppress(OSError):
                os.tcsetpgrp(terminal, ours)
            signal.signal(signal.SIGTTOU, ignored)
