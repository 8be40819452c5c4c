"""docs/image-format.md is exact: a reader written from it alone agrees with ours.

`SecondReader` uses none of our code and checks what the document says must be checked.
"""

from __future__ import annotations

import gc
import shutil
import struct
from pathlib import Path
from random import Random
from typing import Any

import lmdb
import msgspec
import zstandard
from blake3 import blake3
from xxhash import xxh64_intdigest

from snapshot.manifest import OBJECT_SPACE, SharedObject
from snapshot.store import ProcessIdentity, Store
from snapshot.units import CHUNK, MIB, PAGE
from snapshot.writer import RawChunk
from tests.unit.images import BASE, manifest, mapping, process


class SecondReader:
    def __init__(self, directory: Path, name: str) -> None:
        environment = lmdb.open(str(directory), max_dbs=6, readonly=True, lock=False)
        self.get: dict[str, dict[bytes, bytes]] = {}
        for database in ("meta", "images", "manifests", "index", "chunks"):
            handle = environment.open_db(database.encode(), create=False)
            with environment.begin(db=handle) as transaction:
                self.get[database] = dict(transaction.cursor())
        environment.close()
        assert self.get["meta"][b"format"] == b"livesnap store 4"
        sealed = self.get["images"][name.encode()]
        assert sealed[:16] == blake3(name.encode() + sealed[16:]).digest(16)
        self.record: dict[str, Any] = msgspec.msgpack.decode(sealed[16:])
        frame = self.get["manifests"][struct.pack(">Q", self.record["number"])]
        data = zstandard.ZstdDecompressor().decompress(frame, max_output_size=1 << 28)
        assert blake3(data).digest(16) == self.record["manifest"]
        assert data[:10] == b"SNAPMAN\n\0\1"
        self.manifest: dict[str, Any] = msgspec.msgpack.decode(data[10:])
        self.entries: dict[tuple[int, int], tuple[int, bytes]] = {}
        for space in self.record["spaces"]:
            self._index(space["space"], space["chunks"], space["digest"])

    def _index(self, space: int, chunks: int, digest: bytes) -> None:
        hasher = blake3()
        for key, value in sorted(self.get["index"].items()):
            number, its_space, address = struct.unpack(">QIQ", key)
            if (number, its_space) == (self.record["number"], space):
                hasher.update(key[12:] + value)
                self.entries[space, address] = struct.unpack(">Q16s", value)
                chunks -= 1
        assert (chunks, hasher.digest(16)) == (0, digest)

    def touched(self, space: int) -> list[int]:
        key = struct.pack(">5sQI", b"order", self.record["number"], space)
        value = self.get["meta"].get(key, b"")
        if value[:16] != blake3(key + value[16:]).digest(16):
            return []
        return [address for (address,) in struct.iter_unpack(">Q", value[16:])]

    def page(self, space: int, address: int) -> bytes | None:
        """None when the image does not have it."""
        entry = self.entries.get((space, address // 65536 * 65536))
        if entry is None:
            return None
        present, pages = self._pages(entry)
        number = address % 65536 // 4096
        return pages.get(number, bytes(4096)) if present >> number & 1 else None

    def _pages(self, entry: tuple[int, bytes]) -> tuple[int, dict[int, bytes]]:
        """The bitmap of those present, and those that are not zeros."""
        value = self.get["chunks"][struct.pack(">Q", entry[0])]
        present, nonzero, codec, digest = struct.unpack(">HHB3x16s", value[:24])
        own, payload = nonzero, value[24:]
        pages: dict[int, bytes] = {}
        if codec in (2, 5):
            base = self.entries[1 << 31, entry[0] * 65536]
            _, pages = self._pages(base)
            own, checked, codec = *struct.unpack(">HB5x", payload[:8])[:1], codec == 5, payload[2]
            payload = payload[8:]
            if checked:
                check, payload = payload[:8], payload[8:]
                seed = xxh64_intdigest(payload, int.from_bytes(value[8:16], "big"))
                assert int.from_bytes(check, "big") == xxh64_intdigest(value[:32], seed)
        size = 4096 * own.bit_count()
        if codec in (3, 4):
            payload = self._unchecked(value, -(-own.bit_count() // 4))
            codec -= 3
        if codec == 1:
            assert zstandard.frame_content_size(payload) == size
            payload = zstandard.ZstdDecompressor().decompress(payload)
        assert len(payload) == size
        for at in range(16):
            if own >> at & 1:
                pages[at], payload = payload[:4096], payload[4096:]
        pages = {at: pages[at] for at in range(16) if nonzero >> at & 1}
        key = struct.pack(">HH28x", present, nonzero)
        content = b"".join(pages[at] for at in sorted(pages))
        assert blake3(content, key=key).digest(16) == digest == entry[1]
        return present, pages

    def _unchecked(self, value: bytes, blocks: int) -> bytes:
        """What is behind the table, of which every block is what its check says."""
        seed = int.from_bytes(value[8:16], "big")
        heads = 24 + 12 * blocks
        (check,) = struct.unpack(">Q", value[heads : heads + 8])
        assert check == xxh64_intdigest(value[:heads], seed)
        stored, start = value[heads + 8 :], 0
        for end, check in struct.iter_unpack(">IQ", value[24:heads]):
            assert check == xxh64_intdigest(stored[start:end], seed)
            start = end
        assert start == len(stored)
        return stored

    def read(self, pid: int, address: int) -> bytes:
        """The page of an anonymous or shared mapping."""
        process = next(p for p in self.manifest["processes"] if p["pid"] == pid)
        mapping = next(m for m in process["mappings"] if m["start"] <= address < m["end"])
        space = process["index"]
        if mapping["kind"] == "shared":
            space = 65536 + mapping["object"]
            address += mapping["offset"] - mapping["start"]
        return self.page(space, address) or bytes(4096)


def made_up(seed: int, count: int, space: int, base: int) -> list[RawChunk]:
    """Chunks with pages of zeros, of text and of noise, present or not."""
    random = Random(seed)
    chunks = []
    for number in range(count):
        kinds = (bytes(PAGE), (random.randbytes(5) * PAGE)[:PAGE], random.randbytes(PAGE))
        data = b"".join(random.choice(kinds) for _ in range(CHUNK // PAGE))
        if number % 5 == 0:
            data = random.randbytes(CHUNK)
        pages = random.choice((0xFFFF, 0, random.randrange(1 << 16)))
        chunks.append(RawChunk(space, base + number * CHUNK, pages, memoryview(data)))
    return chunks


def a_little_later(chunks: list[RawChunk]) -> list[RawChunk]:
    """Some pages of some are others, are there, or are not."""
    random = Random(7)
    later = []
    for chunk in chunks:
        data = bytearray(chunk.data)
        for page in random.sample(range(16), random.choice((0, 1, 5, 9))):
            new = random.choice((bytes(PAGE), random.randbytes(PAGE)))
            data[page * PAGE : (page + 1) * PAGE] = new
        pages = random.choice((chunk.pages, chunk.pages & random.randrange(1 << 16), 0xFFFF))
        later.append(chunk._replace(data=memoryview(bytes(data)), pages=pages))
    return later


def test_a_second_reader_agrees(tmp_path: Path) -> None:
    shared = mapping(
        BASE - MIB, 8 * CHUNK, shared=True, kind="shared", object=2, offset=CHUNK + PAGE
    )
    processes = (
        process(shared, mapping(size=50 * CHUNK)),
        process(mapping(size=20 * CHUNK), pid=101, index=1),
    )
    objects = (SharedObject(id=2, kind="anon", name=b"", device=1, inode=2, size=10 * CHUNK),)
    path = tmp_path / "store"
    with Store.open(path, create=True) as store:
        for name, seed in (("first", 1), ("second", 2), ("third", 1)):
            writer = store.begin(name, ProcessIdentity("boot", 100, 5))
            writer.put(made_up(seed, 40, 0, BASE))
            writer.put(made_up(seed + 10, 10, 1, BASE + 3 * CHUNK))
            writer.put(made_up(4, 10, OBJECT_SPACE + 2, 0))
            writer.put(made_up(seed + 20, 5, 0, BASE))
            writer.commit(manifest(name, *processes, objects=objects, taken_at=float(seed)))
        writer = store.begin("fourth", ProcessIdentity("boot", 100, 5))
        writer.put(a_little_later(made_up(1, 40, 0, BASE)))
        writer.commit(manifest("fourth", *processes, objects=objects, taken_at=20.0))
        with store.image("third") as third:
            third.note_touched(0, [BASE + 5 * CHUNK, BASE])
        store.remove("second")
        store.collect()
    gc.collect()
    shutil.copytree(path, tmp_path / "copy")
    for name in ("first", "third", "fourth"):
        second = SecondReader(tmp_path / "copy", name)
        with Store.open(path).image(name) as ours:
            assert list(ours.verify()) == []
            noted = [BASE + 5 * CHUNK, BASE] if name == "third" else []
            assert second.touched(0) == ours.touched(0) == noted
            for one in ours.manifest.processes:
                for where in one.mappings:
                    for address in range(where.start, where.end, PAGE):
                        page = ours.read(address, PAGE, one.pid)
                        assert second.read(one.pid, address) == page, hex(address)
            for (space, address), _ in second.entries.items():
                if space == 1 << 31:
                    continue
                chunk = ours.chunk(space, address)
                assert chunk
                for number in range(CHUNK // PAGE):
                    page_there = second.page(space, address + number * PAGE)
                    assert (page_there is not None) == bool(chunk.present >> number & 1)
            assert ((1 << 31) in {space for space, _ in second.entries}) == (name != "first")
            assert second.record["saved_bytes"] == ours.saved_bytes
            assert second.manifest["image"] == name
