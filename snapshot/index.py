"""The index of an image: for each space, chunk addresses in order and where their bytes are."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

from .environment import Environment
from .errors import DamagedError
from .kernel import btree
from .kernel.stored import Places
from .records import INDEX_ENTRY, INDEX_KEY, SpaceSummary, digest
from .units import CHUNK

_SEQUENCE_AT = 8


class Entry(NamedTuple):
    address: int
    sequence: int  # key of the chunk's value
    digest: bytes  # of its content


class Space:
    """The entries of one space, packed: 40 bytes of memory for each chunk."""

    def __init__(self, space: int, entries: bytes) -> None:
        self.space = space
        self._entries = entries
        self.addresses: array[int]
        self.addresses, bits = btree.numbers(entries, INDEX_ENTRY.size)
        if bits & (CHUNK - 1 | 1 << 63):
            raise DamagedError(f"the index of space {space} has addresses that are of no chunk")

    def __len__(self) -> int:
        return len(self.addresses)

    def find(self, address: int) -> Entry | None:
        """The entry of the chunk at exactly this address."""
        position = bisect_left(self.addresses, address)
        if position == len(self.addresses) or self.addresses[position] != address:
            return None
        return Entry(*INDEX_ENTRY.unpack_from(self._entries, position * INDEX_ENTRY.size))

    def places(self, environment: Environment) -> Places:
        """Where the values of its chunks lie in the store's file, as long as the image is in
        use."""
        size, key = INDEX_ENTRY.size, _SEQUENCE_AT
        fd, places = environment.places("chunks", self._entries, size, key)
        return Places(fd, self.addresses, self._entries, size, places)

    def entries(self) -> Iterator[Entry]:
        """All entries, in order of address."""
        for address, sequence, content in INDEX_ENTRY.iter_unpack(self._entries):
            yield Entry(address, sequence, content)

    def summary(self) -> SpaceSummary:
        return SpaceSummary(space=self.space, chunks=len(self), digest=digest(self._entries))


def load(
    environment: Environment, number: int, space: int, said: SpaceSummary | None = None
) -> Space:
    """What the index has of a space, unverified: compare its `summary`. Fast if that is `said`."""
    if said is not None:
        found = _read(environment, number, said)
        if found is not None:
            return found
    first = INDEX_KEY.pack(number, space, 0)
    prefix = first[:-8]
    with environment.read(buffers=False) as transaction:  # three times as fast as with views
        cursor = transaction.cursor(environment.databases["index"])
        parts = []
        if cursor.set_range(first):
            for key, value in cursor:
                if not key.startswith(prefix):
                    break
                entry = key[len(prefix) :] + value
                if len(entry) == INDEX_ENTRY.size:  # others are damage, seen by the summary
                    parts.append(entry)
    return Space(space, b"".join(parts))


def _read(environment: Environment, number: int, said: SpaceSummary) -> Space | None:
    """The space when all of it is as said, by a way that is too simple to tell what is wrong with
    one that is not."""
    prefix = INDEX_KEY.pack(number, said.space, 0)[:-8]
    entries = environment.entries("index", prefix, INDEX_ENTRY.size, said.chunks)
    if entries is None or digest(entries) != said.digest:
        return None
    return Space(said.space, entries)


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
