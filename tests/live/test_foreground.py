"""`snap restore --wait` stands in for the process: signals, exit status, the terminal."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import Reap, Snap

pytestmark = pytest.mark.live

# Waits for a signal and ends with its number as the exit status; SIGQUIT is left to the kernel.
WAITER = r"""
import os, signal, sys
for name in ("INT", "TERM", "HUP", "USR1"):
    signal.signal(getattr(signal, "SIG" + name), lambda number, frame: os._exit(number))
if sys.argv[1] == "group":
    os.setpgid(0, 0)
open(sys.argv[2], "w").close()
while True:
    signal.pause()
"""


def until(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or not path.read_bytes():
        assert time.monotonic() < deadline, f"nothing in {path}"
        time.sleep(0.01)


@pytest.fixture(params=["same", "group"])
def image(request: pytest.FixtureRequest, snap: Snap, reap: Reap, tmp_path: Path) -> str:
    """Of a process that shares snap's process group, or has one of its own."""
    ready = tmp_path / "ready"
    with subprocess.Popen(
        [sys.executable, "-c", WAITER, request.param, str(ready)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        reap.add(process.pid)
        deadline = time.monotonic() + 60
        while not ready.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        snap("take", process.pid, "--name", "waiter")
        process.kill()
    return "waiter"


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGHUP, signal.SIGHUP),
        (signal.SIGUSR1, signal.SIGUSR1),
        (signal.SIGQUIT, 128 + signal.SIGQUIT),
        (signal.SIGUSR2, 128 + signal.SIGUSR2),
    ],
)
def test_signals_are_passed_on_and_the_status_comes_back(
    snap: Snap, image: str, reap: Reap, tmp_path: Path, number: int, status: int
) -> None:
    out = tmp_path / "pid"
    with out.open("wb") as stdout:
        process = subprocess.Popen(
            [*snap.command, "restore", image, "--wait", "--store", str(snap.store)],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
            preexec_fn=_no_core,
        )
        until(out)
        restored = int(out.read_text())
        reap.add(restored)
        _until_handled(process.pid, number)
        process.send_signal(number)
        assert process.wait(60) == status


def test_a_terminal_is_handed_over(snap: Snap, image: str, reap: Reap, tmp_path: Path) -> None:
    """Ctrl-C typed at the terminal reaches the restored process once and nobody else."""
    out = tmp_path / "pid"
    pid, terminal = pty.fork()
    if not pid:
        with out.open("wb") as stdout:
            os.dup2(stdout.fileno(), 1)
        os.execv(
            snap.command[0],
            [*snap.command, "restore", image, "--wait", "--store", str(snap.store)],
        )
    try:
        until(out)
        restored = int(out.read_text())
        reap.add(restored)
        _until_handled(pid, signal.SIGINT)
        deadline = time.monotonic() + 60
        while os.tcgetpgrp(terminal) != os.getpgid(restored):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.write(terminal, b"\x03")
        _, status = os.waitpid(pid, 0)
    finally:
        os.close(terminal)
        reap.add(pid)
    assert os.waitstatus_to_exitcode(status) == signal.SIGINT


def _until_handled(pid: int, number: int) -> None:
    """Until `snap` has a handler for the signal: from then on it passes it on."""
    deadline = time.monotonic() + 60
    while True:
        status = Path(f"/proc/{pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
        both = (number, signal.SIGUSR2)  # the last one to be set
        if all(int(caught.split()[1], 16) & 1 << one - 1 for one in both):
            return
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _no_core() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
