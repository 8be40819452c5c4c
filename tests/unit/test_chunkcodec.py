"""Chunk values: they come back as they were, or are refused."""

from __future__ import annotations

import base64
import struct
from random import Random
from types import SimpleNamespace

import pytest
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from snapshot.kernel._native import lib

from snapshot import chunkcodec
from snapshot.chunkcodec import (
    CHECK,
    DELTA,
    DELTA_HEADER,
    HEADER,
    MOST_OWN,
    RAW,
    RAW_BLOCKS,
    UNCHECKED_DELTA,
    ZSTD,
    Chunk,
)
from snapshot.errors import DamagedError
from snapshot.units import ALL_PAGES, CHUNK, PAGE, PAGES_PER_CHUNK

unhurried = settings(deadline=None, max_examples=50)  # 64 KiB take a while to draw
bitmaps = st.integers(0, ALL_PAGES)
kinds = st.lists(st.integers(0, 3), min_size=PAGES_PER_CHUNK, max_size=PAGES_PER_CHUNK)


@st.composite
def drawn(draw: st.DrawFn) -> bytes:
    """A chunk of zero pages, pages with one byte, text and noise: few draws for 64 KiB."""
    random = Random(draw(st.integers(0, 1 << 32)))
    makers = (
        lambda: bytes(PAGE),
        lambda: random.randrange(PAGE).to_bytes(2, "big").rjust(PAGE, b"\0"),
        lambda: (random.randbytes(9) * PAGE)[:PAGE],
        lambda: random.randbytes(PAGE),
    )
    return b"".join(makers[kind]() for kind in draw(kinds))


chunks = drawn()
COMPRESSOR = zstandard.ZstdCompressor(level=chunkcodec.LEVEL)


def masked(data: bytes, present: int) -> bytes:
    parts = [
        data[i * PAGE : (i + 1) * PAGE] if present >> i & 1 else bytes(PAGE)
        for i in range(PAGES_PER_CHUNK)
    ]
    return b"".join(parts)


def value_of(data: bytes, present: int = ALL_PAGES) -> bytes:
    return chunkcodec.encode([chunkcodec.examine(present, memoryview(data))])[0]


@unhurried
@given(chunks, bitmaps)
def test_round_trip(data: bytes, present: int) -> None:
    value = value_of(data, present)
    chunk, digest = chunkcodec.decode(value)
    assert chunk.present == present
    assert chunk.data == masked(data, present)
    assert digest == chunkcodec.digest_of(value)
    for page in range(PAGES_PER_CHUNK):
        filled = any(chunk.data[page * PAGE : (page + 1) * PAGE])
        assert filled == bool(chunk.nonzero >> page & 1)


@unhurried
@given(st.lists(st.tuples(chunks, bitmaps), max_size=4))
def test_many_at_once(some: list[tuple[bytes, int]]) -> None:
    contents = [chunkcodec.examine(present, memoryview(data)) for data, present in some]
    values = chunkcodec.encode(contents)
    assert values == [value_of(data, present) for data, present in some]


@unhurried
@given(chunks, bitmaps)
def test_a_value_tells_its_pages(data: bytes, present: int) -> None:
    assert chunkcodec.pages_of(value_of(data, present)) == present


@unhurried
@given(chunks, bitmaps, st.data())
def test_any_flipped_bit_is_noticed(data: bytes, present: int, draw: st.DataObject) -> None:
    value = bytearray(value_of(data, present))
    at = draw.draw(st.integers(0, len(value) - 1))
    value[at] ^= 1 << draw.draw(st.integers(0, 7))
    try:
        chunk, _ = chunkcodec.decode(bytes(value))
    except DamagedError:
        return
    assert chunk.data == masked(data, present), "zstd has bits that mean nothing; never other bytes"
    assert chunk.present == present


@given(st.binary(max_size=300))
def test_anything_else_is_refused(value: bytes) -> None:
    with pytest.raises(DamagedError):
        chunkcodec.decode(value)


@pytest.mark.parametrize("said", [True, False])
def test_a_bomb_is_not_unpacked(said: bool) -> None:
    """64 MiB of zeros in 2 KiB, whether or not the frame says its size."""
    frame = zstandard.ZstdCompressor(write_content_size=said).compress(bytes(64 << 20))
    value = HEADER.pack(1, 1, ZSTD, bytes(16)) + frame
    with pytest.raises(DamagedError, match=r"bytes where 4096 belong|not a zstd frame"):
        chunkcodec.decode(value)


@st.composite
def related(draw: st.DrawFn) -> tuple[bytes, int, bytes, int]:
    """A chunk, and one that has some of its pages."""
    base, other = draw(chunks), draw(chunks)
    changed = draw(bitmaps) & draw(bitmaps)
    pages = [(base, other)[changed >> i & 1][i * PAGE :][:PAGE] for i in range(PAGES_PER_CHUNK)]
    return base, draw(bitmaps), b"".join(pages), draw(bitmaps)


def delta_of(data: bytes, present: int, base: bytes) -> bytes | None:
    content = chunkcodec.examine(present, memoryview(data))
    delta = chunkcodec.against(content, chunkcodec.decode_base(base))
    return chunkcodec.encode([delta])[0] if delta else None


@unhurried
@given(related())
def test_deltas(some: tuple[bytes, int, bytes, int]) -> None:
    """The same chunk with the same digest, in few bytes where few pages differ."""
    base_data, base_present, data, present = some
    base = value_of(base_data, base_present)
    before, after = masked(base_data, base_present), masked(data, present)
    differ = sum(
        before[at : at + PAGE] != after[at : at + PAGE] != bytes(PAGE)
        for at in range(0, CHUNK, PAGE)
    )
    value = delta_of(data, present, base)
    assert (value is None) == (differ > MOST_OWN)
    if value is None:
        return
    assert chunkcodec.is_delta(value)
    assert not chunkcodec.is_delta(base)
    assert len(value) <= HEADER.size + DELTA_HEADER.size + CHECK.size + differ * PAGE
    assert chunkcodec.decode(value, base) == chunkcodec.decode(value_of(data, present))
    assert chunkcodec.pages_of(value) == present


@unhurried
@given(related(), st.data())
def test_any_flipped_bit_of_a_delta_or_its_base_is_noticed(
    some: tuple[bytes, int, bytes, int], draw: st.DataObject
) -> None:
    base = value_of(*some[:2])
    value = delta_of(*some[2:], base)
    assume(value is not None)
    assert value is not None
    both = [bytearray(value), bytearray(base)]
    one = both[draw.draw(st.integers(0, 1))]
    at = draw.draw(st.integers(0, len(one) - 1))
    one[at] ^= 1 << draw.draw(st.integers(0, 7))
    try:
        chunk, _ = chunkcodec.decode(bytes(both[0]), bytes(both[1]))
    except DamagedError:
        return
    assert (chunk.data, chunk.present) == (masked(*some[2:]), some[3])


def test_a_delta_takes_a_base_that_is_none() -> None:
    """None at all, a delta, or another chunk."""
    data = bytes(PAGE) + b"\xaa" * (CHUNK - PAGE)
    base = value_of(b"\xaa" * CHUNK)
    value = delta_of(b"\xbb" * PAGE + data[PAGE:], ALL_PAGES, base)
    assert value
    for wrong, reason in (
        (None, "without its base"),
        (value, "unknown codec 5"),
        (value_of(data[:-1] + b"\0"), "does not match"),
        (b"", "a chunk of 0 bytes"),
    ):
        with pytest.raises(DamagedError, match=reason):
            chunkcodec.decode(value, wrong)
    for stored in (b"\0", DELTA_HEADER.pack(1, DELTA), DELTA_HEADER.pack(2, RAW) + bytes(PAGE)):
        for codec in (DELTA, UNCHECKED_DELTA):
            with pytest.raises(DamagedError, match="a delta of"):
                chunkcodec.decode(HEADER.pack(1, 1, codec, bytes(16)) + stored, base)


def test_a_delta_of_former_times_is_read() -> None:
    base = value_of(b"\xaa" * CHUNK)
    value = delta_of(b"\xbb" * PAGE + b"\xaa" * (CHUNK - PAGE), ALL_PAGES, base)
    assert value
    heads = HEADER.size + DELTA_HEADER.size
    present, nonzero, _, digest = HEADER.unpack_from(value)
    former = HEADER.pack(present, nonzero, UNCHECKED_DELTA, digest)
    former += value[HEADER.size : heads] + value[heads + CHECK.size :]
    assert chunkcodec.is_delta(former)
    assert chunkcodec.decode(former, base) == chunkcodec.decode(value, base)


def test_zeros_have_no_payload() -> None:
    value = value_of(bytes(CHUNK))
    assert len(value) == HEADER.size + 8  # its check
    assert chunkcodec.decode(value)[0] == Chunk(ALL_PAGES, bytes(CHUNK), 0)


def test_what_does_not_shrink_is_stored_raw() -> None:
    data = b"".join(struct.pack(">Q", i * 0x9E3779B97F4A7C15 % 2**64) for i in range(CHUNK // 8))
    value = value_of(data)
    assert value[4] == RAW_BLOCKS
    assert value[lib.SNAP_BLOCKS_HEADS :] == data


@pytest.mark.parametrize("pages", [1, 2, 5, 16])
def test_noise_is_not_compressed_and_all_else_is(pages: int) -> None:
    """Doubles, small integers, base64: their bytes are not all equally often."""
    random, size = Random(4711), pages * PAGE
    rest = bytes(CHUNK - size)
    for seed in range(20):
        noise = Random(seed).randbytes(size) + rest
        assert chunkcodec.examine(ALL_PAGES, memoryview(noise)).noise
    doubles = struct.pack(f"{size // 8}d", *(random.random() for _ in range(size // 8)))
    numbers = struct.pack(f"{size // 4}I", *(random.randrange(1 << 24) for _ in range(size // 4)))
    letters = base64.b64encode(random.randbytes(size))[:size]
    for data in (doubles, numbers, letters, letters[: size // 2] + noise[: size // 2]):
        assert not chunkcodec.examine(ALL_PAGES, memoryview(data + rest)).noise


@unhurried
@given(chunks, bitmaps)
def test_without_blocks(data: bytes, present: int) -> None:
    """Where no libzstd can do them; and what was stored before there were any."""
    content = chunkcodec.examine(present, memoryview(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunkcodec, "_contexts", SimpleNamespace(blocks=None, compressor=COMPRESSOR))
        (value,) = chunkcodec.encode([content])
    assert value[4] in (RAW, ZSTD)
    assert chunkcodec.decode(value) == chunkcodec.decode(value_of(data, present))


@unhurried
@given(chunks, st.integers(0, 10_000), st.integers(0, 7))
def test_a_table_that_is_damaged_is_noticed(data: bytes, at: int, bit: int) -> None:
    """Though it is not needed to decode all of the chunk."""
    value = bytearray(value_of(data))
    heads = lib.snap_blocks_heads(bytes(value), len(value), chunkcodec.digest_of(value))
    assert heads > HEADER.size
    value[HEADER.size + at % (heads - HEADER.size)] ^= 1 << bit
    with pytest.raises(DamagedError, match="the table of its blocks"):
        chunkcodec.decode(bytes(value))


def test_pages_that_are_not_meant_do_not_count() -> None:
    noise = b"\xaa" * CHUNK
    assert value_of(noise, 0b101) == value_of(masked(noise, 0b101), 0b101)


def test_filled_but_not_present() -> None:
    with pytest.raises(DamagedError, match="pages 0x0002 are filled but not present"):
        chunkcodec.decode(HEADER.pack(1, 2, RAW, bytes(16)))


@pytest.mark.parametrize("at", [5, 6, 7])
def test_reserved_bytes_are_zero(at: int) -> None:
    """No checksum covers them, so a flipped bit would go unseen."""
    value = bytearray(value_of(b"\xaa" * CHUNK))
    value[at] ^= 1
    with pytest.raises(DamagedError, match="reserved bytes"):
        chunkcodec.decode(bytes(value))
