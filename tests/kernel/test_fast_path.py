"""Pages that are waited for come without the image being asked, and only if they are sound."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
from snapshot.kernel._native import lib

from snapshot.errors import DamagedError
from snapshot.image import Image
from snapshot.journal import Journal
from snapshot.kernel.stored import Stored
from snapshot.kernel.uffd import Uffd
from snapshot.lazy import Content, Server
from snapshot.missing import Missing
from snapshot.store import ProcessIdentity, Store
from snapshot.units import CHUNK, PAGE
from snapshot.writer import RawChunk
from tests.unit.images import manifest, mapping, process

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sudo pytest tests/kernel")
COUNT = 40
PAUSE_MS = 300
LIBC = ctypes.CDLL(None)  # its calls let other threads run
LIBC.memcpy.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t


class Asked:
    """An image that counts what it is asked for."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.chunks = 0

    def chunk(self, space: int, address: int, /) -> Content | None:
        self.chunks += 1
        return self.image.chunk(space, address)

    def addresses(self, space: int, /) -> Sequence[int]:
        return self.image.addresses(space)


class Place:
    """Memory of this process, all of it missing, and an image of it."""

    def __init__(self, image: Image, base: int, data: bytes, uffd: Uffd) -> None:
        self.asked, self.base, self.data, self.uffd = Asked(image), base, data, uffd
        self.stored = Stored.new(image.places(0))
        self.server = Server(self.asked, 0, Journal.create())
        self.server.pause_ms = PAUSE_MS  # or they would come before they are waited for
        self.server.add(uffd, Missing.of([(base, base + len(data))]), self.stored)


def put(store: Store, name: str, base: int, data: bytes) -> None:
    writer = store.begin(name, ProcessIdentity("boot", 100, 5))
    for at in range(0, len(data), CHUNK):
        writer.put([RawChunk(0, base + at, 0xFFFF, memoryview(data)[at : at + CHUNK])])
    writer.commit(manifest(name, process(mapping(start=base, size=len(data))), taken_at=1.0))


def earlier(data: bytearray) -> bytes:
    """What it was before up to nine pages of each chunk were written; some of these are zeros
    now."""
    random, before = Random(11), bytearray(data)
    for number in range(COUNT):
        for page in random.sample(range(16), number % 10):
            at = number * CHUNK + page * PAGE
            before[at : at + PAGE] = random.randbytes(PAGE)
            if page % 5 == 0:
                data[at : at + PAGE] = bytes(PAGE)
    return bytes(before)


@contextmanager
def missing(directory: Path, *, deltas: bool = False) -> Iterator[Place]:
    area = mmap.mmap(-1, (COUNT + 1) * CHUNK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    base = -(-ctypes.addressof(ctypes.c_char.from_buffer(area)) // CHUNK) * CHUNK
    words = Random(5).randbytes(CHUNK // 8 * COUNT)
    now = bytearray(b"".join(words[at : at + 64] * 8 for at in range(0, len(words), 64)))
    before = earlier(now) if deltas else b""
    data = bytes(now)
    with Store.open(directory / "store", create=True) as store, Uffd.open() as uffd:
        if deltas:
            put(store, "before", base, before)
        put(store, "one", base, data)
        uffd.api(0)
        uffd.register(base, len(data), lib.UFFDIO_REGISTER_MODE_MISSING)
        with store.image("one") as image:
            yield Place(image, base, data, uffd)


@pytest.mark.parametrize("deltas", [False, True])
def test_the_image_is_not_asked(tmp_path: Path, deltas: bool) -> None:
    read = ctypes.create_string_buffer(COUNT * CHUNK)
    order = Random(3).sample(range(COUNT * 16), COUNT * 16)

    def work(place: Place) -> None:
        for page in order:
            at = page * 4096
            LIBC.memcpy(ctypes.addressof(read) + at, place.base + at, 4096)

    with missing(tmp_path, deltas=deltas) as place:
        assert place.stored is not None
        bases = place.asked.image.places(0).bases
        assert bases is None or len(bases.addresses) > COUNT // 2
        assert (bases is not None) == deltas
        thread = threading.Thread(target=work, args=[place])
        thread.start()
        place.server.run()
        thread.join()
        assert read.raw == place.data
        assert place.server.faults >= COUNT - place.asked.chunks
        assert place.asked.chunks <= 2  # that nobody waited for, one in each pause
        assert set(place.server.touched) <= set(place.asked.addresses(0))


@pytest.mark.parametrize("what", ["block", "delta", "base"])
def test_a_page_that_is_damaged_is_left_to_the_image(tmp_path: Path, what: str) -> None:
    """Which says that it is; its bytes reach nobody."""
    number = COUNT // 2 + 4
    with missing(tmp_path, deltas=what != "block") as place:
        places = place.asked.image.places(0)
        entries = [places.places[number]]
        if what == "base":
            assert places.bases is not None
            entries = [places.bases.places[i] for i in range(len(places.bases.addresses))]
        with (tmp_path / "store" / "data.mdb").open("r+b") as file:
            for entry in entries:
                file.seek(entry.offset + entry.bytes - 1)
                last = file.read(1)[0]
                file.seek(-1, 1)
                file.write(bytes([last ^ 1]))
        address = place.base + (number + 1) * CHUNK - 4096
        read = ctypes.create_string_buffer(b"x" * 8)
        thread = threading.Thread(target=LIBC.memcpy, args=[ctypes.addressof(read), address, 8])
        thread.start()
        with pytest.raises(DamagedError, match=f"{place.base + number * CHUNK:#x}"):
            place.server.run()
        assert read.raw[:8] == b"x" * 8
        place.uffd.zeropage(address, 4096)  # so that the thread ends
        thread.join()
