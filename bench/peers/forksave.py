"""fork(), and the child writes its memory into a compressor: what redis's BGSAVE does, for anyone.

The target has to do it itself; so there is no such thing for a program that was not made for it.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import zstandard

from bench.figures import Row
from bench.pages import Pages

LEVEL = -1


def save(target: Pages, directory: Path) -> Row:
    pipe, kept = directory / "pipe", directory / "copy.zst"
    os.mkfifo(pipe)
    counts: list[int] = []

    def read() -> None:
        compressor = zstandard.ZstdCompressor(level=LEVEL, threads=os.cpu_count() or 1)
        with pipe.open("rb") as source, kept.open("wb") as to:
            counts.extend(compressor.copy_stream(source, to, read_size=1 << 20))
            to.flush()
            os.fsync(to.fileno())

    reader = threading.Thread(target=read)
    began = time.monotonic_ns()
    reader.start()
    try:
        fork_ns = target.tell("fork-save", pipe)["fork_ns"]
    except BaseException:
        os.close(os.open(pipe, os.O_WRONLY))  # the reader sees the end
        raise
    finally:
        reader.join()
    ended = time.monotonic_ns()
    return {
        "pause_us": fork_ns / 1000, "seconds": (ended - began) / 1e9, "saved_bytes": counts[0],
        "stored_bytes": counts[1], "began": began, "ended": ended,
    }  # fmt: skip
