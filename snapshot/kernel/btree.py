"""The B-trees of an LMDB data file in C: checked (native/btree.c), read (native/btree_range.c,
native/btree_places.c)."""

from __future__ import annotations

from array import array
from typing import Any, NamedTuple

from ._native import ffi, lib


class Found(NamedTuple):
    """`errno` is 0 or negative; `reason` is "" when all is sound."""

    errno: int
    page: int
    pages: int  # that were read
    reason: str


def check(fd: int, page_bytes: int, transaction: int, deep: bool) -> Found:
    """Walks all trees of a transaction, which somebody must hold open or nobody write beside."""
    report = ffi.new("btree_report *")
    flags = lib.BTREE_DEEP if deep else 0
    result = int(lib.btree_check(fd, page_bytes, transaction, flags, report))
    reason = ffi.string(report.reason).decode(errors="replace")
    return Found(result, int(report.page), int(report.pages), reason)


def entries(
    fd: int, page_bytes: int, transaction: int, database: str, prefix: bytes, entry: int, most: int
) -> bytes | None:
    """Of all keys of a database that begin with `prefix`: the rest of the key and the value, which
    together are `entry` bytes, in order. The trees were checked and the transaction is held open.
    Not verified: compare a checksum. None: LMDB must be asked, also when there are more than `most`
    of them."""
    out = bytearray(entry * most)
    count = lib.btree_range(
        fd,
        page_bytes,
        transaction,
        database.encode(),
        prefix,
        len(prefix),
        entry,
        ffi.from_buffer("uint8_t[]", out, require_writable=True),
        most,
    )
    return None if count < 0 else bytes(memoryview(out)[: count * entry])


def numbers(data: bytes, entry: int) -> tuple[array[int], int]:
    """The big endian number that each entry begins with; and all of them or-ed together."""
    count = len(data) // entry
    found = array("Q", bytes(8 * count))
    if not count:
        return found, 0
    into = ffi.from_buffer("uint64_t[]", found, require_writable=True)
    return found, int(lib.btree_numbers(data, entry, count, into))


def places(
    fd: int, page_bytes: int, transaction: int, database: str, entries: bytes, entry: int, key: int
) -> Any:
    """btree_place[]: where in the file the values of the keys at `key` of each entry (of `entry`
    bytes) lie, unverified; `bytes` is 0 for those that are not found."""
    count = len(entries) // entry
    found = ffi.new("btree_place[]", count)
    keys = ffi.from_buffer("uint8_t[]", entries) + key
    lib.btree_places(fd, page_bytes, transaction, database.encode(), keys, entry, count, found)
    return found
