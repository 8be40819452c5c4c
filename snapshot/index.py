"""The index of an image: for each space, chunk addresses in order and where their bytes are."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from sys import byteorder

from .environment import Environment
from .records import INDEX_ENTRY, INDEX_KEY, SpaceSummary, digest

_ADDRESS = slice(INDEX_KEY.size - 8, INDEX_KEY.size)


class Space:
    """The entries of one space, packed: 40 bytes of memory for each chunk."""

    def __init__(self, space: int, entries: bytes) -> None:
        self.space = space
        self.addresses = array("Q")
        self._entries = entries
        self.addresses.frombytes(b"".join(entry[:8] for entry in _split(entries)))
        if byteorder == "little":
            self.addresses.byteswap()

    def __len__(self) -> int:
        return len(self.addresses)

    def find(self, address: int) -> tuple[int, bytes] | None:
        """Sequence number and content digest of the chunk at exactly this address."""
        position = bisect_left(self.addresses, address)
        if position == len(self.addresses) or self.addresses[position] != address:
            return None
        _, sequence, content = INDEX_ENTRY.unpack_from(self._entries, position * INDEX_ENTRY.size)
        return sequence, content

    def in_write_order(self) -> list[int]:
        """Addresses in the order in which their chunks were first written to the store."""
        entries = sorted(INDEX_ENTRY.iter_unpack(self._entries), key=lambda entry: entry[1])
        return [address for address, _, _ in entries]

    def summary(self) -> SpaceSummary:
        return SpaceSummary(space=self.space, chunks=len(self), digest=digest(self._entries))


def load(environment: Environment, number: int, space: int) -> Space:
    """What the index has of a space, unverified: compare its `summary`."""
    first = INDEX_KEY.pack(number, space, 0)
    prefix = first[:-8]
    with environment.read(buffers=False) as transaction:
        cursor = transaction.cursor(environment.databases["index"])
        parts = []
        if cursor.set_range(first):
            for key, value in cursor:
                if not key.startswith(prefix):
                    break
                parts.append(key[_ADDRESS] + value)
    return Space(space, b"".join(parts))


def spaces(environment: Environment, number: int) -> Iterator[Space]:
    """All spaces of an image, one at a time."""
    space = 0
    while True:
        with environment.read() as transaction:
            cursor = transaction.cursor(environment.databases["index"])
            if not cursor.set_range(INDEX_KEY.pack(number, space, 0)):
                return
            found, space, _ = INDEX_KEY.unpack(cursor.key())
        if found != number:
            return
        yield load(environment, number, space)
        space += 1


def _split(entries: bytes) -> Iterator[bytes]:
    size = INDEX_ENTRY.size
    return (entries[start : start + size] for start in range(0, len(entries), size))
