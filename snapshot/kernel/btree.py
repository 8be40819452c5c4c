"""The C check of the B-trees of an LMDB data file (native/btree.c)."""

from __future__ import annotations

from typing import NamedTuple

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
