"""gdb's gcore: the target is stopped until its core file is written."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

from bench.figures import Row

COMMAND = shutil.which("gcore")


def why_not() -> str | None:
    return None if COMMAND else "no gcore here (gdb)"


def dump(pid: int, directory: Path) -> Row:
    assert COMMAND is not None
    prefix = directory / "core"
    began = time.monotonic_ns()
    ran = subprocess.run(
        [COMMAND, "-o", str(prefix), str(pid)], capture_output=True, text=True, check=False
    )
    ended = time.monotonic_ns()
    core = Path(f"{prefix}.{pid}")
    row: Row = {"exit_code": ran.returncode, "seconds": (ended - began) / 1e9}
    row |= {"began": began, "ended": ended}
    if core.exists():
        row["stored_bytes"] = core.stat().st_blocks * 512
        core.unlink()
    return row
