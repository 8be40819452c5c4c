"""Page and chunk arithmetic. Addresses and sizes are bytes, ranges are half open: [start, end)."""

from __future__ import annotations

PAGE = 4096
PAGE_SHIFT = 12
CHUNK = 64 * 1024
"""The unit of saving: 64 KiB, aligned."""
CHUNK_SHIFT = 16
PAGES_PER_CHUNK = CHUNK // PAGE
HUGE = 2 * 1024 * 1024
"""What one PMD maps on x86-64: arming, releasing and sweeping go in such steps."""
PAGE_SIZES = (PAGE, HUGE)
"""Of a mapping that can be taken; the larger one is of hugetlbfs. x86-64 has one of 1 GiB too: who
writes to such a page would wait until all of it is saved."""
ALL_PAGES = (1 << PAGES_PER_CHUNK) - 1
"""The bitmap of a chunk of which every page is meant; bit i is the page at i * PAGE."""
KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


def align_down(value: int, unit: int) -> int:
    return value - value % unit


def align_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def mib(size: int) -> str:
    """A size for people: `12.5 MiB`; below 1 MiB in KiB, from 1 GiB on in GiB."""
    if size < MIB:
        return f"{size / 1024:.0f} KiB"
    if size < GIB:
        return f"{size / MIB:.1f} MiB"
    return f"{size / GIB:.2f} GiB"


def count(number: int, thing: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number} {thing}{'' if number == 1 else 's'}"
