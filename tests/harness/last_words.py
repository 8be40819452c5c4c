"""What a test has printed, if the tests are killed.

A take that stands still is ended by its watchdog, and with it the tests, if one of them made it,
and what pytest had captured: a test that fails so once in fifty runs would not say why.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MOST = 16384
"""Bytes from the end of it."""


@contextmanager
def kept(config: pytest.Config) -> Iterator[None]:
    """When this process is killed in the block another one prints what pytest has captured, to
    where pytest itself prints."""
    captured = Path("/proc/self/fd/2").resolve()
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        if Path("/proc/self/fd/2").resolve() == captured:
            yield  # nothing is captured
            return
        terminal = os.dup(2)
    text = os.open("/proc/self/fd/2", os.O_RDONLY | os.O_CLOEXEC)
    ends, told = os.pipe()
    child = os.fork()
    if child == 0:
        _outlive(ends, told, text, terminal)
    for fd in (ends, text, terminal):
        os.close(fd)
    os.waitpid(child, 0)
    yield
    os.write(told, b".")
    os.close(told)


def _outlive(ends: int, told: int, text: int, terminal: int) -> None:
    """In the child. It leaves a process that is nobody's: tests look for what is left of theirs."""
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.close(told)
        if os.read(ends, 1) == b"":
            size = os.fstat(text).st_size
            os.write(terminal, b"\nthe tests were killed; this was captured:\n")
            os.write(terminal, os.pread(text, MOST, max(0, size - MOST)))
    os._exit(0)
