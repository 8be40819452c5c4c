"""Which chunks have been seen, a bit for each. Pure."""

from __future__ import annotations

from collections import defaultdict

from .units import CHUNK

_BLOCK = 64
"""Chunks for one integer: 4 MiB of memory, so that 8 GiB take 2048 of them."""


class Known:
    """A set of chunks that costs next to nothing to hold."""

    def __init__(self) -> None:
        self._blocks: defaultdict[tuple[int, int], int] = defaultdict(int)

    def add(self, space: int, address: int) -> bool:
        """Whether it was in already."""
        block, position = divmod(address // CHUNK, _BLOCK)
        bits = self._blocks[space, block]
        self._blocks[space, block] = bits | 1 << position
        return bool(bits >> position & 1)
