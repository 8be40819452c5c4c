"""The store: names, sharing between images, removal, who may use what at the same time."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from random import Random

import msgspec
import pytest

from snapshot import lease
from snapshot.environment import Transaction
from snapshot.errors import DamagedError, StoreError
from snapshot.records import (
    BASES,
    EARLIER,
    FORMAT,
    FORMAT_KEY,
    INDEX_KEY,
    NUMBER,
    base_address,
    seal,
)
from snapshot.store import ProcessIdentity, Store
from snapshot.units import CHUNK, MIB, PAGE
from snapshot.writer import ImageWriter, RawChunk
from tests.unit import images
from tests.unit.images import BASE, manifest, raw
from tests.unit.test_environment import small_disk

__all__ = ["small_disk"]  # a fixture

ROOT = str(Path(__file__).parents[2])
PROCESS = images.process(images.mapping(size=1000 * CHUNK))
SELF = ProcessIdentity("boot", 100, 5)
"""The process of images.manifest."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store", create=True, map_bytes=1 * MIB)


def take(
    store: Store, name: str, contents: dict[int, bytes], like: ProcessIdentity | None = None
) -> ImageWriter:
    with store.begin(name, like) as writer:
        writer.put([raw(data, BASE + position * CHUNK) for position, data in contents.items()])
        writer.commit(manifest(name, PROCESS, taken_at=time.time()))
    return writer


def noise(seed: int, count: int = 20) -> dict[int, bytes]:
    random = Random(seed)
    return {position: random.randbytes(CHUNK) for position in range(count)}


def check(store: Store, name: str, contents: dict[int, bytes]) -> None:
    with store.image(name) as image:
        assert list(image.addresses(0)) == [BASE + position * CHUNK for position in contents]
        for position, data in contents.items():
            assert image.read(BASE + position * CHUNK, CHUNK) == data
        assert list(image.verify()) == []


def entries(store: Store) -> dict[str, int]:
    with store._environment.read() as transaction:
        found = store._environment.databases.items()
        return {name: transaction.stat(database)["entries"] for name, database in found}


def clean(store: Store) -> None:
    """Nothing is there that no image accounts for."""
    counted = entries(store)
    assert counted["images"] == counted["manifests"] == len(store.images())
    assert counted["takes"] == 0
    assert store.collect() == 0
    leases = {path.name for path in (store.path / "use").iterdir()}
    numbers = {str(store._record(info.image).number) for info in store.images()}
    assert leases <= numbers


def test_an_image_appears_with_its_commit(store: Store) -> None:
    writer = store.begin("one")
    writer.put([raw(b"hello")])
    assert store.images() == []
    with pytest.raises(StoreError, match="no image one among the 0"):
        store.image("one")
    writer.commit(manifest("one"))
    (info,) = store.images()
    assert (info.image, info.pid, info.comm, info.taken_at) == ("one", 100, "cat", 1.0)
    assert info.saved_bytes == CHUNK
    assert 0 < info.stored_bytes < 200
    assert store.image("one").read(BASE, 6) == b"hello\0"


def test_abort_leaves_nothing(store: Store) -> None:
    with store.begin("one") as writer:
        writer.put([raw(data, BASE + i * CHUNK) for i, data in noise(1).items()])
    assert store.images() == []
    assert entries(store)["chunks"] == entries(store)["index"] == 0
    clean(store)
    with pytest.raises(StoreError, match="finished"):
        writer.put([raw(b"")])


def test_equal_chunks_of_the_same_process_are_shared(store: Store) -> None:
    first, second = noise(1), {**noise(1), 3: b"changed".ljust(CHUNK, b"\0")}
    take(store, "first", first)
    writer = take(store, "second", second, SELF)
    assert writer.stored_bytes < 200
    assert writer.saved_bytes == 20 * CHUNK
    assert take(store, "other", first, ProcessIdentity("boot", 101, 5)).stored_bytes > 20 * CHUNK
    for name in ("first", "second", "other"):
        check(store, name, second if name == "second" else first)


def with_page(data: bytes, page: int, content: bytes) -> bytes:
    return data[: page * PAGE] + content.ljust(PAGE, b"\0") + data[(page + 1) * PAGE :]


def test_pages_that_changed_are_stored_alone(store: Store) -> None:
    """Whoever of the two is removed first: what the other needs stays, and nothing else."""
    first = noise(1)
    second = {at: with_page(data, at % 16, b"changed") for at, data in first.items()}
    third = {at: with_page(data, at % 7, b"and more") for at, data in second.items()}
    take(store, "first", first)
    for name, content in (("second", second), ("third", third)):
        assert take(store, name, content, SELF).stored_bytes < 20 * 200
    assert entries(store)["chunks"] == 60
    store.remove("second")
    store.collect()
    assert entries(store)["chunks"] == 40
    store.remove("first")
    store.collect()
    check(store, "third", third)
    assert entries(store)["chunks"] == 40
    store.remove("third")
    store.collect()
    assert entries(store)["index"] == entries(store)["chunks"] == 0
    clean(store)


def test_a_delta_is_shared_with_its_base(store: Store) -> None:
    first = noise(1)
    second = {at: with_page(data, 3, b"changed") for at, data in first.items()}
    take(store, "first", first)
    take(store, "second", second, SELF)
    assert take(store, "third", second, SELF).stored_bytes == 0
    for name in ("first", "second"):
        store.remove(name)
    store.collect()
    check(store, "third", second)
    assert entries(store)["chunks"] == 40
    assert entries(store)["index"] == 40


def test_what_changed_more_and_more_is_stored_whole_again(store: Store) -> None:
    """And is what the next one is compared with."""
    data = {0: noise(1, 1)[0]}
    take(store, "image-0", data)
    sizes = []
    for number in range(1, 13):
        data = {0: with_page(data[0], number, Random(number).randbytes(PAGE))}
        sizes.append(take(store, f"image-{number}", data, SELF).stored_bytes)
        store.remove(f"image-{number - 1}")
        store.collect()
        check(store, f"image-{number}", data)
    pages = [size // PAGE for size in sizes]
    assert pages == [1, 2, 3, 4, 5, 6, 7, 8, 16, 1, 2, 3]
    assert entries(store)["chunks"] == 2


def test_putting_a_delta_again(store: Store) -> None:
    """Each put leaves what it would have left alone, and the index has no base of what is gone."""
    chunk = noise(1, 1)[0]
    take(store, "first", {0: chunk})
    changed = with_page(chunk, 5, b"x")
    with store.begin("second", SELF) as writer:
        writer.put([raw(changed)])
        stored = writer.stored_bytes
        assert stored < 200
        patch = memoryview(with_page(bytes(CHUNK), 9, b"y"))
        writer.put([RawChunk(0, BASE, 0xFFFF, patch, 1 << 9)])
        assert stored < writer.stored_bytes < 200
        for data, indexed, chunks in (
            (with_page(with_page(chunk, 5, b"x"), 9, b"y"), 2, 2),
            (noise(2, 1)[0], 1, 2),  # whole
            (chunk, 1, 1),  # shared
            (changed, 2, 2),
            (b"", 0, 1),
            (changed, 2, 2),
        ):
            writer.put([raw(data)] if data else [RawChunk(0, BASE, 0, memoryview(b""))])
            writer.put([raw(b"", BASE + CHUNK)])  # what was put before is written by now
            writer.put([RawChunk(0, BASE + CHUNK, 0, memoryview(b""))])
            writer._handoff.drain()
            assert entries(store)["index"] == 1 + indexed
            assert entries(store)["chunks"] == chunks
        writer.commit(manifest("second", PROCESS, taken_at=2.0))
    check(store, "second", {0: changed})
    take(store, "third", {0: changed}, SELF)
    with store.begin("fourth", SELF) as writer:  # a delta of another image, patched
        writer.put([raw(changed)])
        assert writer.stored_bytes == 0
        writer.put([RawChunk(0, BASE, 0xFFFF, patch, 1 << 9)])
        writer.commit(manifest("fourth", PROCESS, taken_at=3.0))
    check(store, "fourth", {0: with_page(changed, 9, b"y")})
    check(store, "third", {0: changed})


def test_a_take_with_deltas_that_is_given_up(store: Store) -> None:
    first = noise(1)
    take(store, "first", first)
    with store.begin("second", SELF) as writer:
        writer.put([raw(with_page(data, 1, b"x"), BASE + at * CHUNK) for at, data in first.items()])
    clean(store)
    assert entries(store)["index"] == entries(store)["chunks"] == 20
    check(store, "first", first)


@pytest.mark.parametrize("what", ["base", "entry"])
def test_a_base_that_is_lost(store: Store, what: str) -> None:
    """One error, or one thing that verify finds, for each that needs it; the others are read."""
    first = noise(1, 3)
    take(store, "first", first)
    take(store, "second", {at: with_page(data, 1, b"x") for at, data in first.items()}, SELF)

    def work(transaction: Transaction) -> None:
        databases = store._environment.databases
        if what == "base":
            transaction.delete(NUMBER.pack(2), db=databases["chunks"])
        else:
            key = INDEX_KEY.pack(store._record("second").number, BASES, base_address(5))
            assert transaction.delete(key, db=databases["index"])

    store._environment.write(work)
    with store.image("second") as image:
        found = [(one.space, one.address) for one in image.verify()]
        if what == "base":
            assert found == [(0, BASE + CHUNK)]
            assert image.read(BASE, CHUNK) == with_page(first[0], 1, b"x")
        else:
            assert (BASES, None) in found
        with pytest.raises(DamagedError):
            image.read(BASE + CHUNK, 1)


@pytest.mark.parametrize("earlier", EARLIER)
def test_a_store_of_an_earlier_format(store: Store, earlier: bytes) -> None:
    """It is read as it is, and only a take makes it one that an older snap refuses."""

    def format_is(value: bytes) -> bool:
        with store._environment.read() as transaction:
            got: bytes = transaction.get(FORMAT_KEY, db=store._environment.databases["meta"])
            return bytes(got) == value

    take(store, "first", noise(1))
    store._environment.write(
        lambda transaction: transaction.put(
            FORMAT_KEY, earlier, db=store._environment.databases["meta"]
        )
    )
    with Store.open(store.path) as again:
        check(again, "first", noise(1))
        assert format_is(earlier)
        take(again, "second", noise(1), SELF)
    assert format_is(FORMAT)


@pytest.mark.parametrize("removed", [("first",), ("second",), ("first", "second"), ("third",)])
def test_removal_keeps_what_others_share(store: Store, removed: tuple[str, ...]) -> None:
    contents = {
        "first": noise(1),
        "second": {**noise(1), 3: b"x" * CHUNK},
        "third": {**noise(1), 3: b"x" * CHUNK, 4: b"y" * CHUNK},
    }
    for name, content in contents.items():
        take(store, name, content, SELF)
    for name in removed:
        store.remove(name)
    store.collect()
    assert {info.image for info in store.images()} == set(contents) - set(removed)
    for name in set(contents) - set(removed):
        check(store, name, contents[name])
    clean(store)
    left = [contents[name] for name in set(contents) - set(removed)]
    distinct = {(position, data) for content in left for position, data in content.items()}
    assert entries(store)["chunks"] == len(distinct)


def test_the_last_removal_empties_the_store(store: Store) -> None:
    for seed in range(3):
        take(store, f"image{seed}", noise(seed))
    for seed in range(3):
        store.remove(f"image{seed}")
    calls: list[tuple[int, int]] = []
    assert store.collect(lambda done, total: calls.append((done, total))) >= 60 * CHUNK
    assert calls[-1] == (60, 60)
    assert entries(store) == {"meta": 3} | dict.fromkeys(
        ("images", "manifests", "takes", "index", "chunks"), 0
    )


def test_space_is_used_again(store: Store) -> None:
    """The file does not grow for ever."""
    for seed in range(12):
        take(store, "image", noise(seed, 60))
        store.remove("image")
        store.collect()
    assert store._environment.used_bytes() < 3 * 60 * CHUNK


def test_putting_a_chunk_again(store: Store) -> None:
    """The later replaces all of the earlier, which is not left behind, nor counted."""
    writer = store.begin("one")
    writer.put([raw(b"a" * CHUNK, pages=0b0011)])
    before = writer.stored_bytes
    writer.put([raw(b"b" * CHUNK, pages=0b0110), raw(b"c" * CHUNK, pages=0b1000)])
    assert writer.saved_bytes == 4096
    assert 0 < writer.stored_bytes <= before
    writer.commit(manifest("one"))
    chunk = store.image("one").chunk(0, BASE)
    assert chunk
    assert chunk.present == chunk.nonzero == 0b1000
    assert chunk.data == bytes(3 * 4096) + b"c" * 4096 + bytes(12 * 4096)
    assert entries(store)["chunks"] == 1


def test_putting_a_chunk_again_in_the_same_batch(store: Store) -> None:
    """Also when others are between, more than are encoded together."""
    others = [raw(bytes([n]) * CHUNK, BASE + n * CHUNK) for n in range(1, 40)]
    writer = store.begin("one")
    writer.put([raw(b"a" * CHUNK), *others, raw(b"b" * CHUNK)])
    assert writer.saved_bytes == 40 * CHUNK
    writer.commit(manifest("one"))
    chunk = store.image("one").chunk(0, BASE)
    assert chunk
    assert chunk.data == b"b" * CHUNK
    assert entries(store)["chunks"] == 40


def test_taking_a_chunk_out_again(store: Store) -> None:
    """Memory that was copied ahead and given up before T0."""
    none = RawChunk(0, BASE, 0, memoryview(b""))
    writer = store.begin("one")
    writer.put([none])  # never there
    writer.put([raw(b"a" * CHUNK), raw(b"b" * CHUNK, BASE + CHUNK)])
    writer.put([none])
    assert writer.saved_bytes == CHUNK
    writer.commit(manifest("one"))
    image = store.image("one")
    assert image.chunk(0, BASE) is None
    assert list(image.addresses(0)) == [BASE + CHUNK]
    assert entries(store)["chunks"] == 1


def test_patching_a_chunk(store: Store) -> None:
    """Pages that were written again; the others stay, but for those that are gone."""
    writer = store.begin("one")
    writer.put([raw(b"a" * CHUNK, pages=0b0111)])
    patch = memoryview(b"b" * CHUNK)
    writer.put([RawChunk(0, BASE, 0b1011, patch, 0b1001)])
    assert writer.saved_bytes == 3 * 4096
    writer.commit(manifest("one"))
    chunk = store.image("one").chunk(0, BASE)
    assert chunk
    assert chunk.present == chunk.nonzero == 0b1011
    assert chunk.data == b"".join(c * 4096 for c in (b"b", b"a", b"\0", b"b")) + bytes(12 * 4096)
    assert entries(store)["chunks"] == 1


def test_a_patch_leaves_what_it_patches_where_it_is(store: Store) -> None:
    """As a base, until most of the chunk is another. Of an image without predecessor."""
    data = noise(3, 1)[0]
    writer = store.begin("one")

    def patch(first: int, last: int, fill: bytes) -> None:
        nonlocal data
        for page in range(first, last):
            data = with_page(data, page, fill)
        bits = (1 << last) - (1 << first)
        writer.put([RawChunk(0, BASE, 0xFFFF, memoryview(data), bits)])
        writer._handoff.drain()

    writer.put([raw(data)])
    whole = writer.stored_bytes
    patch(4, 6, b"x")
    assert entries(store)["chunks"] == entries(store)["index"] == 2
    assert whole < writer.stored_bytes < whole + 200
    patch(5, 11, b"y")  # in place of the patch before
    assert entries(store)["chunks"] == entries(store)["index"] == 2
    assert whole < writer.stored_bytes < whole + 200
    patch(0, 5, b"z")  # 11 pages of it are others by now
    assert entries(store)["chunks"] == entries(store)["index"] == 1
    assert writer.stored_bytes < whole
    patch(15, 16, b"z")
    assert entries(store)["chunks"] == 2
    assert writer.saved_bytes == CHUNK
    writer.commit(manifest("one", PROCESS))
    check(store, "one", {0: data})
    other = with_page(data, 14, b"a")
    take(store, "two", {0: other}, SELF)  # a delta against the same
    assert entries(store)["chunks"] == 3
    store.remove("one")
    store.collect()
    check(store, "two", {0: other})
    assert entries(store)["chunks"] == 2


@pytest.mark.parametrize("first", [0, 0b0001])
def test_a_patch_that_does_not_fit(store: Store, first: int) -> None:
    """Of a page that is neither in it nor in what it patches."""
    writer = store.begin("one")
    if first:
        writer.put([raw(b"a" * CHUNK, pages=first)])
    with pytest.raises(ValueError, match=r"nowhere|nothing"):
        writer.put([RawChunk(0, BASE, 0b0110, memoryview(bytes(CHUNK)), 0b0010)])
    writer.abort()


def test_taking_out_what_another_image_has_too(store: Store) -> None:
    take(store, "first", {0: b"a" * CHUNK})
    writer = store.begin("second", SELF)
    writer.put([raw(b"a" * CHUNK)])
    writer.put([RawChunk(0, BASE, 0, memoryview(b""))])
    assert (writer.saved_bytes, writer.stored_bytes) == (0, 0)
    writer.commit(manifest("second", taken_at=2.0))
    check(store, "first", {0: b"a" * CHUNK})
    assert list(store.image("second").addresses(0)) == []


def test_putting_a_shared_chunk_again(store: Store) -> None:
    take(store, "first", {0: b"a" * CHUNK})
    writer = store.begin("second", SELF)
    writer.put([raw(b"a" * CHUNK)])
    writer.put([raw(b"b" * CHUNK)])
    writer.put([raw(b"a" * CHUNK)])
    writer.commit(manifest("second", taken_at=2.0))
    check(store, "first", {0: b"a" * CHUNK})
    check(store, "second", {0: b"a" * CHUNK})
    assert entries(store)["chunks"] == 1
    clean(store)


def test_many_threads(store: Store) -> None:
    contents = noise(1, 400)
    writer = store.begin("one")

    def put(first: int) -> None:
        for start in range(first, 400, 40):
            part = range(start, start + 10)
            writer.put([raw(contents[i], BASE + i * CHUNK) for i in part])

    threads = [threading.Thread(target=put, args=(first,)) for first in range(0, 40, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.commit(manifest("one", PROCESS))
    check(store, "one", contents)
    with store.image("one") as image:
        streamed = dict(image.chunks_in_order(0))
        assert {a: chunk.data for a, chunk in streamed.items()} == {
            BASE + position * CHUNK: data for position, data in contents.items()
        }


def test_the_map_grows_while_threads_put_and_read(store: Store) -> None:
    """Stores here start with a map of 1 MiB; this one reaches 64."""
    take(store, "base", noise(7, 10))
    wrong: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            take(store, f"image{seed}", noise(seed, 200))
            check(store, "base", noise(7, 10))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for seed in range(4):
        check(store, f"image{seed}", noise(seed, 200))


def test_a_disk_that_fills_up(small_disk: Path) -> None:
    """One clear error, no half image, and the store can be used and emptied afterwards."""
    store = Store.open(small_disk, create=True)
    take(store, "before", noise(1))
    with pytest.raises(
        StoreError, match=r"cannot write to the store .* free on its disk\)"
    ) as caught:
        take(store, "large", noise(2, 700))
    assert caught.value.hint == f"df -h {small_disk}"
    assert [info.image for info in store.images()] == ["before"]
    clean(store)
    take(store, "after", noise(3))
    check(store, "before", noise(1))
    check(store, "after", noise(3))
    for name in ("before", "after"):
        store.remove(name)
    assert store.collect() > 40 * CHUNK


def test_names(store: Store) -> None:
    for name in ("redis-1", "redis-2", "cat"):
        take(store, name, {0: name.encode()})
    assert store.resolve("redis-1") == "redis-1"
    assert store.resolve("c") == "cat"
    assert store.resolve("latest") == "cat"
    with pytest.raises(StoreError, match="redis is the beginning of 2 images: redis-1, redis-2"):
        store.resolve("redis")
    with pytest.raises(StoreError, match="no image dog among the 3"):
        store.resolve("dog")
    with pytest.raises(StoreError, match="no image re in"):
        store.remove("re")
    with pytest.raises(StoreError, match="an image named cat exists") as caught:
        store.begin("cat")
    assert caught.value.hint == "snap rm cat"
    with store.begin("dog"), pytest.raises(StoreError, match="named dog is being taken by process"):
        store.begin("dog")
    for bad in ("", "a\0b", "x" * 256, "latest", "-x"):
        with pytest.raises(StoreError, match="cannot name an image"):
            store.begin(bad)


def test_a_made_up_name_is_free(store: Store) -> None:
    assert store.free_name("cat") == "cat"
    for expected in ("cat", "cat-2", "cat-3"):
        name = store.free_name("cat")
        assert name == expected
        take(store, name, {})


def test_two_takes_of_one_name_and_the_second_commit(store: Store) -> None:
    writer = store.begin("one")
    with pytest.raises(ValueError, match="a manifest of 'two' for the image 'one'"):
        writer.commit(manifest("two"))
    writer.put([raw(b"x")])
    writer.abort()
    take(store, "one", {})
    check(store, "one", {})


def test_an_image_in_use_is_not_removed(store: Store) -> None:
    take(store, "one", {0: b"x" * CHUNK})
    image = store.image("one")
    message = rf"image one is in use \(by process {os.getpid()}\)"
    with pytest.raises(StoreError, match=message):
        store.remove("one")
    writer = store.begin("two", SELF)
    image.close()
    with pytest.raises(StoreError, match="in use"):
        store.remove("one")
    writer.abort()
    store.remove("one")
    assert store.collect() > 0
    clean(store)


def test_a_child_keeps_the_lease(store: Store) -> None:
    """The page server of a restore that has ended is such a child."""
    take(store, "one", {0: b"x"})
    image = store.image("one")
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    image.close()
    del image
    gc.collect()
    with pytest.raises(StoreError, match="in use"):
        store.remove("one")
    os.close(writing)
    os.waitpid(pid, 0)
    os.close(reading)
    store.remove("one")


def test_leases_do_not_wait_and_are_not_confused_by_removal(tmp_path: Path) -> None:
    (tmp_path / lease.DIRECTORY).mkdir()
    shared = [lease.acquire(tmp_path, 1, alone=False) for _ in range(2)]
    assert all(shared)
    assert lease.acquire(tmp_path, 1, alone=True) is None
    for held in shared:
        assert held
        held.release()
    alone = lease.acquire(tmp_path, 1, alone=True)
    assert alone
    assert lease.acquire(tmp_path, 1, alone=False) is None
    lease.forget(tmp_path, 1)
    assert lease.acquire(tmp_path, 1, alone=False)


OTHER = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from snapshot.store import Store
from tests.unit.test_store import noise, take
for seed in range(6):
    with Store.open(Path(sys.argv[1])) as store:
        take(store, f"other{seed}", noise(100 + seed, 30))
        if seed % 2:
            store.remove(f"other{seed}")
            store.collect()
"""


def test_a_copied_store_without_its_locks(store: Store, tmp_path: Path) -> None:
    take(store, "one", {0: b"x" * CHUNK})
    copy = tmp_path / "copy"
    copy.mkdir(mode=0o700)
    shutil.copy(store.path / "data.mdb", copy)
    other = Store.open(copy)
    check(other, "one", {0: b"x" * CHUNK})
    other.remove("one")
    assert other.collect() > 0
    clean(other)
    check(store, "one", {0: b"x" * CHUNK})


def test_two_processes(store: Store) -> None:
    """Takes, removals and sweeps of one do not disturb the other's."""
    arguments = [sys.executable, "-c", OTHER, str(store.path), ROOT]
    with subprocess.Popen(arguments) as other:
        for seed in range(6):
            take(store, f"mine{seed}", {**noise(1, 30), seed: b"s"}, SELF)
            if seed >= 2:
                store.remove(f"mine{seed - 2}")
                store.collect()
        assert other.wait(60) == 0
    for seed in (0, 2, 4):
        check(store, f"other{seed}", noise(100 + seed, 30))
    for seed in (4, 5):
        check(store, f"mine{seed}", {**noise(1, 30), seed: b"s".ljust(CHUNK, b"\0")})
    clean(store)


def test_a_thousand_images_are_listed(store: Store) -> None:
    take(store, "model", {0: b"x"})
    record = store._record("model")
    environment = store._environment

    def work(transaction: Transaction) -> None:
        for number in range(1000):
            key = f"image{number:03}".encode()
            made = msgspec.structs.replace(record, number=number + 10, taken_at=float(number))
            transaction.put(key, seal(key, made), db=environment.databases["images"])

    environment.write(work)
    found = store.images()
    assert [info.image for info in found[:-1]] == [f"image{number:03}" for number in range(1000)]


def test_default_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNAP_STORE", str(tmp_path / "mine"))
    assert Store.open(create=True).path == tmp_path / "mine"
    monkeypatch.delenv("SNAP_STORE")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    assert Store.open(create=True).path == tmp_path / "xdg" / "livesnap"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Store.open(create=True).path == tmp_path / ".local" / "share" / "livesnap"


def test_the_directory_is_private(store: Store) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in store.path.rglob("*")}
    assert store.path.stat().st_mode & 0o777 == 0o700
    assert {name for name, mode in modes.items() if mode & 0o077} == set()


def test_a_store_that_others_may_write_to(store: Store) -> None:
    for place, hint in ((store.path, store.path), (store.path / "data.mdb",) * 2):
        mode = place.stat().st_mode
        place.chmod(mode | 0o020)
        with pytest.raises(StoreError, match=r"others may write to .* \(mode \d+\)") as caught:
            Store.open(store.path)
        assert caught.value.hint == f"chmod go-rwx {hint}"
        place.chmod(mode)
    Store.open(store.path)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root: run as root")
def test_a_store_of_somebody_else(store: Store) -> None:
    os.chown(store.path, 12345, -1)
    with pytest.raises(StoreError, match="belongs to user 12345, not to 0"):
        Store.open(store.path)


def test_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no store of snap in") as caught:
        Store.open(tmp_path / "absent")
    assert caught.value.hint.startswith("the first take makes one: snap --store")
    (tmp_path / "file").touch()
    for create in (False, True):
        with pytest.raises(StoreError, match=r"no store|cannot make a store"):
            Store.open(tmp_path / "file", create=create)
    (tmp_path / "data.mdb").write_bytes(b"something else" * 1000)
    with pytest.raises(StoreError, match="there is no store of snap in") as caught:
        Store.open(tmp_path)
    assert "the first take makes one" not in caught.value.hint, "no take would"
    with pytest.raises(StoreError, match="is neither a store of snap nor empty"):
        Store.open(tmp_path, create=True)
    assert (tmp_path / "data.mdb").read_bytes().startswith(b"something else")
    assert not (tmp_path / "lock.mdb").exists(), "a foreign directory is left as it is"


def test_an_lmdb_of_somebody_else(tmp_path: Path) -> None:
    import lmdb

    other = lmdb.open(str(tmp_path), mode=0o600)
    with other.begin(write=True) as transaction:
        transaction.put(b"key", b"value")
    other.close()
    with pytest.raises(StoreError, match="there is no store of snap in"):
        Store.open(tmp_path)


def test_a_store_of_a_later_format(store: Store) -> None:
    environment = store._environment
    meta = environment.databases["meta"]
    environment.write(lambda t: t.put(b"format", b"livesnap store 5", db=meta))
    with pytest.raises(StoreError, match="is a livesnap store 5; this snap reads livesnap store 4"):
        Store.open(store.path)


def test_making_a_store_again_keeps_it(store: Store) -> None:
    take(store, "one", {0: b"x"})
    assert [info.image for info in Store.open(store.path, create=True).images()] == ["one"]


def test_a_damaged_record_is_listed_and_can_be_removed(store: Store) -> None:
    """And nothing is swept meanwhile: nobody knows what the image names."""
    take(store, "one", {0: b"x"})
    take(store, "two", {0: b"y"})
    environment = store._environment

    def damage(transaction: Transaction) -> None:
        database = environment.databases["images"]
        value = bytearray(transaction.get(b"one", db=database))
        value[20] ^= 1
        transaction.put(b"one", bytes(value), db=database)

    environment.write(damage)
    assert {info.image: info.damaged for info in store.images()} == {"one": True, "two": False}
    with pytest.raises(DamagedError, match=r"image one: .* does not match its checksum") as caught:
        store.image("one")
    with pytest.raises(DamagedError, match="records are damaged or lost"):
        store.collect()
    assert caught.value.hint == "snap rm one"
    store.remove("one")
    assert store.collect() > 0
    check(store, "two", {0: b"y".ljust(CHUNK, b"\0")})
    clean(store)


def test_a_lost_record_does_not_lead_to_a_sweep(store: Store) -> None:
    """A manifest that no record names is damage, not rubbish."""
    take(store, "one", {0: b"x"})
    number = store._record("one").number
    environment = store._environment
    environment.write(lambda t: t.delete(b"one", db=environment.databases["images"]))
    with pytest.raises(DamagedError, match=rf"records are damaged or lost \(number {number}\)"):
        store.collect()
    with environment.read() as transaction:
        assert transaction.get(NUMBER.pack(number), db=environment.databases["manifests"])
