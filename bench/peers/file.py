"""What a take stores, written to a file as fast as it can be: the bound where zstd is none.

In pieces of 4 MiB, synced after every second one: a take has to be on the disk as it goes, or the
last sync would have all of it. Nothing is read, compressed or indexed.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from bench.figures import Row

PIECE = 4 << 20
SYNC_EVERY = 2


def write(directory: Path, stored: int, size: int) -> Row:
    """`stored` bytes, which are those of `size` bytes of memory."""
    piece = os.urandom(PIECE)
    path = directory / "file"
    began = time.perf_counter()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        for number, at in enumerate(range(0, stored, PIECE)):
            os.write(handle, piece[: stored - at])
            if number % SYNC_EVERY:
                os.fdatasync(handle)
        os.fsync(handle)
        seconds = time.perf_counter() - began
    finally:
        os.close(handle)
        path.unlink()
    return {
        "seconds": seconds, "stored_bytes": stored, "mb_per_second": size / seconds / 1e6,
        "stored_mb_per_second": stored / seconds / 1e6,
    }  # fmt: skip
