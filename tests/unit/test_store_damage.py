"""Flipped bits in the data file: right bytes or DamagedError, never wrong bytes.

LMDB has no checksums and trusts the pages of its B-trees, so those are checked before it is let at
them (soundness.py). Each damage is read by a forked child, so that a crash would be seen.
"""

from __future__ import annotations

import gc
import os
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from snapshot.environment import DATA
from snapshot.errors import SnapError
from snapshot.store import Store
from snapshot.units import CHUNK, PAGE
from tests.unit.images import BASE, manifest, mapping, process, raw
from tests.unit.test_store import SELF, with_page

COUNT = 60
RIGHT, DAMAGED, WRONG, OTHER = range(4)
BRANCH_LEAF_OR_META = 0x01 | 0x02 | 0x08


def content(number: int) -> bytes:
    random = Random(number)
    return random.randbytes(CHUNK) if number % 10 == 0 else random.randbytes(16) * (CHUNK // 16)


def later(number: int) -> bytes:
    """The same, but for a page of every third."""
    data = content(number)
    return data if number % 3 else with_page(data, number % 16, b"later")


EXPECTED = [content(number) for number in range(COUNT)]
LATER = [later(number) for number in range(COUNT)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images: one alone, two that share, one with deltas against these; and free pages of one
    that was removed."""
    path = tmp_path_factory.mktemp("damage") / "store"
    with Store.open(path, create=True) as store:
        for name in ("gone", "alone", "one", "same", "later"):
            writer = store.begin(name, SELF if name in ("same", "later") else None)
            contents = enumerate(LATER if name == "later" else EXPECTED)
            writer.put([raw(data, BASE + number * CHUNK) for number, data in contents])
            assert name != "later" or 0 < writer.stored_bytes < COUNT // 3 * 200, "only deltas"
            writer.commit(manifest(name, process(mapping(size=COUNT * CHUNK)), taken_at=1.0))
        store.remove("gone")
        store.collect()
    gc.collect()
    return path


def read_all(path: Path) -> int:
    """Reads and verifies every image; what came of it."""
    outcome = RIGHT
    try:
        store = Store.open(path)
        for info in store.images():
            if info.damaged:
                outcome = DAMAGED
                continue
            try:
                with store.image(info.image) as image:
                    if info.image in ("same", "later") and list(image.verify()):
                        outcome = DAMAGED
                    expected = LATER if info.image == "later" else EXPECTED
                    for number in range(COUNT):
                        data = image.read(BASE + number * CHUNK, CHUNK)
                        if data != expected[number]:
                            return WRONG
            except SnapError:
                outcome = DAMAGED
    except SnapError:
        outcome = DAMAGED
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return OTHER
    return outcome


def outcomes(path: Path, places: Iterator[tuple[int, int]]) -> Counter[int]:
    """Flips one bit after the other, each time back again; counts how the reads end, a negative
    number being a signal."""
    found: Counter[int] = Counter()
    with (path / DATA).open("r+b", buffering=0) as file:
        for at, bit in places:
            byte = os.pread(file.fileno(), 1, at)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), at)
            pid = os.fork()
            if not pid:
                os._exit(read_all(path))
            found[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])] += 1
            os.pwrite(file.fileno(), bytes([byte]), at)
    return found


def used(path: Path) -> bytes:
    """The data file without the sparse end."""
    return (path / DATA).read_bytes().rstrip(b"\0")


def test_it_is_right_without_damage(path: Path) -> None:
    assert read_all(path) == RIGHT
    gc.collect()


def test_200_random_places(path: Path) -> None:
    random, size = Random(1), len(used(path))
    places = ((random.randrange(size), random.randrange(8)) for _ in range(200))
    found = outcomes(path, places)
    assert set(found) <= {RIGHT, DAMAGED}, found
    assert found[DAMAGED] > 50, "most bits of the file matter"


def test_pages_of_the_trees(path: Path) -> None:
    """Where LMDB's own structure is: keys, offsets, page numbers, flags."""
    random, data = Random(2), used(path)
    pages = [
        page
        for page in range(len(data) // PAGE)
        if struct.unpack_from("=QHH", data, page * PAGE)[0::2][0] == page
        and struct.unpack_from("=QHH", data, page * PAGE)[2] & BRANCH_LEAF_OR_META
    ]
    assert len(pages) > 10

    def places() -> Iterator[tuple[int, int]]:
        for number in range(600):
            within = random.randrange(80 if number % 2 else PAGE)
            yield random.choice(pages) * PAGE + within, random.randrange(8)

    found = outcomes(path, places())
    assert set(found) <= {RIGHT, DAMAGED}, found


@pytest.mark.parametrize("part", [0, 1, 100, 4096, 8192, 8193, 0.3, 0.9])
def test_a_file_cut_off_anywhere(path: Path, tmp_path: Path, part: float) -> None:
    """DamagedError or StoreError, not SIGBUS."""
    data = used(path)
    copy = tmp_path / "store"
    copy.mkdir(mode=0o700)
    (copy / "use").mkdir()
    length = part if isinstance(part, int) else int(len(data) * part)
    (copy / DATA).write_bytes(data[:length])
    (copy / DATA).chmod(0o600)
    pid = os.fork()
    if not pid:
        try:
            Store.open(copy)
        except SnapError as error:
            os._exit(0 if "cut off" in error.message or length < PAGE * 2 else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
