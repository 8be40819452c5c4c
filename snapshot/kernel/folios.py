"""What the page cache keeps of a file in one piece (a folio): so long a write holds its CPU.

A buffered write copies a folio at a time, and where file systems have large ones (ext4 since Linux
6.16, XFS since 5.18) a long write makes them as long as it is aligned, up to 2 MiB. A kernel that
is not preemptible (PREEMPT_NONE, PREEMPT_VOLUNTARY) gives the CPU to nobody else meanwhile,
whatever his class: for 1.2 ms with 2 MiB, and more where a host has to give the memory first.
(docs/decisions/0029-small-folios.md)
"""

from __future__ import annotations

import os
from contextlib import suppress

from ..units import PAGE

LARGEST = 128 * 1024
"""Bytes, which are copied in 0.1 to 0.35 ms."""


def bound(fd: int, start: int, end: int) -> None:
    """No folio of more than LARGEST comes to be in [start, end) of a file when it is written there:
    a page in each stretch of twice that is read, and larger ones find no room beside it. For parts
    of it that are not in the page cache, and inside the file; where nothing is on the disk, reading
    costs none."""
    step = 2 * LARGEST
    with suppress(OSError):  # it is no more than a hint
        for at in range(start - start % step, end + step, step):
            os.posix_fadvise(fd, at, PAGE, os.POSIX_FADV_WILLNEED)
