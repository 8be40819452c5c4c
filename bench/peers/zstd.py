"""zstd alone, on all cores: what any snapshot that compresses could reach at most.

Frames of 64 KiB, from memory to memory, nothing hashed and nothing kept.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import zstandard

from bench.figures import Row

LEVEL = -1
AT_ONCE = 64
"""Pieces for one call, which releases the interpreter's lock for all of them."""


def compress(pieces: Sequence[bytes]) -> Row:
    groups = [pieces[at : at + AT_ONCE] for at in range(0, len(pieces), AT_ONCE)]
    threads = os.cpu_count() or 1

    def work(first: int) -> int:
        compressor = zstandard.ZstdCompressor(level=LEVEL)
        return sum(
            compressor.multi_compress_to_buffer(list(group)).size()
            for group in groups[first::threads]
        )

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        stored = sum(pool.map(work, range(threads)))
    seconds = time.perf_counter() - began
    size = sum(map(len, pieces))
    return {
        "seconds": seconds, "saved_bytes": size, "stored_bytes": stored,
        "mb_per_second": size / seconds / 1e6, "level": LEVEL,
    }  # fmt: skip


def decompress(pieces: Sequence[bytes]) -> float:
    """Seconds, on one core, for what `compress` makes of them."""
    compressor, decompressor = zstandard.ZstdCompressor(level=LEVEL), zstandard.ZstdDecompressor()
    frames = [compressor.compress(piece) for piece in pieces]
    began = time.perf_counter()
    for frame in frames:
        decompressor.decompress(frame)
    return time.perf_counter() - began
