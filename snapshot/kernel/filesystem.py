"""Files as the kernel sees them beyond Python's os module: what kind of file system, where the
data of a sparse file lies, files without a name."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from ._native import lib

TMPFS_MAGIC = 0x01021994
HUGETLBFS_MAGIC = 0x958458F6
PROC_MAGIC = 0x9FA0


def type_of(fd: int) -> int:
    """f_type of fstatfs(2), e.g. TMPFS_MAGIC. OSError when it fails."""
    result = int(lib.snap_filesystem_type(fd))
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """The half-open ranges of [0, size) that are no holes; moves the offset of `fd`."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole to the end
                return
            raise
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        if end <= start:
            return
        yield start, end
        at = end


def unnamed_file(directory: bytes, mode: int) -> int:
    """A new file without a name, O_RDWR: in `directory` where possible, else in /tmp, else in
    memory."""
    for where in (directory, b"/tmp"):
        try:
            return os.open(where, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, mode)
        except OSError:
            continue
    return os.memfd_create("deleted", os.MFD_CLOEXEC)


def pwrite_all(fd: int, data: bytes, offset: int) -> None:
    """All of `data` at `offset`. OSError when the disk is full."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def own_directory(path: bytes) -> None:
    """Give the calling thread a working directory of its own and change it to `path`. Only for a
    thread that ends soon: it keeps that. OSError when there is no such directory."""
    result = int(lib.snap_unshare_directory())
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    os.chdir(path)
