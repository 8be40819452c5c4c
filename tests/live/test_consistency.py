"""Every byte of an image is the byte at T0.

Two proofs. In the `frozen` hook, with every thread stopped, the oracle reads the target's memory by
a path of its own, and afterwards every byte of the image is compared with it. And programs whose
memory has an order that only a single instant shows are read from the image as data.
"""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path

import pytest

import snapshot
from snapshot.ahead import EVERYTHING
from snapshot.errors import TakeError
from snapshot.store import Store
from tests.conftest import Spawn
from tests.harness import oracle
from tests.harness.takes import compared, restored, take_with_oracle

pytestmark = pytest.mark.live

TIMES = 4
"""Takes of each writer here; `make stress` does 200 in a row."""

WRITERS = [
    {"kind": "anon", "mib": 96, "threads": 2},
    {"kind": "anon", "mib": 64, "threads": 4, "sparse": 1},
    {"kind": "thp", "mib": 96, "threads": 2},
    {"kind": "many", "mib": 64, "threads": 2, "sparse": 1},
    {"kind": "memfd", "mib": 64, "threads": 2},
    {"kind": "shm", "mib": 64, "threads": 2, "sparse": 1},
    {"kind": "brk", "mib": 64, "threads": 2},
    {"kind": "stack", "threads": 2},
    {"kind": "data", "threads": 2},
    {"kind": "file", "mib": 16, "threads": 2},
    {"kind": "ro", "mib": 16, "threads": 1},
    {"kind": "mixed", "mib": 96, "threads": 4, "sparse": 1},
    {"kind": "anon", "mib": 96, "threads": 2, "rate": 5000},
]


def label(options: dict[str, object]) -> str:
    return "-".join(str(value) for value in options.values())


@pytest.mark.usefixtures("however_fast")
@pytest.mark.parametrize("options", WRITERS, ids=label)
def test_every_byte_of_a_writer(spawn: Spawn, store: Path, options: dict[str, object]) -> None:
    """Some takes let it through wherever that can be."""
    writer = spawn("writer", **options)
    for number in range(TIMES):
        writers = "auto" if number % 2 else "wait"
        assert compared(writer.pid, store, f"image-{number}", writers=writers) == []
        writer.healthy()
    writer.verify()
    writer.goes_on()


@pytest.mark.parametrize("pace", ["64M", "40%"])
def test_every_byte_at_a_pace(spawn: Spawn, store: Path, pace: str) -> None:
    writer = spawn("writer", kind="anon", mib=32, threads=2, rate=2000)
    assert compared(writer.pid, store, "ahead", pace=pace) == []
    assert compared(writer.pid, store, "now", pace=pace, now=True) == []
    writer.verify()


def test_a_write_waits_for_no_pace(spawn: Spawn, store: Path) -> None:
    writer = spawn("writer", kind="anon", mib=64, threads=2)
    memory, image = take_with_oracle(writer.pid, store, "slow", pace="1M", now=True)
    with image:
        assert not list(oracle.compare(memory, image, writer.pid))
        stats = image.manifest.stats
        assert stats.fault_chunks > stats.sweep_chunks  # alone it would take a minute
    writer.verify()


@pytest.mark.parametrize("memory", [4 << 20, None], ids=["spilled", "staged"])
def test_who_writes_here_and_there_waits_for_pages(
    spawn: Spawn, store: Path, memory: int | None
) -> None:
    """After T0 a page is saved for each fault, and put into its chunk later."""
    writer = spawn("writer", kind="anon", mib=64, threads=2, sparse=1, rate=3000)
    more = {} if memory is None else {"memory": memory}
    for number in range(TIMES):
        before, image = take_with_oracle(writer.pid, store, f"image-{number}", now=True, **more)
        with image:
            assert oracle.compare(before, image, writer.pid) == []
            stats = image.manifest.stats
        assert stats.fault_pages > 100
        assert stats.fault_chunks < stats.sweep_chunks
    writer.verify()
    writer.goes_on()


def test_a_chunk_that_is_copied_whole_needs_its_good_pages_too(spawn: Spawn, store: Path) -> None:
    """At T0 many chunks have a copy that lacks more pages than a patch takes. A page that it has is
    let through at a fault, and still belongs to what is copied then."""
    writer = spawn("writer", kind="anon", mib=192, threads=2, sparse=1, rate=20_000)
    for number in range(2):
        memory, image = take_with_oracle(
            writer.pid, store, f"image-{number}", pace="64M", writers="wait"
        )
        with image:
            assert oracle.compare(memory, image, writer.pid) == []
            stats = image.manifest.stats
        assert (stats.attempts, stats.retry_reasons) == (1, ())
        assert stats.fault_pages > 1000
        assert stats.ahead_bytes > 32 << 20
    writer.verify()


def test_memory_that_is_written_everywhere_is_copied_once(spawn: Spawn, store: Path) -> None:
    """A first round that writers undo is given up, and what it lacks is saved after T0; not so when
    the remainder is to be copied in the pause."""
    writer = spawn("writer", kind="anon", mib=192, threads=2, sparse=1)
    memory, image = take_with_oracle(writer.pid, store, "once", pace="64M", writers="wait")
    with image:
        assert oracle.compare(memory, image, writer.pid) == []
        stats = image.manifest.stats
    assert (stats.attempts, stats.rounds, stats.remainder_bytes > 64 << 20) == (1, 1, True)
    assert stats.ahead_bytes < stats.saved_bytes // 2
    memory, image = take_with_oracle(
        writer.pid, store, "patient", pace="64M", guard="always", writers="wait"
    )
    with image:
        assert oracle.compare(memory, image, writer.pid) == []
        stats = image.manifest.stats
    assert stats.ahead_bytes > 100 << 20
    writer.verify()


def test_t0_looks_at_what_faults_list(listed: None, spawn: Spawn, store: Path) -> None:
    writer = spawn("writer", kind="anon", mib=128, threads=2, sparse=1, rate=500)
    used = 0
    for number in range(TIMES):
        memory, image = take_with_oracle(writer.pid, store, f"image-{number}", writers="pass")
        with image:
            assert oracle.compare(memory, image, writer.pid) == []
            stats = image.manifest.stats
        assert (stats.attempts, stats.retry_reasons) == (1, ())
        used += stats.listed
    assert used
    writer.verify()
    writer.goes_on()


def test_every_byte_of_python(spawn: Spawn, store: Path) -> None:
    app = spawn.python(mib=32)
    for number in range(TIMES):
        assert compared(app.pid, store, f"image-{number}") == []
    app.verify()
    app.goes_on()


def test_every_byte_of_sixteen_threads(spawn: Spawn, store: Path) -> None:
    victim = spawn("threads16")
    for number in range(TIMES):
        assert compared(victim.pid, store, f"image-{number}") == []
        victim.goes_on()


STORMS = ["munmap", "madvise", "fork", "brk", "mremap", "protect", "threads"]


@pytest.mark.parametrize("what", STORMS)
def test_every_byte_in_a_storm(spawn: Spawn, store: Path, what: str) -> None:
    """Memory comes, goes and moves while it is being saved. An image that was made is exact; one
    that cannot be made is an error and leaves nothing."""
    victim = spawn("storm", what=what, mib=4)
    for number in range(TIMES):
        assert compared(victim.pid, store, f"image-{number}") == []
        victim.verify()
    victim.goes_on()


def test_small_staging(spawn: Spawn, store: Path) -> None:
    """A budget far below what is written: it spills or makes writers wait, and stays exact."""
    writer = spawn("writer", kind="anon", mib=96, threads=4)
    memory, image = take_with_oracle(writer.pid, store, "tight", memory=4 << 20)
    with image:
        assert oracle.compare(memory, image, writer.pid) == []
        assert image.manifest.stats.peak_staging_bytes <= 4 << 20
    writer.verify()


def test_images_in_one_store(spawn: Spawn, store: Path) -> None:
    """Images share chunks; each keeps its own instant, also when others are removed."""
    writer = spawn("writer", kind="anon", mib=48, rate=2000)
    taken = [take_with_oracle(writer.pid, store, f"image-{n}") for n in range(5)]
    for memory, image in taken:
        assert oracle.compare(memory, image, writer.pid) == []
        image.close()
    with Store.open(store) as opened:
        for name in ("image-0", "image-2", "image-3"):
            opened.remove(name)
        opened.collect()
    for number in (1, 4):
        with snapshot.open_image(f"image-{number}", store=store) as image:
            assert oracle.compare(taken[number][0], image, writer.pid) == []
            assert list(image.verify()) == []


ORDERED = [
    {"rings": 1, "pages": 4000},
    {"rings": 4, "pages": 2000, "spread": 64},
    {"rings": 3, "pages": 1000, "spread": 64, "relay": 1},
]


@pytest.mark.parametrize("options", ORDERED, ids=label)
def test_order_in_an_image(spawn: Spawn, store: Path, options: dict[str, int]) -> None:
    """Black box: no hook, nothing but the image."""
    ordered = spawn.ordered(**options)
    newest = 0
    for number in range(TIMES * 2):
        with snapshot.take(ordered.pid, name=f"image-{number}", store=store) as image:
            assert ordered.torn(image.read) == []
            first = int.from_bytes(image.read(ordered.rings()[0][0], 8), "little")
            assert first >= newest, "an image from before the one before it"
            newest = first
        ordered.goes_on()


def test_order_survives_restore(spawn: Spawn, store: Path) -> None:
    """The program itself checks its order from the first increment after the restore."""
    ordered = spawn.ordered(rings=3, pages=1000, spread=64)
    snapshot.take(ordered.pid, name="image", store=store).close()
    ordered.kill()
    for lazy in (True, False):
        with restored(ordered, "image", store, lazy):
            ordered.goes_on()


def test_two_images_at_once(spawn: Spawn, store: Path) -> None:
    """Two targets into one store at the same time, each by its own `snap take`."""
    import concurrent.futures

    writers = [spawn("writer", mib=48), spawn("writer", mib=48)]
    names = [f"writer-{number}" for number in range(2)]
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        pairs = zip(writers, names, strict=True)
        work = [pool.submit(compared, writer.pid, store, name) for writer, name in pairs]
        assert list(itertools.chain(*(one.result() for one in work))) == []
    for writer in writers:
        writer.verify()


def test_who_writes_little_waits_for_nobody(spawn: Spawn, store: Path) -> None:
    """What is written in a few ms is little, so he is let through; what he has written again is
    copied again, and the image says so."""
    writer = spawn("writer", kind="anon", mib=96, threads=2, sparse=1, rate=2000)
    for number in range(TIMES):
        memory, image = take_with_oracle(writer.pid, store, f"image-{number}")
        with image:
            assert oracle.compare(memory, image, writer.pid) == []
            stats = image.manifest.stats
        assert (stats.writers, stats.attempts, stats.faults) == ("pass", 1, 0)
        assert stats.rounds > 1
        assert stats.remainder_bytes < 8 << 20
    writer.verify()
    writer.goes_on()


def test_who_writes_everything_has_to_wait(spawn: Spawn, store: Path) -> None:
    writer = spawn("writer", kind="anon", mib=96, threads=2, sparse=1)
    memory, image = take_with_oracle(writer.pid, store, "image")
    with image:
        assert oracle.compare(memory, image, writer.pid) == []
        stats = image.manifest.stats
    assert (stats.writers, stats.attempts, stats.retry_reasons) == ("wait", 1, ())
    with pytest.raises(TakeError, match="are written in 5 ms") as raised:
        snapshot.take(writer.pid, store=store, name="other", writers="pass")
    assert "--writers wait" in raised.value.hint
    with Store.open(store) as opened:
        assert [info.image for info in opened.images()] == ["image"]
    writer.verify()
    writer.goes_on()


def test_what_is_written_faster_and_faster(
    spawn: Spawn, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """He is let through at first; then more is left than can be copied while he stands still."""
    monkeypatch.setattr(importlib.import_module("snapshot.ahead"), "MOST_WRITTEN", EVERYTHING)
    writer = spawn("writer", kind="anon", mib=96, threads=2, sparse=1)
    memory, image = take_with_oracle(writer.pid, store, "image")
    with image:
        assert oracle.compare(memory, image, writer.pid) == []
        stats = image.manifest.stats
    assert (stats.writers, stats.attempts) == ("wait", 1)
    monkeypatch.setattr(importlib.import_module("snapshot.ahead"), "MOST_LEFT", EVERYTHING)
    with pytest.raises(TakeError, match="had been written again at T0"):
        snapshot.take(writer.pid, store=store, name="other", writers="pass")
    writer.verify()
    writer.goes_on()


def test_whose_writers_cannot_be_let_through(spawn: Spawn, store: Path) -> None:
    victim = spawn("writer", kind="memfd", mib=8, threads=1, rate=100)
    with pytest.raises(TakeError, match="have to wait"):
        snapshot.take(victim.pid, store=store, name="image", writers="pass")
    with pytest.raises(ValueError, match="`now`"):
        snapshot.take(victim.pid, store=store, name="image", writers="pass", now=True)
    victim.goes_on()
