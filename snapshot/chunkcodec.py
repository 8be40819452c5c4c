"""One chunk of memory ⇄ the value that the store keeps of it. Pure.

docs/image-format.md says the same in words. A value is a header and a payload:

    present   u16   bit i: the page at i * 4 KiB belongs to the image
    nonzero   u16   bit i: its bytes are in the payload (a subset of present); else they are zeros
    codec     u8    0: the payload is those pages as they are; 1: one zstd frame of them; 5: a
                    delta (2: one without a checksum, of former times); 3, 4: as 0 and 1, behind a
                    table with a checksum for every four pages
    reserved  3 bytes, 0
    digest    16 bytes: BLAKE3 of the nonzero pages, keyed with the bitmaps

With codecs 3 and 4 a page can be had without the rest (native/blocks.h): a thread may wait for it.
They are what is written where the system's libzstd can do it, else 0 and 1 are.

The payload of a delta is a header and the pages that are its own, the other nonzero ones are those
of another value, its base, which is no delta:

    own       u16   bit i: the page is in this payload (a subset of nonzero)
    codec     u8    0 or 1, of the own pages
    reserved  5 bytes, 0
    check     u64   of these headers and the pages (native/delta.c)

All integers big endian. The pages are in ascending order.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import zstandard
from blake3 import blake3

from .errors import DamagedError
from .kernel._native import ffi, lib
from .units import ALL_PAGES, CHUNK, PAGE, PAGES_PER_CHUNK

HEADER = struct.Struct(">HHB3x16s")
DELTA_HEADER = struct.Struct(">HB5x")
MAX_BYTES = lib.SNAP_BLOCKS_HEADS + CHUNK
_RESERVED = slice(5, 8)
_DELTA_RESERVED = slice(3, 8)
_CODEC = 4
RAW, ZSTD, UNCHECKED_DELTA, RAW_BLOCKS, ZSTD_BLOCKS, DELTA = range(6)
_DELTAS = (DELTA, UNCHECKED_DELTA)
CHECK = struct.Struct(">Q")
_IN_BLOCKS = {RAW_BLOCKS: RAW, ZSTD_BLOCKS: ZSTD}
MOST_OWN = PAGES_PER_CHUNK // 2
"""Pages of a delta: a chunk of which more are other than those of its base is stored whole, so that
it does not keep two values in the store for long, and is a base itself."""
DIGEST_BYTES = 16
LEVEL = -2
"""zstd level: 15 % faster than -1 for 7 % more bytes, which pays for hashing and writing; those
beyond are not faster (docs/decisions/0016-level-and-groups.md)."""
GROUP = 16
"""Chunks to be examined and encoded together: 1 MiB, which is still in the cache of the processor
when it is compressed after it was hashed."""

_DIGEST_KEY = struct.Struct(">HH28x")
"""The bitmaps are the key and not a prefix: hashing 64 KiB at an odd offset costs half as much
again."""
_FULL_KEY = _DIGEST_KEY.pack(ALL_PAGES, ALL_PAGES)
_ZERO_CHUNK = bytes(CHUNK)
_PAGES = tuple(slice(start, start + PAGE) for start in range(0, CHUNK, PAGE))
Bytes = bytes | bytearray | memoryview


class _Contexts(threading.local):
    """One of each for each thread: a zstd context must not be shared."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True)
        self.decompressor = zstandard.ZstdDecompressor()

    @cached_property
    def blocks(self) -> Any:
        """NULL: there is no libzstd that can compress in blocks."""
        made = lib.snap_blocks_new()
        return made and ffi.gc(made, lib.snap_blocks_free)

    @cached_property
    def room(self) -> Any:
        """For what `snap_blocks_encode` writes, and the lengths."""
        return ffi.new("char[]", GROUP * MAX_BYTES), ffi.new("uint32_t[]", GROUP)


_contexts = _Contexts()


class Chunk(NamedTuple):
    """64 KiB of an image. Pages that are not present are zeros in `data`."""

    present: int  # bit i: the page at i * PAGE belongs to the image
    data: bytes  # CHUNK bytes
    nonzero: int  # bit i: the page at i * PAGE holds anything but zeros


class Content(NamedTuple):
    """What a chunk holds, before it is compressed."""

    present: int
    nonzero: int
    digest: bytes
    payload: Bytes  # the nonzero pages in order; of a delta its own
    noise: bool  # not worth the attempt to compress it
    own: int | None = None
    """A delta: bit i: the page is in the payload; the other nonzero ones are those of its base."""


def examine(present: int, data: memoryview) -> Content:
    """Finds the nonzero pages among `present` of the CHUNK bytes of `data` and their digest."""
    found = lib.snap_content(ffi.from_buffer(data), present)
    nonzero = found & ALL_PAGES
    payload: Bytes = data
    if nonzero != ALL_PAGES:
        payload = _gathered(nonzero, data)
    noise = found != nonzero
    return Content(present, nonzero, _digest(present, nonzero, payload), payload, noise)


def patched(chunk: Chunk, present: int, patch: int, data: memoryview) -> Content:
    """The pages `present`: those in `patch` from the CHUNK bytes of `data`, the others of `chunk`.

    ValueError when `chunk` lacks one of them."""
    if present & ~patch & ~chunk.present:
        raise ValueError(f"pages {present & ~patch & ~chunk.present:#06x} are nowhere")
    return examine(present, memoryview(_overlaid(chunk.data, patch, data)))


def against(content: Content, base: Chunk) -> Content | None:
    """The same as a delta against `base`; None when it is to be stored whole."""
    data = content.payload
    if content.nonzero != ALL_PAGES:
        data = _spread(content.nonzero, bytes(data))
    differ = lib.snap_differing(ffi.from_buffer(data), ffi.from_buffer(base.data))
    own = differ & content.nonzero
    if own.bit_count() > MOST_OWN:
        return None
    return content._replace(payload=_gathered(own, data), own=own)


def encode(contents: Sequence[Content]) -> list[bytes]:
    """The values of many chunks at once: zstd with the GIL released for all of them together."""
    whole = [content for content in contents if content.own is None]
    if not whole or not _contexts.blocks:
        return _encoded(contents)
    values = chain.from_iterable(
        _in_blocks(whole[at : at + GROUP]) for at in range(0, len(whole), GROUP)
    )
    others = iter(_encoded([content for content in contents if content.own is not None]))
    return [next(values if content.own is None else others) for content in contents]


def _in_blocks(contents: Sequence[Content]) -> Iterator[bytes]:
    room, lengths = _contexts.room
    payloads = [ffi.from_buffer(content.payload) for content in contents]
    error = lib.snap_blocks_encode(
        _contexts.blocks,
        len(contents),
        b"".join([_head(content, RAW_BLOCKS) for content in contents]),
        payloads,
        [len(content.payload) for content in contents],
        bytes(content.noise for content in contents),
        LEVEL,
        room,
        lengths,
    )
    if error:
        raise ValueError("the payload of a chunk is not its nonzero pages")
    at = 0
    for index in range(len(contents)):
        yield ffi.buffer(room + at, lengths[index])[:]
        at += lengths[index]


def _encoded(contents: Sequence[Content]) -> list[bytes]:
    """Without blocks."""
    full = [content.payload for content in contents if content.payload and not content.noise]
    frames = iter(_contexts.compressor.multi_compress_to_buffer(full) if full else ())
    return [
        _raw(content) if content.noise or not content.payload else _packed(content, next(frames))
        for content in contents
    ]


def digest_of(value: Bytes) -> bytes:
    """The digest that a value says it has, unchecked."""
    _, _, _, digest = _header(value)
    return digest


def pages_of(value: Bytes) -> int:
    """The bitmap of the pages that it says belong to the image."""
    present, _, _, _ = _header(value)
    return present


def is_delta(value: Bytes) -> bool:
    """Whether it takes another value, its base, to decode it."""
    return len(value) > _CODEC and value[_CODEC] in _DELTAS


def decode(value: Bytes, base: Bytes | None = None) -> tuple[Chunk, bytes]:
    """The chunk and its digest, verified. DamagedError when the value is not what was written.
    `base`: of a delta, the value that it was made against."""
    present, nonzero, codec, digest = _header(value)
    payload = (
        _merged(value, nonzero, codec, base)
        if codec in _DELTAS
        else _whole(value, nonzero, codec, digest)
    )
    if _digest(present, nonzero, payload) != digest:
        raise DamagedError("the content does not match its checksum")
    return Chunk(present, _spread(nonzero, payload), nonzero), digest


def decode_base(value: Bytes) -> Chunk:
    """What a value that is no delta holds, unverified: what is made of it has its own digest."""
    present, nonzero, codec, digest = _header(value)
    return Chunk(present, _spread(nonzero, _whole(value, nonzero, codec, digest)), nonzero)


def _whole(value: Bytes, nonzero: int, codec: int, digest: bytes) -> bytes:
    """The nonzero pages of a value that is no delta; the others are what its header says."""
    heads = HEADER.size
    if codec in _IN_BLOCKS:
        heads = lib.snap_blocks_heads(ffi.from_buffer(value), len(value), digest)
        if not heads:
            raise DamagedError("the table of its blocks does not match its checksum")
        codec = _IN_BLOCKS[codec]
    return _payload(codec, value[heads:], nonzero.bit_count() * PAGE)


def _merged(value: Bytes, nonzero: int, codec: int, base: Bytes | None) -> bytes:
    """The nonzero pages of a delta."""
    heads = HEADER.size + DELTA_HEADER.size
    if base is None:
        raise DamagedError("a delta without its base")
    if len(value) < heads + CHECK.size * (codec == DELTA):
        raise DamagedError(f"a delta of {len(value)} bytes")
    own, inner = DELTA_HEADER.unpack_from(value, HEADER.size)
    reserved = value[HEADER.size :][_DELTA_RESERVED]
    if reserved != bytes(5) or own & ~nonzero or inner not in (RAW, ZSTD):
        raise DamagedError(f"a delta of the pages {own:#06x} among {nonzero:#06x}, codec {inner}")
    stored = value[heads:]
    if codec == DELTA:
        (check,), stored = CHECK.unpack_from(stored), stored[CHECK.size :]
        if check != _check(value[:heads], stored):
            raise DamagedError("a delta does not match its checksum")
    payload = _payload(inner, stored, own.bit_count() * PAGE)
    return _gathered(nonzero, _overlaid(decode_base(base).data, own, _spread(own, payload)))


def _check(heads: Bytes, payload: Bytes) -> int:
    """Of a delta."""
    found = lib.snap_delta_check(ffi.from_buffer(heads), ffi.from_buffer(payload), len(payload))
    return int(found)


def _digest(present: int, nonzero: int, payload: Bytes) -> bytes:
    key = _FULL_KEY if nonzero == ALL_PAGES else _DIGEST_KEY.pack(present, nonzero)
    return blake3(payload, key=key).digest(DIGEST_BYTES)


def _packed(content: Content, frame: Any) -> bytes:
    """`frame` is a zstandard.BufferSegment."""
    if len(frame) >= len(content.payload):
        return _raw(content)
    return _value(content, ZSTD, frame)


def _raw(content: Content) -> bytes:
    return _value(content, RAW, content.payload)


def _value(content: Content, codec: int, payload: Any) -> bytes:
    if content.own is None:
        return b"".join((_head(content, codec), payload))
    heads = _head(content, DELTA) + DELTA_HEADER.pack(content.own, codec)
    return b"".join((heads, CHECK.pack(_check(heads, payload)), payload))


def _head(content: Content, codec: int) -> bytes:
    return HEADER.pack(content.present, content.nonzero, codec, content.digest)


def _header(value: Bytes) -> tuple[int, int, int, bytes]:
    if not HEADER.size <= len(value) <= MAX_BYTES:  # before a byte is touched: LMDB's word only
        raise DamagedError(f"a chunk of {len(value)} bytes")
    present, nonzero, codec, digest = HEADER.unpack_from(value)
    if value[_RESERVED] != b"\0\0\0":
        raise DamagedError(f"reserved bytes that are not zero: {bytes(value[_RESERVED]).hex()}")
    if nonzero & ~present:
        raise DamagedError(f"pages {nonzero & ~present:#06x} are filled but not present")
    return present, nonzero, codec, digest


def _payload(codec: int, stored: Bytes, size: int) -> bytes:
    """`size` bytes, or DamagedError: a frame that says or gives more is never unpacked."""
    if codec == RAW:
        payload = bytes(stored)
    elif codec == ZSTD:
        try:
            said = zstandard.frame_content_size(stored)
            if said != size:
                raise DamagedError(f"a frame of {said} bytes where {size} belong")
            payload = _contexts.decompressor.decompress(stored, max_output_size=size)
        except zstandard.ZstdError as error:
            raise DamagedError(f"not a zstd frame: {error}") from None
    else:
        raise DamagedError(f"unknown codec {codec}")
    if len(payload) != size:
        raise DamagedError(f"{len(payload)} bytes of pages where {size} belong")
    return payload


def _overlaid(under: bytes, pages: int, over: Bytes) -> bytearray:
    """`under` with those pages of `over`; all three of CHUNK bytes."""
    data = bytearray(under)
    for page, where in enumerate(_PAGES):
        if pages >> page & 1:
            data[where] = over[where]
    return data


def _gathered(pages: int, data: Bytes) -> bytes:
    """Those pages of CHUNK bytes, one after the other: what `_spread` undoes."""
    return b"".join([data[where] for page, where in enumerate(_PAGES) if pages >> page & 1])


def _spread(nonzero: int, payload: bytes) -> bytes:
    """The pages of `payload` at their places, zeros between them."""
    if nonzero == ALL_PAGES:
        return payload
    if nonzero == 0:
        return _ZERO_CHUNK
    data = bytearray(CHUNK)
    taken = 0
    for page, where in enumerate(_PAGES):
        if nonzero >> page & 1:
            data[where] = payload[taken : taken + PAGE]
            taken += PAGE
    return bytes(data)
