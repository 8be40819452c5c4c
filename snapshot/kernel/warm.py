"""Memory of this process that was not used for a while, before somebody has to wait for its use.

While gigabytes are copied and stored the memory that a pause needs (the interpreter, the ledger of
chunks) leaves the caches, and on a virtual machine more than that: the first use of a page may take
a fault of the host, 5 to 30 us each (measured, Linux 6.18 on a nested virtual machine; one
instruction that went through the ledger of an idle process of 4 GiB took 2 ms).
"""

from __future__ import annotations

import os

from ..maps import PROT_READ
from . import procfs
from ._native import ffi, lib

LARGEST = 64 << 20
"""Bytes. A larger mapping of ours is staging: too much of it, and of no use in a pause."""


def warm() -> int:
    """Reads from each page that this process has in private mappings, code included: a
    microsecond each, about. -> how many they were; 0: this kernel does not tell (before 6.7)."""
    ranges = [
        edge
        for line in procfs.maps(os.getpid())
        if not line.shared and line.prot & PROT_READ and line.size <= LARGEST
        if not line.name.startswith(b"[v")  # [vvar], [vsyscall]: the kernel's
        for edge in (line.start, line.end)
    ]
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return max(0, int(lib.snap_warm(pagemap, ffi.new("uint64_t[]", ranges), len(ranges) // 2)))
    finally:
        os.close(pagemap)
