"""The page servers and guardians that a test has started, and their end."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from tests.harness import processes


def comm(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def servers(*names: str) -> list[int]:
    """Pids of those that have not ended: pages, guardian, keeper. The test is a sub-reaper, so
    they are below it."""
    wanted = names or ("snap-pages", "snap-guardian", "snap-keeper")
    below = [pid for pid in processes.descendants(os.getpid()) if comm(pid) in wanted]
    return [pid for pid in below if not processes.ended(pid) and not unnamed(pid)]


def unnamed(pid: int) -> bool:
    """A decoder or keeper that a server has just forked, and that still goes by its name."""
    with suppress(OSError, IndexError):
        parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        return comm(pid) == comm(int(parent)) == "snap-pages"
    return False


def await_end() -> None:
    processes.wait_until(lambda: not servers(), "the end of the page server")
