"""Reading an image: every kind of mapping, edges, what is damaged, what is missing."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random
from typing import Any

import pytest

from snapshot.environment import Transaction
from snapshot.errors import DamagedError, StoreError
from snapshot.image import Image
from snapshot.manifest import OBJECT_SPACE, MappedFile, Process, SharedObject
from snapshot.records import INDEX_KEY, INDEX_VALUE, NUMBER
from snapshot.store import Store
from snapshot.units import CHUNK, MIB, PAGE
from snapshot.writer import RawChunk
from tests.unit.images import BASE, manifest, mapping, process, raw


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store", create=True, map_bytes=1 * MIB)


def make(store: Store, chunks: list[RawChunk], *processes: Process, **fields: Any) -> Image:
    writer = store.begin("image")
    writer.put(chunks)
    writer.commit(manifest("image", *processes, **fields))
    return store.image("image")


def noise(seed: int, size: int = CHUNK) -> bytes:
    return Random(seed).randbytes(size)


def test_private_memory_and_the_zeros_around_it(store: Store) -> None:
    data = noise(1)
    image = make(store, [raw(data, BASE + CHUNK, pages=0b110)])
    whole = bytes(CHUNK + PAGE) + data[PAGE : 3 * PAGE] + bytes(CHUNK - 3 * PAGE + CHUNK)
    assert image.read(BASE, 3 * CHUNK) == whole
    for start in (0, 1, CHUNK - 1, CHUNK, CHUNK + PAGE - 1, CHUNK + PAGE, CHUNK + 3 * PAGE - 1):
        for length in (0, 1, 2, PAGE, CHUNK, CHUNK + 1):
            assert image.read(BASE + start, length) == whole[start : start + length]
    assert list(image.addresses(0)) == [BASE + CHUNK]
    assert image.chunk(0, BASE) is None
    assert image.chunk(1, BASE + CHUNK) is None
    assert list(image.addresses(1)) == []


def test_reading_across_mappings(store: Store) -> None:
    """Two mappings share the chunk in which one ends and the other begins."""
    edge = BASE + CHUNK + 4 * PAGE
    data = noise(1)
    image = make(
        store,
        [raw(data, BASE + CHUNK)],
        process(mapping(BASE, edge - BASE), mapping(edge, CHUNK, prot=1)),
    )
    assert image.read(edge - 10, 20) == data[4 * PAGE - 10 : 4 * PAGE + 10]


def test_what_was_not_mapped(store: Store) -> None:
    first, second = mapping(BASE, CHUNK, name=b"[heap]"), mapping(BASE + 3 * CHUNK, CHUNK)
    image = make(store, [], process(first, second))
    near = rf"{BASE + CHUNK:#x} was not mapped in process 100; the nearest mapping is {BASE:#x}-"
    with pytest.raises(StoreError, match=near + rf"{BASE + CHUNK:#x} \[heap\]") as caught:
        image.read(BASE + CHUNK - 10, 20)
    assert caught.value.hint == "snap show image"
    for address, nearest in (
        (0, first),
        (BASE + 2 * CHUNK + 5, second),
        (1 << 60, second),
        (BASE + CHUNK + 5, first),
    ):
        with pytest.raises(StoreError, match=f"nearest mapping is {nearest.start:#x}"):
            image.read(address, 1)


def test_private_file_mapping(store: Store, tmp_path: Path) -> None:
    """Pages of the image where the process wrote, the file's own elsewhere."""
    path = tmp_path / "file"
    data = noise(2, 10 * PAGE + 100)
    path.write_bytes(data)
    stat = path.stat()
    record = MappedFile(
        id=7,
        path=bytes(path),
        device=stat.st_dev,
        inode=stat.st_ino,
        size=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        writable=False,
    )
    start = BASE + 2 * PAGE
    written = noise(3)
    image = make(
        store,
        [raw(written, BASE, pages=1 << 3)],
        process(mapping(start, 10 * PAGE, kind="file", file=7, offset=PAGE)),
        files=(record,),
    )
    expected = bytearray((data[PAGE:] + bytes(PAGE))[: 10 * PAGE])
    expected[PAGE : 2 * PAGE] = written[3 * PAGE : 4 * PAGE]
    assert image.read(start, 10 * PAGE) == bytes(expected)
    assert image.read(start + PAGE - 1, 3) == bytes(expected[PAGE - 1 : PAGE + 2])
    image.close()

    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_500_000_000))
    image = store.image("image")
    assert image.read(start + PAGE, PAGE) == written[3 * PAGE : 4 * PAGE], "needs no file"
    with pytest.raises(StoreError, match=rf"{path} was changed 1.500 s after"):
        image.read(start, 1)
    path.write_bytes(b"short")
    with pytest.raises(StoreError, match=rf"{path} has 5 bytes, at T0 it had {len(data)}"):
        image.read(start, 1)
    path.unlink()
    with pytest.raises(StoreError, match=rf"{path} cannot be read: No such file") as caught:
        image.read(start, 1)
    assert caught.value.hint == f"ls -l {path}"


def test_shared_memory(store: Store) -> None:
    """Two windows into one object, at offsets that are not the chunks'."""
    data = noise(4, 2 * CHUNK)
    space = OBJECT_SPACE + 3
    image = make(
        store,
        [raw(data[:CHUNK], 0, space), raw(data[CHUNK:], CHUNK, space)],
        process(
            mapping(BASE, CHUNK, kind="shared", object=3, offset=5 * PAGE, shared=True),
            mapping(BASE + CHUNK, CHUNK, kind="shared", object=3, offset=CHUNK, shared=True),
        ),
        objects=(SharedObject(id=3, kind="memfd", name=b"x", device=1, inode=2, size=2 * CHUNK),),
    )
    assert image.read(BASE, CHUNK) == data[5 * PAGE : 5 * PAGE + CHUNK]
    assert image.read(BASE + CHUNK - 1, 3) == data[5 * PAGE + CHUNK - 1 :][:1] + data[CHUNK:][:2]


def test_the_kernels_own_mappings(store: Store) -> None:
    vdso = noise(5, PAGE)
    image = make(
        store,
        [raw(vdso, BASE, pages=1)],
        process(
            mapping(BASE, PAGE, kind="vdso", name=b"[vdso]"),
            mapping(BASE + PAGE, 4 * PAGE, kind="vdso", name=b"[vvar]"),
        ),
    )
    assert image.read(BASE, PAGE) == vdso
    with pytest.raises(StoreError, match=r"is in \[vvar\], which image image does not hold"):
        image.read(BASE + PAGE - 1, 2)


def test_several_processes(store: Store) -> None:
    image = make(
        store,
        [raw(b"first"), raw(b"second", space=1)],
        process(),
        process(mapping(size=CHUNK), pid=101, index=1),
    )
    assert image.read(BASE, 6) == image.read(BASE, 6, pid=100) == b"first\0"
    assert image.read(BASE, 6, pid=101) == b"second"
    assert image.mappings == (mapping(),)
    assert image.process(101).mappings == (mapping(size=CHUNK),)
    assert [thread.tid for thread in image.threads] == [100]
    with pytest.raises(StoreError, match="image image has no process 5; it has 100, 101"):
        image.read(BASE, 1, pid=5)


def test_write_order(store: Store) -> None:
    """What is streamed comes in the order in which it lies on the disk."""
    order = [7, 3, 5, 1, 200, 2]
    image = make(
        store,
        [raw(bytes([position]), BASE + position * CHUNK) for position in order],
        process(mapping(size=MIB * 20)),
    )
    assert [(address - BASE) // CHUNK for address, _ in image.chunks_in_order(0)] == order
    assert [chunk.data[0] for _, chunk in image.chunks_in_order(0)] == order
    assert [(address - BASE) // CHUNK for address in image.addresses(0)] == sorted(order)


def change(store: Store, database: str, key: bytes, value: bytes | None) -> None:
    """Damages the store behind its back."""
    environment = store._environment

    def work(transaction: Transaction) -> None:
        found = environment.databases[database]
        if value is None:
            assert transaction.delete(key, db=found)
        else:
            transaction.put(key, value, db=found)

    environment.write(work)


def stored(store: Store, database: str, key: bytes) -> bytes:
    with store._environment.read(buffers=False) as transaction:
        value = transaction.get(key, db=store._environment.databases[database])
        assert isinstance(value, bytes)
        return value


class Broken:
    """An image of three chunks, and where its parts are."""

    def __init__(self, store: Store) -> None:
        self.store = store
        make(store, [raw(noise(i), BASE + i * CHUNK) for i in range(3)]).close()
        self.number = store._record("image").number
        self.key = INDEX_KEY.pack(self.number, 0, BASE + CHUNK)
        self.index = stored(store, "index", self.key)
        self.sequence = NUMBER.pack(INDEX_VALUE.unpack(self.index)[0])

    def expect(self, read: str, *found: tuple[int | None, int | None, str]) -> None:
        """What reading the second chunk says, and everything that verify does."""
        image = self.store.image("image")
        with pytest.raises(DamagedError, match=read) as caught:
            image.read(BASE + CHUNK, 1)
        assert caught.value.hint == "snap verify image"
        damage = [(d.space, d.address, d.reason) for d in image.verify()]
        assert [d[:2] for d in damage] == [f[:2] for f in found]
        for (_, _, reason), (_, _, expected) in zip(damage, found, strict=True):
            assert expected in reason
        image.close()


@pytest.fixture
def broken(store: Store) -> Broken:
    return Broken(store)


def test_a_changed_chunk(broken: Broken) -> None:
    value = bytearray(stored(broken.store, "chunks", broken.sequence))
    value[1000] ^= 1
    change(broken.store, "chunks", broken.sequence, bytes(value))
    message = "the content does not match its checksum"
    where = rf"image image: space 0, {BASE + CHUNK:#x} \(chunk 2\): {message}"
    broken.expect(where, (0, BASE + CHUNK, message))
    assert broken.store.image("image").read(BASE, CHUNK) == noise(0), "the others can be read"


def test_a_lost_chunk(broken: Broken) -> None:
    change(broken.store, "chunks", broken.sequence, None)
    broken.expect("the chunk is missing", (0, BASE + CHUNK, "the chunk is missing"))


def test_another_chunk_in_its_place(broken: Broken) -> None:
    """It is whole in itself: only the index can know."""
    other = stored(broken.store, "chunks", NUMBER.pack(1))
    change(broken.store, "chunks", broken.sequence, other)
    message = "another chunk is in its place"
    broken.expect(message, (0, BASE + CHUNK, message))


def test_a_lost_index_entry(broken: Broken) -> None:
    """Its memory would read as zeros."""
    change(broken.store, "index", broken.key, None)
    broken.expect("the index of space 0 does not match", (0, None, "has 2 chunks of 3"))


def test_an_index_entry_that_names_another_chunk(broken: Broken) -> None:
    other = INDEX_KEY.pack(broken.number, 0, BASE)
    change(broken.store, "index", broken.key, stored(broken.store, "index", other))
    broken.expect("the index of space 0 does not match", (0, None, "or changed ones"))


def test_an_index_entry_too_many(broken: Broken) -> None:
    more = INDEX_KEY.pack(broken.number, 0, BASE + 3 * CHUNK)
    change(broken.store, "index", more, broken.index)
    broken.expect("the index of space 0 does not match", (0, None, "has 4 chunks of 3"))


def test_an_index_entry_of_an_odd_length(broken: Broken) -> None:
    change(broken.store, "index", broken.key, broken.index[:-1])
    broken.expect("the index of space 0 does not match", (0, None, "has 2 chunks of 3"))


def test_entries_of_a_space_that_the_image_does_not_have(broken: Broken) -> None:
    change(broken.store, "index", INDEX_KEY.pack(broken.number, 9, BASE), broken.index)
    image = broken.store.image("image")
    with pytest.raises(DamagedError, match="the index of space 9 does not match"):
        image.chunk(9, BASE)


def test_a_changed_manifest(broken: Broken) -> None:
    key = NUMBER.pack(broken.number)
    value = bytearray(stored(broken.store, "manifests", key))
    value[-1] ^= 1
    change(broken.store, "manifests", key, bytes(value))
    broken.expect("the manifest", (None, None, "the manifest"))
    change(broken.store, "manifests", key, None)
    broken.expect("the manifest is missing", (None, None, "the manifest is missing"))


def test_damage_in_words(broken: Broken) -> None:
    change(broken.store, "chunks", broken.sequence, None)
    (damage,) = broken.store.image("image").verify()
    assert str(damage) == f"image: space 0, {BASE + CHUNK:#x}: {damage.reason}"


def test_verify_says_how_far_it_is(store: Store) -> None:
    image = make(
        store,
        [raw(b"x", BASE + i * CHUNK) for i in range(200)],
        process(mapping(size=200 * CHUNK)),
    )
    calls: list[tuple[int, int]] = []
    assert list(image.verify(lambda done, total: calls.append((done, total)))) == []
    assert calls == [(64, 200), (128, 200), (192, 200), (200, 200)]


def test_a_closed_image_says_so(store: Store) -> None:
    image = make(store, [raw(noise(1), BASE)])
    image.close()
    with pytest.raises(StoreError, match="image is closed"):
        image.read(BASE, 1)
