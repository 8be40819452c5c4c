"""Chunks read past LMDB are those that LMDB has, or are left to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from snapshot.image import Image
from snapshot.kernel.stored import Stored
from snapshot.records import NUMBER
from snapshot.store import ProcessIdentity, Store
from snapshot.units import CHUNK, PAGE
from snapshot.writer import RawChunk
from tests.unit.images import BASE, manifest, mapping, process

COUNT = 900
"""Enough for pages above the leaves, of which each holds some 90 chunks."""


def data_of(number: int, version: int = 0) -> bytes:
    """Every seventh is noise, every fifth zeros, and the others shrink."""
    if number % 5 == 0:
        return bytes(CHUNK)
    if number % 7 == 0:
        return Random(number + 10_000 * version).randbytes(CHUNK)
    size = 40 if number % 2 else 400  # values that lie beside their key, and others
    words = [Random(number * 16 + page).randbytes(size) * (PAGE // size) for page in range(15)]
    return b"".join(word.ljust(PAGE, b".") for word in [b"%d" % version, *words])


def take(store: Store, name: str, version: int) -> None:
    """Of a process of which every third chunk is another in each version."""
    writer = store.begin(name, ProcessIdentity("boot", 100, 5))
    for number in range(COUNT):
        if number % 50 == 49:
            continue  # a hole
        data = data_of(number, version if number % 3 == 0 else 0)
        writer.put([RawChunk(0, BASE + number * CHUNK, 0xFFFF, memoryview(data))])
    writer.commit(manifest(name, process(mapping(size=COUNT * CHUNK)), taken_at=float(version)))


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Image]:
    """The second of two that share chunks, after the one before them was removed."""
    with Store.open(tmp_path / "store", create=True) as store:
        for version, name in enumerate(("gone", "first", "second")):
            take(store, name, version)
        store.remove("gone")
        with store.image("second") as opened:
            yield opened


def test_places_are_those_of_the_values(image: Image) -> None:
    places = image.places(0)
    databases = image._environment.databases
    found = 0
    for index, entry in enumerate(image._space(0).entries()):
        offset, length = places.places[index].offset, places.places[index].bytes
        with image._environment.read(buffers=False) as transaction:
            value = transaction.get(NUMBER.pack(entry.sequence), db=databases["chunks"])
        with (image.store_path / "data.mdb").open("rb") as file:
            file.seek(offset)
            assert file.read(length) == value
        found += 1
    assert found == COUNT - COUNT // 50


def test_chunks_are_the_same(image: Image) -> None:
    """Deltas among them. Runs end before a hole."""
    stored = Stored.new(image.places(0))
    assert stored is not None
    memory, decoded = bytearray(5 * CHUNK), 0
    for number in range(COUNT):
        present = stored.run(BASE + number * CHUNK, 4, memory, CHUNK)
        decoded += len(present)
        hole = next((at for at in range(4) if (number + at) % 50 == 49), 4)
        assert len(present) == min(hole, COUNT - number)
        for at, pages in enumerate(present):
            chunk = image.chunk(0, BASE + (number + at) * CHUNK)
            assert chunk is not None
            assert chunk.present == pages
            assert chunk.data == bytes(memory[(1 + at) * CHUNK :][:CHUNK])
        if number % 50 == 49:
            assert present == []
    assert decoded > COUNT
    with pytest.raises(ValueError, match="would not fit"):
        stored.run(BASE, 5, memory, CHUNK)


def test_what_is_damaged_is_not_to_be_had(image: Image) -> None:
    places = image.places(0)
    stored = Stored.new(places)
    assert stored is not None
    memory = bytearray(CHUNK)
    for number in range(1, 60):
        place = places.places[number - number // 50]
        if number % 50 == 49 or not place.bytes:
            continue
        good = stored.run(BASE + number * CHUNK, 1, memory, 0)
        place.offset += 1
        assert stored.run(BASE + number * CHUNK, 1, memory, 0) == []
        place.offset -= 1
        with (image.store_path / "data.mdb").open("r+b") as file:
            for bit in Random(number).sample(range(place.bytes * 8), 5):
                file.seek(place.offset + bit // 8)
                byte = file.read(1)[0]
                file.seek(-1, 1)
                file.write(bytes([byte ^ 1 << bit % 8]))
                file.flush()
                assert good == [] or stored.run(BASE + number * CHUNK, 1, memory, 0) == []
                file.seek(-1, 1)
                file.write(bytes([byte]))
                file.flush()
        assert stored.run(BASE + number * CHUNK, 1, memory, 0) == good
