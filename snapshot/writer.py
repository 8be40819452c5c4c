"""Writing one image into a store: nothing of it is visible before `commit`."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import NamedTuple

import zstandard

from . import chunkcodec, faults, index, sweep
from . import manifest as manifests
from .chunkcodec import Chunk, Content
from .environment import Environment, Transaction
from .errors import DamagedError, SnapError, StoreError
from .handoff import Handoff
from .known import Known
from .lease import Lease
from .manifest import Manifest
from .records import (
    BASES,
    INDEX_KEY,
    INDEX_VALUE,
    NEXT_SEQUENCE_KEY,
    NUMBER,
    ImageRecord,
    base_address,
    digest,
    seal,
)
from .units import CHUNK, MIB, PAGE, align_up

BATCH = 64
"""Chunks that are handed to the disk together: 4 MiB of memory."""
_WAITING = 8 * MIB
"""Bytes on the disk that may wait for the disk: they become one transaction, which on a fast disk
has one batch or two (larger ones are slower), on a slow one as many as a sync is worth. As many are
on their way there meanwhile, once as values and once as pages of LMDB."""


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


class Earlier(NamedTuple):
    """An image of the same process, which has what its successor shares with it."""

    number: int
    lease: Lease
    deltas: bool
    """Some of its chunks are."""


class _Pending(NamedTuple):
    """A chunk on its way: what the index says of it now, and what it will say."""

    key: bytes
    drops: tuple[bytes, ...]  # index values of what an earlier put of this image needed, and it not
    delta: bytes | None  # key of the base of the delta that the earlier put was
    sequence: int | None  # of an equal chunk of an earlier image
    value: bytes | None  # what goes into `chunks` otherwise
    digest: bytes | None  # of the content; None: the chunk is taken out
    base: bytes | None  # index value of the chunk that it is a delta against


class _Old(NamedTuple):
    """A chunk of an earlier put."""

    where: bytes  # index value
    value: bytes
    base: bytes | None  # index value of the chunk that it is a delta against,
    base_value: bytes | None  # … and that chunk
    chunk: Chunk | None  # what it holds, if it is patched now


class _Match(NamedTuple):
    """The chunk that the earlier image has at the address of another."""

    sequence: int
    digest: bytes
    base: bytes | None  # index value of the chunk that it is a delta against


class _Choice(NamedTuple):
    """How a chunk gets into the image."""

    fresh: Content | None  # what is stored for it, a delta where few pages differ from another
    sequence: int | None  # its match, where it is equal
    base: bytes | None  # as in _Pending


def _sequence(where: bytes) -> int:
    """Of the chunk that an index value names."""
    sequence: int = INDEX_VALUE.unpack(where)[0]
    return sequence


def _patched(chunk: RawChunk, old: _Old | None) -> _Old | None:
    """The earlier put that a patch leaves where it is, as a base: to read and to write the whole
    chunk again takes longer. Not so one that takes no more than a page itself."""
    if chunk.patch is None or old is None or len(old.base_value or old.value) <= PAGE:
        return None
    return old


def _base_key(number: int, delta: int) -> bytes:
    """Where the index of an image has the base of the delta with this sequence number."""
    return INDEX_KEY.pack(number, BASES, base_address(delta))


def _on_disk(entry: _Pending) -> int:
    """About the bytes that LMDB takes for a chunk and its index entry: larger values have pages of
    their own."""
    size = len(entry.value or b"")
    return 100 + (60 if entry.base else 0) + (size if size < _INLINE else align_up(size + 16, PAGE))


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
        earlier: Earlier | None,
        around: AbstractContextManager[None] | None = None,
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
        self._known = Known()
        self._unwritten: set[bytes] = set()  # keys that were put and are not in the index yet
        self._handoff = Handoff(self._write, _WAITING, around)
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

    def _put(self, part: dict[bytes, RawChunk]) -> None:
        ready: list[_Pending] = []
        chunks = iter(part.items())
        while group := dict(itertools.islice(chunks, chunkcodec.GROUP)):
            ready += self._encoded(group)
        with self._counting:
            self._unwritten.update(part)
        self._handoff.give(ready, sum(map(_on_disk, ready)))

    def _encoded(self, group: dict[bytes, RawChunk]) -> list[_Pending]:
        olds = self._olds(group)
        contents = [
            self._examined(chunk, olds.get(key)) if chunk.pages else None
            for key, chunk in group.items()
        ]
        choices = self._choices(group, contents, olds)
        values = iter(chunkcodec.encode([one.fresh for one in choices if one.fresh]))
        ready = []
        pages = stored = 0
        for key, content, choice in zip(group, contents, choices, strict=True):
            value = next(values) if choice.fresh else None
            old = olds.get(key)
            drops = self._dropped(old, choice) if old else ()
            ready.append(
                _Pending(
                    key,
                    drops,
                    _base_key(self.number, _sequence(old.where)) if old and old.base else None,
                    choice.sequence,
                    value,
                    content and content.digest,
                    choice.base,
                )
            )
            pages += content.present.bit_count() if content else 0
            stored += len(value or b"")
            if old:
                pages -= chunkcodec.pages_of(old.value).bit_count()
                stored -= len(old.value) if old.where in drops else 0
                stored -= len(old.base_value or b"") if old.base in drops else 0
        with self._counting:
            self.saved_bytes += pages * PAGE
            self.stored_bytes += stored
        return ready

    def _dropped(self, old: _Old, choice: _Choice) -> tuple[bytes, ...]:
        """What of an earlier put nothing needs now. What belongs to an earlier image stays."""
        needed = (old.where, old.base) if old.base else (old.where,)
        return tuple(
            one
            for one in needed
            if one != choice.base and _sequence(one) >= self._first_sequence
        )

    def _examined(self, chunk: RawChunk, old: _Old | None) -> Content:
        if len(chunk.data) != CHUNK or chunk.address % CHUNK:
            raise ValueError(f"not a chunk: {len(chunk.data)} bytes at {chunk.address:#x}")
        if chunk.patch is None:
            return chunkcodec.examine(chunk.pages, chunk.data)
        if old is None or old.chunk is None:
            raise ValueError(f"a patch of nothing at {chunk.address:#x}")
        return chunkcodec.patched(old.chunk, chunk.pages, chunk.patch, chunk.data)

    def _olds(self, group: dict[bytes, RawChunk]) -> dict[bytes, _Old]:
        """Those of the chunks that this image has been given before, and not lost since. Most were
        not, and then nothing is looked up."""
        with self._counting:
            again = [
                key for key, chunk in group.items() if self._known.add(chunk.space, chunk.address)
            ]
            unwritten = not self._unwritten.isdisjoint(again)
        if not again:
            return {}
        if unwritten:
            self._handoff.drain()
        olds = {}
        databases = self._environment.databases
        with self._environment.read(buffers=False) as transaction:
            for key, where in transaction.cursor(databases["index"]).getmulti(again):
                sequence, its_digest = INDEX_VALUE.unpack(where)
                value = transaction.get(NUMBER.pack(sequence), db=databases["chunks"])
                if value is None or chunkcodec.digest_of(value) != its_digest:
                    raise DamagedError(
                        f"chunk {sequence} of the unfinished image {self.name} is lost"
                    )
                base = base_value = None
                if chunkcodec.is_delta(value):
                    base = transaction.get(_base_key(self.number, sequence), db=databases["index"])
                    base_value = base and transaction.get(
                        base[: NUMBER.size], db=databases["chunks"]
                    )
                chunk = None
                if group[key].patch is not None:
                    chunk, _ = chunkcodec.decode(value, base_value)
                olds[key] = _Old(where, value, base, base_value, chunk)
        return olds

    def _choices(
        self,
        group: dict[bytes, RawChunk],
        contents: Sequence[Content | None],
        olds: dict[bytes, _Old],
    ) -> list[_Choice]:
        if self._earlier is None and not olds:
            return [_Choice(content, None, None) for content in contents]
        matches = self._matches(self._earlier, group.values()) if self._earlier else {}
        with self._environment.read() as transaction:
            return [
                self._choose(transaction, content, matches.get(key), _patched(chunk, olds.get(key)))
                for (key, chunk), content in zip(group.items(), contents, strict=True)
            ]

    def _matches(self, earlier: Earlier, chunks: Iterable[RawChunk]) -> dict[bytes, _Match]:
        """What the earlier image has at their addresses, by their keys."""
        keys = {
            INDEX_KEY.pack(earlier.number, one.space, one.address): INDEX_KEY.pack(
                self.number, one.space, one.address
            )
            for one in chunks
        }
        bases: dict[bytes, bytes] = {}
        with self._environment.read(buffers=False) as transaction:
            cursor = transaction.cursor(self._environment.databases["index"])
            found = {key: INDEX_VALUE.unpack(value) for key, value in cursor.getmulti(keys)}
            if earlier.deltas:
                deltas = [_base_key(earlier.number, sequence) for sequence, _ in found.values()]
                bases = dict(cursor.getmulti(deltas))
        return {
            keys[key]: _Match(sequence, its_digest, bases.get(_base_key(earlier.number, sequence)))
            for key, (sequence, its_digest) in found.items()
        }

    def _choose(
        self,
        transaction: Transaction,
        content: Content | None,
        match: _Match | None,
        patched: _Old | None,
    ) -> _Choice:
        """`patched`: the earlier put, if it may be a delta against that, or against its base."""
        if content is None:
            return _Choice(None, None, None)
        if match and match.digest == content.digest:
            return _Choice(None, match.sequence, match.base)
        bases: dict[bytes, Chunk | None] = {}
        if match:
            bases[match.base or INDEX_VALUE.pack(match.sequence, match.digest)] = None
        if patched:
            bases[patched.base or patched.where] = None if patched.base else patched.chunk
        for base, chunk in bases.items():
            delta = self._delta(transaction, content, base, chunk)
            if delta:
                return _Choice(delta, None, base)
        return _Choice(content, None, None)

    def _delta(
        self, transaction: Transaction, content: Content, base: bytes, chunk: Chunk | None
    ) -> Content | None:
        """`chunk`: what the base holds, if that is known. None: most of it is new, or what it would
        be a delta against is damaged."""
        if not content.payload:
            return None
        if chunk is None:
            value = transaction.get(base[: NUMBER.size], db=self._environment.databases["chunks"])
            with suppress(DamagedError):
                chunk = chunkcodec.decode_base(value) if value is not None else None
        return chunkcodec.against(content, chunk) if chunk else None

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
        values, entries = [], []
        for entry in itertools.chain.from_iterable(parts):
            for one in entry.drops:
                transaction.delete(one[: NUMBER.size], db=chunks)
            if entry.delta is not None:
                transaction.delete(entry.delta, db=databases["index"])
            if entry.digest is None:
                transaction.delete(entry.key, db=databases["index"])
                continue
            at = entry.sequence
            if at is None:
                at = sequence
                values.append((NUMBER.pack(at), entry.value))
                sequence += 1
            entries.append((entry.key, INDEX_VALUE.pack(at, entry.digest)))
            if entry.base is not None:
                entries.append((_base_key(self.number, at), entry.base))
        entries.sort()  # neighbours share a page
        transaction.cursor(databases["index"]).putmulti(entries)
        if values:
            transaction.cursor(chunks).putmulti(values, append=True)
            transaction.put(NEXT_SEQUENCE_KEY, NUMBER.pack(sequence), db=meta)

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
            self._earlier.lease.release()
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
