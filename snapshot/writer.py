"""Writing one image into a store: nothing of it is visible before `commit`."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import NamedTuple

import zstandard

from . import chunkcodec, faults, index, sweep
from . import manifest as manifests
from .chunkcodec import Content
from .environment import Environment, Transaction
from .errors import DamagedError, SnapError, StoreError
from .handoff import Handoff
from .lease import Lease
from .manifest import Manifest
from .records import (
    INDEX_KEY,
    INDEX_VALUE,
    NEXT_SEQUENCE_KEY,
    NUMBER,
    ImageRecord,
    digest,
    seal,
)
from .units import CHUNK, MIB, PAGE, align_up

BATCH = 64
"""Chunks for one call of the compressor: 4 MiB of memory. Fewer cost up to 30 % more."""
_WAITING = 16 * MIB
"""Bytes on the disk that may wait for the disk: they become one transaction, which on a fast disk
has one batch or two (larger ones are slower), on a slow one as many as a sync is worth."""


_INLINE = 1900
"""LMDB keeps values up to about this size beside their keys."""


class RawChunk(NamedTuple):
    """CHUNK bytes of memory as they were copied; only the pages in `pages` count. Without any the
    chunk does not belong to the image any more, and `data` is empty."""

    space: int
    address: int
    pages: int  # bit i: the page at address + i * PAGE belongs to the image
    data: memoryview
    patch: int | None = None
    """Only these of the pages are in `data`; the others are those of the chunk put before."""


class _Pending(NamedTuple):
    """A chunk on its way: what the index says of it now, and what it will say."""

    key: bytes
    before: bytes | None  # index value of an earlier put of this image
    sequence: int | None  # of an equal chunk of an earlier image
    value: bytes | None  # what goes into `chunks` otherwise
    content: Content | None  # None: the chunk is taken out
    gained: int  # pages that the image did not have before
    freed: int  # bytes of the value that it replaces, and that was this image's alone


def _on_disk(entry: _Pending) -> int:
    """About the bytes that LMDB takes for a chunk and its index entry: larger values have pages of
    their own."""
    size = len(entry.value or b"")
    return 100 + (size if size < _INLINE else align_up(size + 16, PAGE))


class ImageWriter:
    """Made by `Store.begin`. `put` may be called by several threads at once, `commit` and `abort`
    once, when no put is running. Used as a context manager it aborts unless it was committed."""

    def __init__(
        self,
        environment: Environment,
        name: str,
        number: int,
        first_sequence: int,
        lease: Lease,
        earlier: tuple[int, Lease] | None,
    ) -> None:
        self.name = name
        self.number = number
        self.saved_bytes = 0
        """Bytes of the target in the image: every page put counts once."""
        self.stored_bytes = 0
        """Bytes of the chunks written for it: what it shares with an earlier image costs none."""
        self._environment = environment
        self._first_sequence = first_sequence
        self._lease = lease
        self._earlier = earlier
        self._counting = threading.Lock()
        self._unwritten: set[bytes] = set()  # keys that were put and are not in the index yet
        self._handoff = Handoff(self._write, _WAITING)
        self._open = True

    def put(self, batch: Sequence[RawChunk]) -> None:
        """Saves chunks; when it returns, their memory may be used again. They are written soon
        after, at the latest by `commit`: what fails then is raised by a later put, or by commit.

        A chunk that is put again is replaced; puts of one chunk must not run at the same time.
        """
        if not self._open:
            raise StoreError(f"the image {self.name} is finished", "snap list")
        part: dict[bytes, RawChunk] = {}
        for chunk in batch:
            key = INDEX_KEY.pack(self.number, chunk.space, chunk.address)
            if len(part) == BATCH or key in part:
                self._put(part)
                part = {}
            part[key] = chunk
        if part:
            self._put(part)
        faults.point("put")

    def _put(self, batch: dict[bytes, RawChunk]) -> None:
        with self._counting:
            unwritten = not self._unwritten.isdisjoint(batch)
        if unwritten:
            self._handoff.drain()
        pending = self._prepare(batch)
        fresh = [entry.content for entry in pending if entry.sequence is None and entry.content]
        values = iter(chunkcodec.encode(fresh))
        final = [
            entry._replace(value=next(values))
            if entry.sequence is None and entry.content
            else entry
            for entry in pending
        ]
        with self._counting:
            self.stored_bytes += sum(len(entry.value or b"") - entry.freed for entry in final)
            self.saved_bytes += sum(entry.gained for entry in final) * PAGE
            self._unwritten.update(batch)
        self._handoff.give(final, sum(map(_on_disk, final)))

    def _prepare(self, batch: dict[bytes, RawChunk]) -> list[_Pending]:
        """Finds each chunk's pages and digest, and whether an earlier image holds the same."""
        pending = []
        with self._environment.read() as transaction:
            for key, chunk in batch.items():
                before = self._index(transaction, key)
                old, freed = self._replaced(transaction, before)
                content, same = None, None
                if chunk.pages:
                    content = self._examined(transaction, chunk, before)
                    same = self._same(transaction, chunk.space, chunk.address, content.digest)
                gained = (content.present.bit_count() if content else 0) - old
                pending.append(_Pending(key, before, same, None, content, gained, freed))
        return pending

    def _examined(
        self, transaction: Transaction, chunk: RawChunk, before: bytes | None
    ) -> Content:
        if len(chunk.data) != CHUNK or chunk.address % CHUNK:
            raise ValueError(f"not a chunk: {len(chunk.data)} bytes at {chunk.address:#x}")
        if chunk.patch is None:
            return chunkcodec.examine(chunk.pages, chunk.data)
        if before is None:
            raise ValueError(f"a patch of nothing at {chunk.address:#x}")
        old, _ = chunkcodec.decode(self._value(transaction, before))
        return chunkcodec.patched(old, chunk.pages, chunk.patch, chunk.data)

    def _replaced(self, transaction: Transaction, index_value: bytes | None) -> tuple[int, int]:
        """Of the chunk of an earlier put: how many pages it has, and how many bytes of its own."""
        if index_value is None:
            return 0, 0
        value = self._value(transaction, index_value)
        own = INDEX_VALUE.unpack(index_value)[0] >= self._first_sequence
        return chunkcodec.pages_of(value).bit_count(), len(value) if own else 0

    def _value(self, transaction: Transaction, index_value: bytes) -> memoryview:
        sequence, its_digest = INDEX_VALUE.unpack(index_value)
        value: memoryview | None = transaction.get(
            NUMBER.pack(sequence), db=self._environment.databases["chunks"]
        )
        if value is None or chunkcodec.digest_of(value) != its_digest:
            raise DamagedError(f"chunk {sequence} of the unfinished image {self.name} is lost")
        return value

    def _same(
        self, transaction: Transaction, space: int, address: int, digest: bytes
    ) -> int | None:
        """The sequence number of an equal chunk of the earlier image at the same address."""
        if self._earlier is None:
            return None
        found = self._index(transaction, INDEX_KEY.pack(self._earlier[0], space, address))
        if found is None:
            return None
        sequence, its_digest = INDEX_VALUE.unpack(found)
        return sequence if its_digest == digest else None

    def _index(self, transaction: Transaction, key: bytes) -> bytes | None:
        value = transaction.get(key, db=self._environment.databases["index"])
        return None if value is None else bytes(value)

    def _write(self, parts: list[list[_Pending]]) -> None:
        """Chunks and their index entries, in one transaction."""
        adds = sum(map(_on_disk, itertools.chain.from_iterable(parts)))
        self._environment.write(lambda transaction: self._store(transaction, parts), adds)
        faults.point("written")
        with self._counting:
            self._unwritten.difference_update(entry.key for part in parts for entry in part)

    def _store(self, transaction: Transaction, parts: list[list[_Pending]]) -> None:
        databases = self._environment.databases
        meta, chunks = databases["meta"], databases["chunks"]
        sequence = NUMBER.unpack(transaction.get(NEXT_SEQUENCE_KEY, db=meta))[0]
        values = []
        for entry in itertools.chain.from_iterable(parts):
            if entry.before is not None:
                self._discard(transaction, entry.before)
            if entry.content is None:
                transaction.delete(entry.key, db=databases["index"])
                continue
            at = entry.sequence
            if at is None:
                at = sequence
                values.append((NUMBER.pack(at), entry.value))
                sequence += 1
            where = INDEX_VALUE.pack(at, entry.content.digest)
            transaction.put(entry.key, where, db=databases["index"])
        if values:
            transaction.cursor(chunks).putmulti(values, append=True)
            transaction.put(NEXT_SEQUENCE_KEY, NUMBER.pack(sequence), db=meta)

    def _discard(self, transaction: Transaction, index_value: bytes) -> None:
        """The chunk of an earlier put, unless it belongs to an earlier image."""
        sequence = INDEX_VALUE.unpack(index_value)[0]
        if sequence >= self._first_sequence:
            transaction.delete(NUMBER.pack(sequence), db=self._environment.databases["chunks"])

    def commit(self, manifest: Manifest) -> None:
        """Makes the image visible: the one commit point. Durable when it returns.

        Raises StoreError when an image of the name exists by now; the caller aborts then.
        """
        if manifest.image != self.name:
            raise ValueError(f"a manifest of {manifest.image!r} for the image {self.name!r}")
        self._handoff.drain()
        faults.point("drained")
        data = manifests.encode(manifest)
        packed = zstandard.ZstdCompressor(level=3).compress(data)
        process = manifest.processes[0]
        record = ImageRecord(
            number=self.number,
            pid=process.pid,
            comm=process.comm,
            boot_id=manifest.host.boot_id,
            start_ticks=process.start_ticks,
            taken_at=manifest.taken_at,
            saved_bytes=self.saved_bytes,
            stored_bytes=self.stored_bytes,
            manifest=digest(data),
            manifest_bytes=len(packed),
            spaces=tuple(space.summary() for space in index.spaces(self._environment, self.number)),
        )
        key = self.name.encode()

        def work(transaction: Transaction) -> None:
            databases = self._environment.databases
            if not transaction.put(key, seal(key, record), db=databases["images"], overwrite=False):
                raise StoreError(f"an image named {self.name} exists", "snap list")
            number = NUMBER.pack(self.number)
            transaction.put(number, packed, db=databases["manifests"])
            transaction.delete(number, db=databases["takes"])
            faults.point("in-commit")

        self._environment.write(work, adds=len(packed))
        faults.point("committed")
        self._environment.sync()
        faults.point("synced")
        self._finish()

    def abort(self) -> None:
        """Removes what was put. Nothing happens after a commit or another abort."""
        if self._open:
            self._handoff.close()
            try:
                sweep.clear_take(self._environment, self.number, self._first_sequence)
            finally:
                self._finish()

    def _finish(self) -> None:
        self._handoff.close()
        self._open = False
        self._lease.release()
        if self._earlier:
            self._earlier[1].release()
        # The last reference closes the file, and the handoff, which holds us, would keep one.
        del self._environment

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.abort()
        except SnapError:
            if kind is None:
                raise
            # The first error says more; what is left here the next take removes.
