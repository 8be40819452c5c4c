"""Chunks of an image by a short way: read and decoded in C (native/stored.h)."""

from __future__ import annotations

from array import array
from typing import Any, NamedTuple

from ..units import CHUNK
from ._native import ffi, lib


class Places(NamedTuple):
    """Where the values of chunks lie in a file: one for each entry."""

    fd: int
    addresses: array[int]  # of the chunks, ascending
    entries: bytes  # of each as many, the digest of its content at 16
    entry: int  # bytes
    places: Any  # btree_place[]
    bases: Places | None = None
    """Of the chunks that deltas among them are made against."""

    def chunks(self) -> Any:
        """snap_chunks *, good as long as this is."""
        return ffi.new(
            "snap_chunks *",
            {
                "addresses": ffi.from_buffer("uint64_t[]", self.addresses),
                "places": self.places,
                "entries": ffi.from_buffer(self.entries),
                "count": len(self.addresses),
                "entry": self.entry,
            },
        )


class Stored:
    """For one thread at a time."""

    def __init__(self, made: Any, places: Places) -> None:
        self.handle = ffi.gc(made, lib.snap_stored_free)
        self._places = places

    @classmethod
    def new(cls, places: Places) -> Stored | None:
        """None: there is no memory or no libzstd for it."""
        bases = places.bases.chunks() if places.bases is not None else ffi.new("snap_chunks *")
        made = lib.snap_stored_new(places.fd, places.chunks(), bases)
        return cls(made, places) if made else None

    @staticmethod
    def possible() -> bool:
        """Whether there is a libzstd for it."""
        made = lib.snap_blocks_new()
        lib.snap_blocks_free(made)
        return bool(made)

    def run(self, address: int, chunks: int, memory: Any, offset: int) -> list[int]:
        """Decodes chunks that lie one behind the other to `offset` of a writable buffer. -> the
        bitmap of the pages of each that belong to the image, up to the first that is not to be had
        by this way, or is damaged."""
        if offset + chunks * CHUNK > len(memory):
            raise ValueError("the chunks would not fit into the buffer")
        present = ffi.new("uint16_t[]", chunks)
        to = ffi.from_buffer(memory, require_writable=True) + offset
        done = lib.snap_stored_run(self.handle, address, chunks, to, present)
        return list(present[0:done])
