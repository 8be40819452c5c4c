"""Messages of a userfaultfd as typed events. Pure.

Source: struct uffd_msg of the kernel's userfaultfd.h (32 bytes, little endian on x86-64). Addresses
are those of the process that owns the memory; ranges are half open.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from msgspec import Struct

MESSAGE = struct.Struct("<BBHIQQQ")


class Fault(Struct, frozen=True):
    """A thread waits for the page at `address` (page aligned unless EXACT_ADDRESS)."""

    address: int
    write: bool
    protect: bool  # a write to a write-protected page
    minor: bool
    tid: int = 0  # only with the feature THREAD_ID


class Fork(Struct, frozen=True):
    """The process forked; `fd` is the child's userfaultfd, open in the reader of the message."""

    fd: int


class Remap(Struct, frozen=True):
    """mremap moved [old, old + length) to `new`; the bytes are there already."""

    old: int
    new: int
    length: int


class Remove(Struct, frozen=True):
    """madvise DONTNEED, FREE or REMOVE: [start, end) is zero from now on. The caller waited for
    this message to be read; the zap follows it."""

    start: int
    end: int


class Unmap(Struct, frozen=True):
    """[start, end) is no longer mapped; the bytes are gone already."""

    start: int
    end: int


class Unknown(Struct, frozen=True):
    """A message of a kind that this version does not know."""

    number: int


Event = Fault | Fork | Remap | Remove | Unmap | Unknown

PAGEFAULT, FORK, REMAP, REMOVE, UNMAP = 0x12, 0x13, 0x14, 0x15, 0x16
FLAG_WRITE, FLAG_WP, FLAG_MINOR = 1, 2, 4


def parse(data: bytes | memoryview) -> Iterator[Event]:
    """The events of `data` in order. ValueError when it is not whole messages."""
    if len(data) % MESSAGE.size:
        raise ValueError(f"{len(data)} bytes are not whole messages of {MESSAGE.size}")
    for number, _, _, _, first, second, third in MESSAGE.iter_unpack(data):
        yield event(number, first, second, third)


def event(number: int, first: int, second: int, third: int) -> Event:
    if number == PAGEFAULT:
        return Fault(
            second,
            bool(first & FLAG_WRITE),
            bool(first & FLAG_WP),
            bool(first & FLAG_MINOR),
            third & 0xFFFFFFFF,
        )
    if number == FORK:
        return Fork(first & 0xFFFFFFFF)
    if number == REMAP:
        return Remap(first, second, third)
    if number == REMOVE:
        return Remove(first, second)
    if number == UNMAP:
        return Unmap(first, second)
    return Unknown(number)
