"""Bytes of files that a process had mapped, as long as they are still what they were at T0."""

from __future__ import annotations

import os
import weakref

from .errors import StoreError
from .manifest import MappedFile


class FileReader:
    """A MappedFile, opened and compared with its record when first read. Not kept: the image holds
    only the pages that differ from the file."""

    def __init__(self, record: MappedFile) -> None:
        self._record = record
        self._handle: int | None = None

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`; zeros beyond the end of the file, as in its last page.

        StoreError when the file is gone or has changed since T0.
        """
        data = os.pread(self._opened(), length, offset)
        return data + bytes(length - len(data))

    def _opened(self) -> int:
        if self._handle is None:
            path = os.fsdecode(self._record.path)
            try:
                handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
            except OSError as error:
                raise StoreError(
                    f"the mapped file {path} cannot be read: {error.strerror}", f"ls -l {path}"
                ) from None
            self._close = weakref.finalize(self, os.close, handle)
            self._check(path, os.fstat(handle))
            self._handle = handle
        return self._handle

    def _check(self, path: str, found: os.stat_result) -> None:
        size, time = self._record.size, self._record.mtime_ns
        if found.st_size != size:
            raise StoreError(
                f"the mapped file {path} has {found.st_size} bytes, at T0 it had {size}",
                f"ls -l {path}",
            )
        if found.st_mtime_ns != time:
            raise StoreError(
                f"the mapped file {path} was changed {(found.st_mtime_ns - time) / 1e9:.3f} s "
                "after the time it had at T0",
                f"ls -l --full-time {path}",
            )
