"""Who uses an image: a lock file for each image number, held with flock.

A take holds its image's alone, a reader shares it, `rm` and `gc` need it alone. The kernel lets go
of it when the last process that holds it ends, however it ends: nothing is left to clean up, and
no pid can be mistaken for another.
"""

from __future__ import annotations

import fcntl
import os
import re
import weakref
from pathlib import Path

from .errors import StoreError

DIRECTORY = "use"


class Lease:
    """A held lock; a forked child holds it too, until both have closed it."""

    def __init__(self, handle: int) -> None:
        self.handle = handle  # a descriptor: whoever inherits it holds the lease too
        self._close = weakref.finalize(self, os.close, handle)

    def release(self) -> None:
        self._close()


def acquire(store: Path, number: int, alone: bool) -> Lease | None:
    """The lease of an image number, or None when it is held by others. Never waits."""
    path = _path(store, number)
    while True:
        handle = _open(path)
        lease = Lease(handle)
        try:
            fcntl.flock(handle, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            if os.fstat(handle).st_nlink:
                return lease
        except BlockingIOError:
            lease.release()
            return None
        lease.release()  # `forget` came between open and flock


def forget(store: Path, number: int) -> None:
    """Removes the lock file of an image that is no more. The caller holds its lease alone."""
    _path(store, number).unlink(missing_ok=True)


def numbers(store: Path) -> set[int]:
    """The image numbers that have a lock file, held or not."""
    return {int(path.name) for path in (store / DIRECTORY).glob("[0-9]*")}


def holders(store: Path, number: int) -> list[int]:
    """The pids that hold the lease, as far as /proc/locks can tell from here (for messages)."""
    try:
        inode = _path(store, number).stat().st_ino
        locks = Path("/proc/locks").read_text()
    except OSError:
        return []
    found = re.findall(rf" FLOCK +\w+ +\w+ +(\d+) [0-9a-f]+:[0-9a-f]+:{inode} ", locks)
    return sorted({int(pid) for pid in found})


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)  # a copied store may lack it
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StoreError(f"cannot lock {path}: {error.strerror}", f"ls -ld {path.parent}") from None


def _path(store: Path, number: int) -> Path:
    return store / DIRECTORY / str(number)
