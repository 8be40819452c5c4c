"""Memory that was not used for a while, before somebody has to wait for its use.

While gigabytes are copied and stored, what a pause needs leaves the caches: the interpreter, the
ledger of chunks, pages of the target that are copied in it. On a virtual machine that is more: the
first use of such a page may take a fault of the host, 5 to 40 us (measured, Linux 6.18 on a nested
virtual machine; to look at one word in each of 68 blocks of the ledger took 2 ms).
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from ..maps import PROT_READ
from . import procfs
from ._native import ffi, lib

LARGEST = 64 << 20
"""Bytes. A larger mapping of ours is staging: too much of it, and of no use in a pause."""


def warm_ours() -> int:
    """Reads from each page that this process has in private mappings, code included: some
    microseconds each. -> how many they were; 0: this kernel does not tell (before 6.7)."""
    pid = os.getpid()
    ranges = [
        (line.start, line.end)
        for line in procfs.maps(pid)
        if not line.shared and line.prot & PROT_READ and line.size <= LARGEST
        if not line.name.startswith(b"[v")  # [vvar], [vsyscall]: the kernel's
    ]
    pagemap = procfs.open_file(pid, "pagemap")
    try:
        return _warm(pid, pagemap, ranges, anonymous=False)
    finally:
        os.close(pagemap)


def warm_others(pid: int, pagemap: int, ranges: Iterable[tuple[int, int]]) -> int:
    """The same of what another process has of its own in [start, end), …; `pagemap`: a descriptor
    of its /proc/PID/pagemap."""
    return _warm(pid, pagemap, ranges, anonymous=True)


def _warm(pid: int, pagemap: int, ranges: Iterable[tuple[int, int]], *, anonymous: bool) -> int:
    edges = [edge for one in ranges for edge in one]
    array = ffi.new("uint64_t[]", edges)
    return max(0, int(lib.snap_warm(pid, pagemap, anonymous, array, len(edges) // 2)))
