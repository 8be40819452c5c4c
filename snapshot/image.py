"""A read-only view of an image: address → bytes of T0.

Every byte that leaves is verified: a record seals the manifest's digest and, for each space, a
digest of its index; an index entry holds the digest of a chunk's content. What is damaged or lost
raises DamagedError, also where an entry is only missing (its memory would read as zeros).
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import zstandard

from . import chunkcodec, index, plausible, workingset
from . import manifest as manifests
from .chunkcodec import Bytes, Chunk
from .environment import Environment, Transaction, open_environment
from .errors import DamagedError, StoreError
from .kernel.stored import Places
from .lease import Lease
from .manifest import OBJECT_SPACE, Manifest, Mapping, Process, Thread
from .mappedfile import FileReader
from .records import BASES, NUMBER, ImageRecord, SpaceSummary, base_address, digest
from .units import CHUNK, PAGE, align_down

__all__ = ["Chunk", "Damage", "Image"]

_STREAM = 64
"""Chunks for one read transaction when many are read: 4 MiB of memory."""


class Damage(NamedTuple):
    """One thing that `verify` found."""

    image: str
    space: int | None  # a process index, or OBJECT_SPACE + id; None: the manifest, or the store
    address: int | None  # of a chunk; None: the index of the whole space
    reason: str

    def __str__(self) -> str:
        where = "manifest" if self.space is None else f"space {self.space}"
        if self.address is not None:
            where += f", {self.address:#x}"
        return f"{self.image}: {where}: {self.reason}"


class Image:
    """Made by `Store.image`. Until it is closed, nobody can remove the image.

    May be used from several threads. After a fork it is void: `again`, or open it again.
    """

    def __init__(
        self, environment: Environment, name: str, record: ImageRecord, lease: Lease
    ) -> None:
        self.name = name
        self._environment = environment
        self._record = record
        self._lease = lease
        self._summaries = {summary.space: summary for summary in record.spaces}
        self._spaces: dict[int, index.Space] = {}
        self._files: dict[int, FileReader] = {}

    @cached_property
    def manifest(self) -> Manifest:
        """DamagedError when it cannot be read or does not match its checksum."""
        with self._environment.read() as transaction:
            packed = transaction.get(
                NUMBER.pack(self._record.number), db=self._environment.databases["manifests"]
            )
            if packed is None:
                raise self._damaged("the manifest is missing")
            if len(packed) != self._record.manifest_bytes:
                raise self._damaged(f"the manifest has {len(packed)} bytes")
            data = self._unpack(packed)
        if digest(data) != self._record.manifest:
            raise self._damaged("the manifest does not match its checksum")
        manifest = manifests.decode(data)
        plausible.check(manifest)
        return manifest

    @property
    def mappings(self) -> tuple[Mapping, ...]:
        """Of the first process; `process(pid).mappings` for another."""
        return self.process().mappings

    @property
    def threads(self) -> tuple[Thread, ...]:
        """Of the first process, its leader first; `process(pid).threads` for another."""
        return self.process().threads

    def process(self, pid: int | None = None) -> Process:
        """The process with this pid, or the first; StoreError when there is none."""
        processes = self.manifest.processes
        for process in processes:
            if pid is None or process.pid == pid:
                return process
        known = ", ".join(str(process.pid) for process in processes)
        raise StoreError(
            f"image {self.name} has no process {pid}; it has {known}", f"snap show {self.name}"
        )

    def again(self) -> Image:
        """After a fork, in the child: the same image with a lease that the parent shares, indexes
        as they were verified, and its store opened anew."""
        environment = open_environment(self._environment.path, checked=True)
        opened = Image(environment, self.name, self._record, self._lease)
        opened._spaces = self._spaces
        return opened

    @property
    def descriptors(self) -> set[int]:
        """Those of this process that belong to it and its store, and are closed with them."""
        return {self._lease.handle, *self._environment.descriptors}

    @property
    def store_path(self) -> Path:
        """The directory of its store: with `name` it can be opened again, in another process."""
        return self._environment.path

    @property
    def lease_descriptor(self) -> int:
        """Nobody can remove the image while this is open anywhere."""
        return self._lease.handle

    @property
    def saved_bytes(self) -> int:
        return self._record.saved_bytes

    @property
    def stored_bytes(self) -> int:
        return self._record.stored_bytes

    def chunk(self, space: int, address: int) -> Chunk | None:
        """The chunk at a chunk address; None when no page of it is in the image."""
        entry = self._space(space).find(address)
        if entry is None:
            return None
        with self._environment.read() as transaction:
            return self._decode(transaction, space, entry)

    def addresses(self, space: int) -> Sequence[int]:
        """The addresses of all chunks of a space, ascending. Not to be changed."""
        return self._space(space).addresses

    def places(self, space: int) -> Places:
        """Where the values of its chunks lie, for kernel.stored: good until the image is
        closed."""
        found = self._space(space).places(self._environment)
        if BASES not in self._summaries:
            return found
        return found._replace(bases=self._space(BASES).places(self._environment))

    def touched(self, space: int) -> list[int]:
        """Chunks that restored processes waited for, the first first: a hint (workingset.py)."""
        return workingset.load(self._environment, self._record.number, space)

    def note_touched(self, space: int, chunks: Sequence[int]) -> None:
        """For the next restore. StoreError when it cannot be written."""
        workingset.save(self._environment, self._record.number, space, chunks)

    def chunks_in_order(self, space: int) -> Iterator[tuple[int, Chunk]]:
        """Address and chunk, in the order in which they lie in the store."""
        entries = sorted(self._space(space).entries(), key=lambda entry: entry.sequence)
        for start in range(0, len(entries), _STREAM):
            part = entries[start : start + _STREAM]
            with self._environment.read() as transaction:
                chunks = [self._decode(transaction, space, entry) for entry in part]
            yield from zip((entry.address for entry in part), chunks, strict=True)

    def read(self, address: int, length: int, pid: int | None = None) -> bytes:
        """Memory of T0, [address, address + length), of the first process or that with `pid`.

        StoreError when a part was not mapped, or lies in a file that has changed since.
        """
        process = self.process(pid)
        end = address + length
        parts = []
        while address < end:
            mapping = self._mapping(process, address)
            stop = min(end, mapping.end)
            parts.append(self._read_mapping(process, mapping, address, stop))
            address = stop
        return b"".join(parts)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> Iterator[Damage]:
        """Compares every byte with its checksum; yields what is damaged or missing.

        `progress` is called with the chunks checked and those to check.
        """
        try:
            self._environment.check()
        except DamagedError as error:
            yield Damage(self.name, None, None, error.message)
            return  # LMDB cannot be let at it
        try:
            _ = self.manifest
        except DamagedError as error:
            yield Damage(self.name, None, None, error.message)
        total = sum(summary.chunks for summary in self._record.spaces)
        done = 0
        with suppress(DamagedError):  # which is found again below
            self._space(BASES)
        for summary in self._record.spaces:
            for damage in self._verify_space(summary):
                if damage:
                    yield damage
                done += 1
                if progress and done % _STREAM == 0:
                    progress(done, total)
        if progress:
            progress(total, total)

    def _verify_space(self, summary: SpaceSummary) -> Iterator[Damage | None]:
        """The damage of each chunk of a space, or None when it is sound."""
        space = summary.space
        try:
            found = index.load(self._environment, self._record.number, space)
        except DamagedError as error:
            yield Damage(self.name, space, None, error.message)
            return
        if found.summary() != summary:
            reason = f"the index has {len(found)} chunks of {summary.chunks}, or changed ones"
            yield Damage(self.name, space, None, reason)
        if space == BASES:  # whoever decodes a delta decodes its base
            yield from [None] * len(found)
            return
        entries = list(found.entries())
        parts = [entries[at : at + _STREAM] for at in range(0, len(entries), _STREAM)]
        from concurrent.futures import ThreadPoolExecutor  # a restore needs none

        workers = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        try:
            for damages in workers.map(partial(self._verify_part, space), parts):
                yield from damages
        finally:
            workers.shutdown(cancel_futures=True)

    def _verify_part(self, space: int, entries: Sequence[index.Entry]) -> list[Damage | None]:
        """The damage of each, if any. zstd and BLAKE3 let other threads run meanwhile."""
        try:
            with self._environment.read() as transaction:
                for entry in entries:
                    self._decode(transaction, space, entry)
            return [None] * len(entries)
        except DamagedError:  # of one of them, or of a page that LMDB met: each by itself
            return [self._verify_chunk(space, entry) for entry in entries]

    def _verify_chunk(self, space: int, entry: index.Entry) -> Damage | None:
        try:
            with self._environment.read() as transaction:
                self._decode(transaction, space, entry)
        except DamagedError as error:
            return Damage(self.name, space, entry.address, error.message)
        return None

    def close(self) -> None:
        """Gives up the lease: the image may be removed from now on, and cannot be read here."""
        self._lease.release()
        self.__dict__.pop("_environment", None)

    def __getattr__(self, name: str) -> NoReturn:
        if name == "_environment":
            raise StoreError(f"the image {self.name} is closed", f"snap show {self.name}")
        raise AttributeError(name)

    def __enter__(self) -> Image:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _space(self, space: int) -> index.Space:
        """The index of a space, verified when it is first used."""
        found = self._spaces.get(space)
        if found is None:
            summary = self._summaries.get(space)
            found = index.load(self._environment, self._record.number, space, summary)
            if found.summary() != summary and (summary or len(found)):
                raise self._damaged(f"the index of space {space} does not match its checksum")
            self._spaces[space] = found
            if BASES in self._summaries:  # `_decode` is inside a transaction
                self._space(BASES)
        return found

    def _decode(self, transaction: Transaction, space: int, entry: index.Entry) -> Chunk:
        try:
            value = self._value(transaction, entry)
            if value is None:
                raise DamagedError("the chunk is missing")
            base = self._base(transaction, entry) if chunkcodec.is_delta(value) else None
            chunk, found = chunkcodec.decode(value, base)
            if found != entry.digest:
                raise DamagedError("another chunk is in its place")
        except DamagedError as error:
            where = f"space {space}, {entry.address:#x} (chunk {entry.sequence})"
            raise self._damaged(f"{where}: {error.message}") from None
        return chunk

    def _value(self, transaction: Transaction, entry: index.Entry) -> Bytes | None:
        found: Bytes | None = transaction.get(
            NUMBER.pack(entry.sequence), db=self._environment.databases["chunks"]
        )
        return found

    def _base(self, transaction: Transaction, delta: index.Entry) -> Bytes | None:
        bases = self._spaces.get(BASES)
        entry = None if bases is None else bases.find(base_address(delta.sequence))
        return None if entry is None else self._value(transaction, entry)

    def _read_mapping(self, process: Process, mapping: Mapping, start: int, end: int) -> bytes:
        """[start, end), which lies in `mapping`."""
        space, offset = process.index, 0
        if mapping.kind == "shared" and mapping.object is not None:
            space, offset = OBJECT_SPACE + mapping.object, mapping.offset - mapping.start
        parts = []
        while start < end:
            base = align_down(start + offset, CHUNK) - offset
            stop = min(end, base + CHUNK)
            chunk = self.chunk(space, base + offset)
            parts.append(self._read_chunk(mapping, chunk, base, start, stop))
            start = stop
        return b"".join(parts)

    def _read_chunk(
        self, mapping: Mapping, chunk: Chunk | None, base: int, start: int, end: int
    ) -> bytes:
        """[start, end) of the chunk whose first byte is, or would be, at `base`."""
        if mapping.kind in ("anon", "shared"):
            return chunk.data[start - base : end - base] if chunk else bytes(end - start)
        parts = []
        while start < end:
            page = (start - base) // PAGE
            stop = min(end, base + (page + 1) * PAGE)
            if chunk and chunk.present >> page & 1:
                parts.append(chunk.data[start - base : stop - base])
            elif mapping.kind == "file" and mapping.file is not None:
                offset = mapping.offset + start - mapping.start
                parts.append(self._file(mapping.file).read(offset, stop - start))
            else:
                raise StoreError(
                    f"{start:#x} is in {mapping.name.decode(errors='replace') or mapping.kind}, "
                    f"which image {self.name} does not hold",
                    f"snap show {self.name}",
                )
            start = stop
        return b"".join(parts)

    def _mapping(self, process: Process, address: int) -> Mapping:
        mappings = process.mappings
        position = bisect_right(mappings, address, key=lambda mapping: mapping.start)
        if position and address < mappings[position - 1].end:
            return mappings[position - 1]
        near = mappings[max(0, position - 1) : position + 1]
        nearest = min(near, key=lambda m: min(abs(m.start - address), abs(address - m.end)))
        raise StoreError(
            f"{address:#x} was not mapped in process {process.pid}; the nearest mapping is "
            f"{nearest.start:#x}-{nearest.end:#x} {nearest.name.decode(errors='replace')}".rstrip(),
            f"snap show {self.name}",
        )

    def _file(self, number: int) -> FileReader:
        if number not in self._files:
            record = next((file for file in self.manifest.files if file.id == number), None)
            if record is None:
                raise self._damaged(f"the manifest names file {number}, which it does not have")
            self._files[number] = FileReader(record)
        return self._files[number]

    def _unpack(self, packed: memoryview) -> bytes:
        try:
            said = zstandard.frame_content_size(packed)
            if not 0 <= said <= manifests.MAX_BYTES:
                raise self._damaged(f"the manifest is said to have {said} bytes")
            return zstandard.ZstdDecompressor().decompress(
                packed, max_output_size=said
            )
        except zstandard.ZstdError as error:
            raise self._damaged(f"the manifest is not a zstd frame: {error}") from None

    def _damaged(self, reason: str) -> DamagedError:
        return DamagedError(f"image {self.name}: {reason}", f"snap verify {self.name}")
