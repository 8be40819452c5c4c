"""Whether LMDB may be let at a data file: it trusts its own pages, and a damaged one would end this
process in SIGSEGV or SIGBUS. What is checked here costs milliseconds: less than 1 % of a store is
pages of its B-trees. The values are not looked at; they have checksums of their own.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import DamagedError, StoreError
from .kernel import btree
from .kernel.errnames import error_text
from .units import PAGE

_META = struct.Struct("=16xII16xIH")  # magic, version; page size and flags of the first database
_MAGIC, _VERSION, _FLAGS = 0xBEEFC0DE, 1, 0x08
_TRIES = 100
"""A writer that commits twice while we begin takes our meta page; a hundred times is damage."""


def check_head(data: Path) -> None:
    """Before LMDB opens the file: it goes by the page size and the flags of its first two pages."""
    with data.open("rb") as file:
        for number in range(2):
            file.seek(number * PAGE)
            head = file.read(_META.size)
            if len(head) < _META.size:
                raise damaged(data, number, "the file ends before it")
            magic, version, size, flags = _META.unpack(head)
            if (magic, version, size, flags) != (_MAGIC, _VERSION, PAGE, _FLAGS):
                raise damaged(data, number, "it is no meta page of a store")


def check_trees(data: Path, fd: int, read: Callable[[], Any], deep: bool = False) -> None:
    """Before LMDB walks the trees. `read` gives a read transaction of `data`, open as `fd`;
    `deep` looks at the first page of every long value too: before anything is removed."""
    for _ in range(_TRIES):
        with read() as transaction:  # its pages stay as they are
            number = transaction.id()
            found = btree.check(fd, PAGE, number, deep)
        if found.errno == -errno.EAGAIN:
            continue
        if found.errno:
            text = error_text(-found.errno)
            raise StoreError(f"cannot read {data}: {text}", f"ls -l {data}")
        if found.reason:
            raise damaged(data, found.page, found.reason)
        return
    raise damaged(data, number & 1, f"it is not of transaction {number}")


def damaged(data: Path, page: int, reason: str) -> DamagedError:
    return DamagedError(
        f"the store {data.parent} is damaged: page {page} of {os.path.basename(data)}: {reason}; "
        "what its images hold cannot be found any more",
        "bring the file back from a copy, or start a new store: snap --store DIR take PID",
    )
