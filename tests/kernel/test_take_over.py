"""A page server that goes on where another one was killed."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Sequence

import pytest
from snapshot.kernel._native import lib

from snapshot.journal import Journal
from snapshot.kernel.uffd import Uffd
from snapshot.lazy import Server
from snapshot.missing import Missing
from snapshot.units import CHUNK

UFFD_EVENT_FORK = 0x13
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sudo pytest tests/kernel")


class Nothing:
    """An image without a page."""

    def chunk(self, space: int, address: int, /) -> None:
        return None

    def addresses(self, space: int, /) -> Sequence[int]:
        return ()


class Forked:
    """Says that a child was forked, as a userfaultfd does, whose descriptor is `fd`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def read_into(self, memory: mmap.mmap, offset: int, most: int) -> int:
        memory[offset : offset + 32] = struct.pack("B7xI20x", UFFD_EVENT_FORK, self.fd)
        return 1


def test_the_descriptor_of_a_child_that_is_gone_may_be_anothers_by_now() -> None:
    area = mmap.mmap(-1, 2 * CHUNK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    base = -(-ctypes.addressof(ctypes.c_char.from_buffer(area)) // CHUNK) * CHUNK
    journal = Journal.create()
    uffd = Uffd.open()
    uffd.api(0)
    uffd.register(base, CHUNK, lib.UFFDIO_REGISTER_MODE_MISSING)
    journal.read(Forked(uffd.fd), 0)
    journal.gone(1)
    server = Server(Nothing(), 0, journal)
    server.add(uffd, Missing.of([(base, base + CHUNK)]))
    server.take_over()
    server.run()
    assert ctypes.string_at(base, CHUNK) == bytes(CHUNK)
