"""A hostile image is refused, clearly and cheaply, before anything is done by it."""

from __future__ import annotations

import os
import stat
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from snapshot import manifest as manifests
from snapshot import objects, plausible
from snapshot.errors import DamagedError, RestoreError, SnapError, StoreError
from snapshot.manifest import (
    Descriptor,
    Manifest,
    MappedFile,
    OpenFile,
    Process,
    Rseq,
    SharedObject,
)
from snapshot.records import SpaceSummary
from snapshot.store import Store
from snapshot.units import CHUNK, GIB, HUGE, MIB, PAGE
from tests.unit.images import BASE, manifest, mapping, process, raw

GOOD = process(mapping())
LEADER = GOOD.threads[0]


def with_(**fields: Any) -> Manifest:
    return manifest("one", replace(GOOD, **fields))


def maps(*made: Any) -> Manifest:
    return with_(mappings=made)


def thread(**fields: Any) -> Manifest:
    return with_(threads=(replace(LEADER, **fields),))


def shared(**fields: Any) -> Manifest:
    one = {"id": 1, "kind": "tmpfs", "name": b"/dev/shm/x", "device": 1, "inode": 2, "size": PAGE}
    return manifest("one", GOOD, objects=(SharedObject(**{**one, **fields}),))


def mapped(path: bytes) -> Manifest:
    file = MappedFile(id=1, path=path, device=1, inode=2, size=9, mtime_ns=3, writable=False)
    return manifest("one", GOOD, files=(file,))


def open_file(**fields: Any) -> Manifest:
    file = OpenFile(**{"id": 1, "kind": "files", "label": "x", **fields})
    return with_(files=(file,), descriptors=(Descriptor(fd=3, file=1),))


def huge(start: int = BASE, size: int = HUGE, **fields: Any) -> Any:
    return mapping(start, size, **{"page_size": HUGE, "vm_flags": ("rd", "ht"), **fields})


def huge_object(size: int = HUGE, kind: str = "memfd", page_size: int = HUGE) -> Manifest:
    return shared(kind=kind, name=b"x", size=size, page_size=page_size)


def mapped_object(made: Manifest, one: Any) -> Manifest:
    return replace(made, processes=(replace(GOOD, mappings=(one,)),))


IMPOSSIBLE = {
    "half a huge page": lambda: maps(huge(size=HUGE + PAGE)),
    "a huge page that starts in another": lambda: maps(huge(BASE + PAGE)),
    "pages of 3 MiB": lambda: maps(huge(size=6 * MIB, page_size=3 * MIB)),
    "pages of 1 GiB": lambda: maps(huge(1024 * GIB, GIB, page_size=GIB)),
    "pages of no size": lambda: maps(mapping(page_size=0)),
    "huge pages without their flag": lambda: maps(huge(vm_flags=())),
    "the flag without huge pages": lambda: maps(mapping(vm_flags=("ht",))),
    "huge pages of a file": lambda: replace(
        mapped(b"/f"), processes=(replace(GOOD, mappings=(huge(kind="file", file=1),)),)
    ),
    "a huge mapping of a small object": lambda: mapped_object(
        shared(kind="memfd", name=b"x"), huge(kind="shared", object=1, shared=True)
    ),
    "a small mapping of a huge object": lambda: mapped_object(
        huge_object(), mapping(kind="shared", object=1, shared=True)
    ),
    "a huge mapping of half a page of its object": lambda: mapped_object(
        huge_object(), huge(kind="shared", object=1, shared=True, offset=PAGE)
    ),
    "an object of half a huge page": lambda: huge_object(size=HUGE + PAGE),
    "an object of pages of 3 MiB": lambda: huge_object(6 * MIB, page_size=3 * MIB),
    "an object of no pages": lambda: huge_object(page_size=0),
    "a file of a tmpfs in huge pages": lambda: shared(size=HUGE, page_size=HUGE),
    "overlapping": lambda: maps(mapping(), mapping(BASE + CHUNK)),
    "out of order": lambda: maps(mapping(), mapping(BASE - 64 * CHUNK)),
    "not aligned": lambda: maps(mapping(BASE + 1)),
    "empty": lambda: maps(mapping(size=0)),
    "backwards": lambda: maps(mapping(size=-PAGE)),
    "negative": lambda: maps(mapping(-PAGE, PAGE)),
    "in the kernel": lambda: maps(mapping(0xFFFF_8000_0000_0000, PAGE)),
    "no vsyscall": lambda: maps(mapping(0xFFFF_8000_0000_0000, PAGE, kind="vsyscall")),
    "past the end": lambda: maps(mapping((1 << 47) - 2 * PAGE, 2 * PAGE)),
    "protection": lambda: maps(mapping(prot=8)),
    "offset": lambda: maps(mapping(offset=(1 << 63) - PAGE)),
    "no such file": lambda: maps(mapping(kind="file", file=7)),
    "no such object": lambda: maps(mapping(kind="shared", object=7, shared=True)),
    "private object": lambda: replace(
        shared(), processes=(replace(GOOD, mappings=(mapping(kind="shared", object=1),)),)
    ),
    "no thread": lambda: with_(threads=()),
    "no leader": lambda: with_(threads=(replace(LEADER, tid=101),)),
    "thread twice": lambda: with_(threads=(LEADER, LEADER)),
    "thread 0": lambda: with_(threads=(LEADER, replace(LEADER, tid=0))),
    "thread beyond": lambda: with_(threads=(LEADER, replace(LEADER, tid=1 << 22))),
    "registers": lambda: thread(registers=b"x"),
    "xstate": lambda: thread(xstate=bytes(1 << 17)),
    "mask": lambda: thread(signal_mask=-1),
    "rseq": lambda: thread(rseq=Rseq(address=-1, size=32, signature=0)),
    "robust list": lambda: thread(robust_list=(0, -8)),
    "pending": lambda: thread(pending=(b"x",)),
    "pending process": lambda: with_(pending=(bytes(129),)),
    "comm": lambda: thread(comm=b"a\0b"),
    "exe": lambda: with_(exe=b"/bin/\0cat"),
    "cwd": lambda: with_(cwd=b"/tmp/../etc"),
    "umask": lambda: with_(umask=-1),
    "pid": lambda: with_(pid=0),
    "auxv": lambda: with_(layout=replace(GOOD.layout, auxv=bytes(1 << 20))),
    "brk": lambda: with_(layout=replace(GOOD.layout, brk=-1)),
    "two processes of a pid": lambda: manifest("one", GOOD, replace(GOOD, index=1)),
    "two processes of a space": lambda: manifest("one", GOOD, process(mapping(), pid=101)),
    "space of an object": lambda: with_(index=1 << 16),
    "descriptor beyond": lambda: with_(
        files=(OpenFile(id=1, kind="files", label=""),),
        descriptors=(Descriptor(fd=1 << 20, file=1),),
    ),
    "descriptor twice": lambda: with_(
        files=(OpenFile(id=1, kind="files", label=""),),
        descriptors=(Descriptor(fd=3, file=1), Descriptor(fd=3, file=1)),
    ),
    "descriptor of nothing": lambda: with_(descriptors=(Descriptor(fd=3, file=1),)),
    "offset of a file": lambda: open_file(offset=-1),
    "flags": lambda: open_file(flags=1 << 40),
    "owner": lambda: open_file(owner=(0, 1 << 40, 0)),
    "object size": lambda: shared(size=1 << 60),
    "object below zero": lambda: shared(size=-1),
    "object id": lambda: shared(id=-1),
    "object id beyond": lambda: shared(id=(1 << 32) - 1),
    "object path": lambda: shared(name=b"/dev/shm/../../etc/passwd"),
    "object relative": lambda: shared(name=b"etc/passwd"),
    "mapped relative": lambda: mapped(b"bin/cat"),
    "mapped up": lambda: mapped(b"/bin/../etc/shadow"),
    "mapped long": lambda: mapped(b"/" + b"a" * 5000),
    "time": lambda: manifest("one", GOOD, taken_at=float("inf")),
    "no process": lambda: replace(manifest("one", GOOD), processes=()),
}


POSSIBLE = {
    "private huge pages": lambda: maps(huge(), huge(BASE + HUGE, 3 * HUGE)),
    "the rest of a mapping, moved": lambda: maps(huge(offset=HUGE)),
    "of an object": lambda: mapped_object(
        huge_object(4 * HUGE), huge(kind="shared", object=1, shared=True, offset=HUGE)
    ),
    "a small object of half a page": lambda: shared(size=1),
}


@pytest.mark.parametrize("name", POSSIBLE)
def test_what_a_take_writes_is_let_through(name: str) -> None:
    plausible.check(POSSIBLE[name]())


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_no_take_writes_is_refused(name: str, tmp_path: Path) -> None:
    """By everything that would go by it: the image in a store is sealed and well formed."""
    impossible = IMPOSSIBLE[name]()
    with pytest.raises(DamagedError, match="says what cannot be") as caught:
        plausible.check(impossible)
    assert len(caught.value.message) < 1000
    with Store.open(tmp_path / "store", create=True) as store:
        with store.begin("one") as writer:
            writer.put([raw(b"x")])
            try:
                writer.commit(replace(impossible, image="one"))
            except (SnapError, IndexError, msgspec.MsgspecError, OverflowError):
                return  # it cannot even be written
        try:
            with store.image("one") as image:
                with pytest.raises(DamagedError, match="says what cannot be"):
                    _ = image.manifest
                assert any("says what cannot be" in str(damage) for damage in image.verify())
        except DamagedError:
            assert name == "time"


def test_what_a_take_writes_is_not() -> None:
    last = mapping(0x7FFF_F000_0000, 0x7FFF_FFFF_F000 - 0x7FFF_F000_0000, name=b"[stack]")
    vsyscall = mapping(plausible.VSYSCALL, PAGE, kind="vsyscall", prot=4, name=b"[vsyscall]")
    plausible.check(maps(mapping(0, PAGE), mapping(), last, vsyscall))
    plausible.check(open_file(offset=5, owner=(1, -100, 29)))
    plausible.check(shared())


def many(field: str, value: Any, count: int, of: str = "") -> bytes:
    fields: Any = msgspec.msgpack.decode(manifests.encode(manifest("one", GOOD))[10:])
    place = fields["processes"][0] if not of else fields["processes"][0][of][0]
    place[field] = [value] * count
    return manifests.MAGIC + b"\0\1" + msgspec.msgpack.encode(fields)


BOMBS: dict[str, Callable[[], bytes]] = {
    "threads": lambda: many("threads", 0, 1 << 16),
    "mappings": lambda: many("mappings", 0, 1 << 24),
    "flags": lambda: many("vm_flags", "rd", 1 << 24, "mappings"),
    "arguments": lambda: many("cmdline", b"", 1 << 24),
    "an array that is not there": lambda: (
        manifests.MAGIC + b"\0\1" + b"\x81\xa9processes\xdd\xff\xff\xff\xff"
    ),
    "bytes that are not there": lambda: (
        manifests.MAGIC + b"\0\1" + b"\x81\xa5image\xdb\xff\xff\xff\xff"
    ),
    "nested": lambda: manifests.MAGIC + b"\0\1" + b"\x81\xa5image" + b"\x91" * (1 << 20),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_list_takes_no_memory_before_it_is_refused(name: str) -> None:
    data = BOMBS[name]()
    tracemalloc.start()
    try:
        with pytest.raises(DamagedError):
            manifests.decode(data)
        assert tracemalloc.get_traced_memory()[1] < len(data) + (1 << 20)
    finally:
        tracemalloc.stop()


def test_a_record_with_numbers_that_cannot_be(tmp_path: Path) -> None:
    from snapshot.records import ImageRecord, seal, unseal

    good = ImageRecord(
        number=1, pid=1, comm=b"", boot_id="", start_ticks=0, taken_at=1.0, saved_bytes=0,
        stored_bytes=0, manifest=b"", manifest_bytes=0, spaces=(),
    )  # fmt: skip
    space = SpaceSummary(space=0, chunks=1, digest=b"")
    assert unseal(b"a", seal(b"a", good), ImageRecord) == good
    for change in (
        {"number": -1},
        {"taken_at": float("nan")},
        {"taken_at": 1e300},
        {"spaces": (space, space)},
        {"spaces": (replace(space, chunks=-1),)},
        {"spaces": (replace(space, space=1 << 32),)},
    ):
        with pytest.raises(DamagedError):
            unseal(b"a", seal(b"a", replace(good, **change)), ImageRecord)


class Nothing:
    def addresses(self, space: int) -> list[int]:
        return []

    def chunk(self, space: int, address: int) -> None:
        return None


def test_an_object_overwrites_no_file_outside_of_a_tmpfs(tmp_path: Path) -> None:
    """Neither one that is there, nor a new one: an image is opened by root."""
    place = Path(os.environ.get("SNAP_TEST_DISK", "/var/tmp")) / f"snap-test-{os.getpid()}"
    place.mkdir()
    try:
        victim = place / "victim"
        victim.write_bytes(b"precious")
        found = victim.stat()
        for name, inode in (("victim", found.st_ino), ("new", 1)):
            one = SharedObject(
                id=1, kind="tmpfs", name=os.fsencode(place / name), device=found.st_dev,
                inode=inode, size=0, linked=True, mode=0o4755,
            )  # fmt: skip
            with pytest.raises(RestoreError, match="tmpfs"):
                objects.open_all((one,), Nothing(), [])
        assert victim.read_bytes() == b"precious"
        assert [path.name for path in place.iterdir()] == ["victim"]
    finally:
        (place / "victim").unlink()
        place.rmdir()


def test_an_object_in_a_tmpfs_is_made_without_setuid() -> None:
    name = Path(f"/dev/shm/snap-test-{os.getpid()}")
    one = SharedObject(
        id=1, kind="tmpfs", name=os.fsencode(name), device=1, inode=1, size=PAGE, linked=True,
        mode=0o6711,
    )  # fmt: skip
    opened = objects.open_all((one,), Nothing(), [])
    try:
        assert stat.S_IMODE(name.stat().st_mode) == 0o711
    finally:
        name.unlink()
        for fd in opened.values():
            os.close(fd)


# --- whose a store is -----------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> Path:
    with Store.open(tmp_path / "way" / "store", create=True) as store, store.begin("one") as writer:
        writer.commit(manifest("one"))
    return tmp_path / "way" / "store"


@pytest.mark.parametrize("name", [".", "data.mdb", "lock.mdb", "use"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_a_store_that_others_may_write_to_is_refused(made: Path, name: str, mode: int) -> None:
    place = made / name
    place.chmod(place.stat().st_mode | mode)
    with pytest.raises(StoreError, match="others may write to"):
        Store.open(made)
    place.chmod(place.stat().st_mode & ~mode)
    Store.open(made).close()


@pytest.mark.parametrize("name", ["data.mdb", "lock.mdb", "use"])
def test_a_file_of_a_store_is_no_link(made: Path, name: str) -> None:
    (made / name).rename(made.parent / name)
    (made / name).symlink_to(made.parent / name)
    with pytest.raises(StoreError, match="symbolic link"):
        Store.open(made)


def test_a_link_to_a_store_is_judged_by_where_it_leads(made: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(made)
    Store.open(tmp_path / "link").close()
    made.chmod(0o770)
    with pytest.raises(StoreError, match="others may write to"):
        Store.open(tmp_path / "link")


def test_a_way_that_everybody_may_change(made: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(made)
    made.parent.chmod(0o777)
    for path in (made, tmp_path / "link"):
        with pytest.raises(StoreError, match="everybody may write to"):
            Store.open(path)
    made.parent.chmod(0o1777)
    Store.open(made).close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("name", [".", "data.mdb", "lock.mdb", "use"])
def test_a_store_of_somebody_else_is_refused(made: Path, name: str) -> None:
    os.chown(made / name, 65534, 65534)
    with pytest.raises(StoreError, match="belongs to user 65534"):
        Store.open(made)


def test_modes_of_a_store(made: Path) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (made, *made.rglob("*"))}
    assert modes == {"store": 0o700, "data.mdb": 0o600, "lock.mdb": 0o600, "use": 0o700, "1": 0o600}


def test_a_lease_follows_no_link(made: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    (made / "use" / "1").unlink()
    (made / "use" / "1").symlink_to(tmp_path / "precious")
    with pytest.raises(StoreError, match="cannot lock"), Store.open(made) as store:
        store.image("one")


def test_a_process_is_one_of_many() -> None:
    """The limits leave room for what the issue calls every kind of target."""
    threads = tuple(replace(LEADER, tid=100 + number) for number in range(2000))
    mappings = tuple(mapping(BASE + number * CHUNK, PAGE) for number in range(10_000))
    huge = mapping(0x1000_0000_0000, 1 << 40, prot=0)
    large: Process = replace(GOOD, threads=threads, mappings=(huge, *mappings))
    data = manifests.encode(manifest("one", large))
    plausible.check(manifests.decode(data))
