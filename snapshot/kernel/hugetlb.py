"""Huge pages of hugetlbfs: how they are asked for, and what the kernel has of them.

Source of facts: Documentation/admin-guide/mm/hugetlbpage.rst, mmap(2), memfd_create(2).
"""

from __future__ import annotations

import os
from typing import NamedTuple

from ..units import PAGE

MAP_HUGETLB = 0x40000
_SHIFT = 26
"""MAP_HUGE_SHIFT and MFD_HUGE_SHIFT: from here on stands the binary logarithm of the size."""


def map_flags(page_size: int) -> int:
    """What mmap(2) of anonymous memory needs for such pages; 0 for those of 4 KiB."""
    return 0 if page_size == PAGE else MAP_HUGETLB | (page_size.bit_length() - 1) << _SHIFT


def memfd_flags(page_size: int) -> int:
    """The same for memfd_create(2)."""
    return 0 if page_size == PAGE else os.MFD_HUGETLB | (page_size.bit_length() - 1) << _SHIFT


class Pool(NamedTuple):
    """Huge pages of one size. `free`: that nobody uses nor has reserved, also such as the kernel
    may still make (nr_overcommit_hugepages)."""

    total: int
    free: int


def pool(page_size: int) -> Pool | None:
    """None: this kernel has no pages of that size."""
    directory = _directory(page_size)

    def number(name: str) -> int:
        with open(f"{directory}/{name}", encoding="ascii") as file:
            return int(file.read())

    try:
        total = number("nr_hugepages")
        surplus = number("surplus_hugepages")
        makeable = max(0, number("nr_overcommit_hugepages") - surplus)
        free = max(0, number("free_hugepages") - number("resv_hugepages")) + makeable
    except FileNotFoundError:
        return None
    return Pool(total, free)


def enlarge(page_size: int, total: int) -> str:
    """The command that makes the pool one of `total` pages."""
    if page_size == _default_size():
        return f"sudo sysctl vm.nr_hugepages={total}"
    return f"echo {total} | sudo tee {_directory(page_size)}/nr_hugepages"


def _directory(page_size: int) -> str:
    return f"/sys/kernel/mm/hugepages/hugepages-{page_size // 1024}kB"


def _default_size() -> int:
    """The size that vm.nr_hugepages is about."""
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("Hugepagesize:"):
                return int(line.split()[1]) * 1024
    return 0
