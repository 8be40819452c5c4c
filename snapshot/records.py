"""Keys and small records of the store ⇄ bytes; docs/image-format.md says the same in words. Pure.

Integers in keys and values are big endian, so that LMDB's byte order is the numeric one.
"""

from __future__ import annotations

import struct
from typing import NamedTuple, TypeVar

import msgspec
from blake3 import blake3

from .chunkcodec import DIGEST_BYTES, Bytes
from .errors import DamagedError
from .manifest import Record
from .units import CHUNK

FORMAT = b"livesnap store 4"
EARLIER = (b"livesnap store 1", b"livesnap store 2", b"livesnap store 3")
"""Without deltas, without blocks, with deltas that have no checksum. They are read, and become one
of the newer format with the next take."""
FORMAT_KEY, NEXT_SEQUENCE_KEY, NEXT_IMAGE_KEY = b"format", b"next sequence", b"next image"

NUMBER = struct.Struct(">Q")
"""An image's number, a chunk's sequence number: counted up, never used twice."""
INDEX_KEY = struct.Struct(">QIQ")  # image number, space, chunk address
INDEX_VALUE = struct.Struct(f">Q{DIGEST_BYTES}s")  # sequence number, digest of the content
BASES = 1 << 31
"""A space of no process and no object: the bases of the deltas among an image's chunks. It keeps
them in the store for as long as the image is there."""
INDEX_ENTRY = struct.Struct(f">QQ{DIGEST_BYTES}s")
"""Chunk address and index value: what the digest of a space is made of."""


def base_address(delta: int) -> int:
    """Where BASES has the base of the delta with this sequence number (below 2 ** 47)."""
    return delta * CHUNK


_YEAR_9999 = 253_402_300_800
MAX_RECORD = 4 * 1024 * 1024
"""Bytes of a sealed record: less than the reserve at the file's end (environment.RESERVE)."""

R = TypeVar("R", bound=Record)


class ProcessIdentity(NamedTuple):
    """One process among all that ever ran."""

    boot_id: str
    pid: int
    start_ticks: int


class SpaceSummary(Record, frozen=True):
    """What the index must hold of one space, so that no entry can be lost or changed unseen."""

    space: int
    chunks: int
    digest: bytes  # BLAKE3-128 of (address, sequence number, content digest) of each, in order


class ImageRecord(Record, frozen=True):
    """The value of `images`, by name: the image exists when it does."""

    number: int
    pid: int
    comm: bytes
    boot_id: str
    start_ticks: int
    taken_at: float
    saved_bytes: int
    stored_bytes: int
    manifest: bytes  # BLAKE3-128 of the manifest's bytes
    manifest_bytes: int  # of its zstd frame
    spaces: tuple[SpaceSummary, ...]

    @property
    def identity(self) -> ProcessIdentity:
        return ProcessIdentity(self.boot_id, self.pid, self.start_ticks)


class TakeRecord(Record, frozen=True):
    """The value of `takes`, by image number: a take that goes on or died, or an image that was
    removed. Its index entries are rubbish as soon as nobody holds its lease."""

    name: str
    pid: int
    first_sequence: int  # chunks from here on that it names are its own and no other image's
    removed: bool = False


def digest(*parts: Bytes) -> bytes:
    hasher = blake3()
    for part in parts:
        hasher.update(part)
    return hasher.digest(DIGEST_BYTES)


def seal(key: bytes, record: Record) -> bytes:
    """BLAKE3-128 of key and record, then the record as msgpack."""
    body = msgspec.msgpack.encode(record)
    return digest(key, body) + body


def unseal(key: bytes, value: Bytes, kind: type[R]) -> R:
    """The inverse of `seal`; DamagedError when value or key are not what was sealed."""
    if len(value) > MAX_RECORD:  # before a byte is touched: a damaged page may say anything
        raise DamagedError(f"the record of {key!r} has {len(value)} bytes")
    body = bytes(value[DIGEST_BYTES:])
    if digest(key, body) != value[:DIGEST_BYTES]:
        raise DamagedError(f"the record of {key!r} does not match its checksum")
    try:
        record = msgspec.msgpack.decode(body, type=kind)
        if isinstance(record, ImageRecord):
            _check(record)
        return record
    except (ValueError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DamagedError(f"the record of {key!r}: {error}") from None


def _check(record: ImageRecord) -> None:
    """ValueError for what `commit` cannot have written: a seal does not say by whom it was made."""
    counts = (record.number, record.saved_bytes, record.stored_bytes, record.manifest_bytes)
    if not all(0 <= count < 1 << 64 for count in (*counts, record.start_ticks)):
        raise ValueError(f"numbers {counts}")
    if not 0 <= record.taken_at < _YEAR_9999:  # nor NaN
        raise ValueError(f"taken at {record.taken_at}")
    before = -1
    for one in record.spaces:
        if not before < one.space < 1 << 32 or not 0 <= one.chunks < 1 << 48:
            raise ValueError(f"space {one.space} with {one.chunks} chunks")
        before = one.space
