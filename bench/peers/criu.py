"""CRIU, when the one on PATH works on this kernel."""

from __future__ import annotations

import shutil
import subprocess
import time
from functools import cache
from pathlib import Path

from bench.figures import Row

COMMAND = shutil.which("criu")
USUAL = ("--shell-job", "--file-locks", "--tcp-established", "--ext-unix-sk")


@cache
def why_not() -> str | None:
    """What `criu check` says, when it is not content."""
    if COMMAND is None:
        return "no criu on PATH"
    ran = subprocess.run([COMMAND, "check"], capture_output=True, text=True, check=False)
    if ran.returncode == 0:
        return None
    version = subprocess.run([COMMAND, "--version"], capture_output=True, text=True, check=False)
    words = version.stdout.split()
    lines = [line for line in (ran.stderr or ran.stdout).splitlines() if "Error" in line]
    reason = (lines or ["criu check fails"])[0].split(": ", 1)[-1]
    return f"criu {words[1] if len(words) > 1 else ''} does not work on this kernel: {reason}"


def _run(*words: str) -> Row:
    assert COMMAND is not None
    began = time.monotonic_ns()
    ran = subprocess.run([COMMAND, *words], capture_output=True, text=True, check=False)
    ended = time.monotonic_ns()
    row: Row = {"exit_code": ran.returncode, "seconds": (ended - began) / 1e9}
    row |= {"began": began, "ended": ended}
    if ran.returncode:
        row["error"] = ran.stderr[-500:]
    return row


def dump(pid: int, directory: Path, leave_running: bool = True) -> Row:
    """`criu dump`, which stops the target until all of it is written."""
    images = directory / "criu"
    images.mkdir(exist_ok=True)
    stays = ["--leave-running"] if leave_running else []
    row = _run("dump", "-t", str(pid), "-D", str(images), *stays, *USUAL)
    row["stored_bytes"] = sum(path.stat().st_blocks * 512 for path in images.iterdir())
    return row


def restore(directory: Path, lazy: bool) -> tuple[Row, subprocess.Popen[bytes] | None]:
    """The process of `dump` again, with a page server that the caller ends when it is lazy."""
    images = directory / "criu"
    server = None
    if lazy:
        assert COMMAND is not None
        server = subprocess.Popen(
            [COMMAND, "lazy-pages", "-D", str(images)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    pages = ["--lazy-pages"] if lazy else []
    return _run("restore", "-d", "-D", str(images), *pages, *USUAL), server
