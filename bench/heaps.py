"""Memory of several kinds as targets: heaps of real programs, noise, and nothing at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness.redis import SERVER, Redis
from tests.harness.victims import Victim

from . import pages
from .client import fill
from .targets import HERE

KINDS = ("redis", "python", "mixed", "random", "zeros")
PIECE = 64 * 1024
PRESENT, FILE = 1 << 63, 1 << 61  # of an entry of /proc/PID/pagemap


@contextmanager
def running(directory: Path, kind: str, mib: int) -> Iterator[int]:
    """-> the pid of a process with about so much memory of that kind."""
    directory.mkdir(exist_ok=True)
    end: Callable[[], None]
    if kind == "redis":
        server = Redis(directory)
        end, pid = server.kill, server.pid
        fill(directory, server.socket_path, mib)
    else:
        victim: Victim
        if kind == "python":
            words = [sys.executable, str(HERE / "heap.py"), "--mib", str(mib)]
            victim = Victim(directory, words)
        else:
            victim = pages.Pages(directory, mib, kind)
        end, pid = victim.kill, victim.pid
    try:
        yield pid
    finally:
        end()


def why_not(kind: str) -> str | None:
    return "no redis-server here" if kind == "redis" and SERVER is None else None


def memory_of(pid: int, most: int) -> list[bytes]:
    """Up to `most` bytes of its anonymous memory, in pieces of 64 KiB that are all there."""
    found: list[bytes] = []
    with (
        open(f"/proc/{pid}/mem", "rb", buffering=0) as memory,
        open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap,
    ):
        for start, end in _anonymous(pid):
            for at in range(start + -start % PIECE, end - PIECE + 1, PIECE):
                if len(found) * PIECE >= most:
                    return found
                entries = os.pread(pagemap.fileno(), PIECE // 4096 * 8, at // 4096 * 8)
                if all(entry & PRESENT and not entry & FILE for entry in _words(entries)):
                    found.append(os.pread(memory.fileno(), PIECE, at))
    return found


def _words(data: bytes) -> memoryview:
    return memoryview(data).cast("Q")


def _anonymous(pid: int) -> Iterator[tuple[int, int]]:
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = line.split()
        if fields[1].startswith("rw-p") and (len(fields) == 5 or fields[5] == "[heap]"):
            start, end = (int(one, 16) for one in fields[0].split("-"))
            yield start, end
