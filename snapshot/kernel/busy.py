"""Where the threads of a process run that have something to do."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from ..errors import SnapError
from . import procfs

_MOST_THREADS = 64
"""Of more nothing is told: each costs 30 us, and they are everywhere anyhow."""
_SHARE = 0.05
"""Who wanted a processor for a smaller part of the time is hardly there."""


class Busy:
    """Of one process, from one look to the next."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._looked_ns = time.monotonic_ns()
        self._wanted: dict[int, int] = {}

    def processors(self) -> frozenset[int]:
        """Where those of its threads are now that have been busy since the last call. Empty at the
        first one, with many threads, and where the kernel does not tell (CONFIG_SCHED_INFO)."""
        now, before, self._wanted = time.monotonic_ns(), self._wanted, {}
        least, self._looked_ns = (now - self._looked_ns) * _SHARE, now
        found = set()
        with suppress(SnapError):  # it, or one of them, has ended
            threads = procfs.threads(self._pid)
            if len(threads) > _MOST_THREADS:
                return frozenset()
            for thread in threads:
                wanted = self._wanted[thread] = sum(times(self._pid, thread))
                if wanted - before.get(thread, wanted) > least:
                    found.add(procfs.stat(self._pid, thread).processor)
        return frozenset(found)


def times(pid: int, thread: int) -> tuple[int, int]:
    """How long a thread has run, and been ready and not run, in ns. Zeros where the kernel does not
    tell (CONFIG_SCHED_INFO)."""
    with suppress(OSError, ValueError):
        ran, waited, _ = Path(f"/proc/{pid}/task/{thread}/schedstat").read_bytes().split()
        return int(ran), int(waited)
    return 0, 0
