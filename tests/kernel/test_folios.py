"""The pieces of a file in the page cache, as /proc/kpageflags tells of them (root)."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshot.environment import DATA, Transaction, open_environment
from snapshot.kernel import folios
from snapshot.units import MIB, PAGE

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sudo pytest tests/kernel")

TAIL = 1 << 16  # KPF_COMPOUND_TAIL: Documentation/admin-guide/mm/pagemap.rst
FRAME = (1 << 55) - 1
SIZE = 8 * MIB
VALUE = bytes(7 * PAGE)


def largest(path: Path, size: int) -> int:
    """Bytes of the largest folio of [0, size) of a file."""
    return max(folio_sizes(path, size))


def folio_sizes(path: Path, length: int) -> Iterator[int]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), length, prot=mmap.PROT_READ) as memory:
        assert len(memory[::PAGE]) == length // PAGE  # and all are in the page tables
        flags = list(_flags(path, length))
    size = 0
    for page in flags:
        if size and not page & TAIL:
            yield size
            size = 0
        size += PAGE
    yield size


def _flags(path: Path, length: int) -> Iterator[int]:
    maps = Path("/proc/self/maps").read_text().splitlines()
    ours = [line.split()[0].split("-") for line in maps if line.endswith(f" {path}")]
    (start,) = (int(low, 16) for low, high in ours if int(high, 16) - int(low, 16) == length)
    pages = length // PAGE
    with open("/proc/self/pagemap", "rb") as pagemap, open("/proc/kpageflags", "rb") as flags:
        data = os.pread(pagemap.fileno(), 8 * pages, start // PAGE * 8)
        entries = struct.unpack(f"{pages}Q", data)
        for entry in entries:
            (found,) = struct.unpack("Q", os.pread(flags.fileno(), 8, (entry & FRAME) * 8))
            yield found


def written(path: Path, bounded: bool) -> int:
    """The largest folio of a file that was written in one go."""
    with path.open("wb+", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, SIZE + MIB)
        if bounded:
            folios.bound(file.fileno(), 0, SIZE)
        assert os.pwrite(file.fileno(), os.urandom(SIZE), 0) == SIZE
        return largest(path, SIZE)


def test_a_write_makes_no_large_folios(tmp_path: Path) -> None:
    if written(tmp_path / "as it comes", bounded=False) <= folios.LARGEST:
        pytest.skip("this file system has no large folios")
    assert written(tmp_path / "bounded", bounded=True) == folios.LARGEST


def test_nor_does_a_store(tmp_path: Path) -> None:
    if written(tmp_path / "as it comes", bounded=False) <= folios.LARGEST:
        pytest.skip("this file system has no large folios")
    environment = open_environment(tmp_path, create=True)
    for part in range(4):
        keys = [struct.pack(">Q", part * 300 + i) for i in range(300)]

        def work(transaction: Transaction, keys: list[bytes] = keys) -> None:
            cursor = transaction.cursor(environment.databases["chunks"])
            cursor.putmulti([(key, VALUE) for key in keys], append=True)

        environment.write(work, adds=300 * 8 * PAGE)
    assert largest(tmp_path / DATA, environment.used_bytes()) <= folios.LARGEST
