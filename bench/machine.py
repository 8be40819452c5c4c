"""The machine that a run ran on: facts, warm memory, what processes take of it."""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from snapshot.kernel import kcmp
from tests.harness.processes import descendants

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of madvise(2)
SPARE_MIB = 1024


def commit(checkout: Path = ROOT) -> str:
    """With a `+` when there is something in the working tree that the commit has not."""

    def git(*words: str) -> str:
        ran = subprocess.run(["git", *words], cwd=checkout, capture_output=True, text=True)
        return ran.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")


def facts() -> dict[str, object]:
    return {
        "commit": commit(),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "memory_mib": meminfo("MemTotal"),
    }


def load() -> float:
    return os.getloadavg()[0]


def meminfo(name: str) -> int:
    """MiB."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = dict(line.split(":") for line in lines)
    return int(found[name].split()[0]) >> 10


def warm(mib: int) -> None:
    """Memory that the host took back is 5 to 20 times slower at its first touch than what was in
    use a moment ago: what the next measurement will need is touched, and given back."""
    mib = min(mib, meminfo("MemFree") - SPARE_MIB)
    if mib <= 0:
        return
    with mmap.mmap(-1, mib * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(POPULATE_WRITE)


def own_bytes(pids: Iterable[int]) -> tuple[int, int]:
    """What these processes take, without and with pages of files: PSS, which counts once what
    several of them share. Of those that have one address space, one counts."""
    memory = files = 0
    counted: list[int] = []
    for pid in pids:
        if any(kcmp.same_memory(pid, other) for other in counted):
            continue
        counted.append(pid)
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
            found = {name: int(rest.split()[0]) for name, rest in (s.split(":") for s in lines)}
            memory += (found["Pss_Anon"] + found["Pss_Shmem"]) << 10
            files += found["Pss_File"] << 10
    return memory, memory + files


class PeakMemory:
    """Peak memory of a process tree, seen from outside, every few milliseconds."""

    def __init__(self, pid: Callable[[], int | None], seconds: float = 0.02) -> None:
        self._pid = pid
        self._seconds = seconds
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self.peak_bytes = self.peak_with_files_bytes = 0
        self.available_before = 0
        self.available_least = 0

    def _sample(self) -> None:
        while not self._end.wait(self._seconds):
            if (pid := self._pid()) is None:
                continue
            memory, with_files = own_bytes([pid, *descendants(pid)])
            self.peak_bytes = max(self.peak_bytes, memory)
            self.peak_with_files_bytes = max(self.peak_with_files_bytes, with_files)
            self.available_least = min(self.available_least, meminfo("MemAvailable"))

    def __enter__(self) -> PeakMemory:
        self.available_before = self.available_least = meminfo("MemAvailable")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join()


def monotonic_of(epoch: float) -> int:
    """A moment in seconds since the epoch as ns of CLOCK_MONOTONIC; right to a few µs, as long as
    nobody has set the clock in between."""
    return time.monotonic_ns() - int((time.time() - epoch) * 1e9)
