"""A writer killed anywhere leaves whole images, and nothing that `collect` cannot remove."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import pytest

from snapshot.store import Store
from snapshot.units import CHUNK, MIB
from tests.unit.images import BASE, manifest, raw
from tests.unit.test_store import PROCESS, SELF, check, clean, noise, take, with_page

FIRST = noise(1, 12)
SECOND = {
    **FIRST,
    **noise(2, 4),
    **{at: with_page(FIRST[at], at, b"changed") for at in (5, 6, 7)},
    20: b"z" * CHUNK,
}


def story(path: Path) -> None:
    """All that a writer does: shares, stores, whole or as deltas, puts again, commits, removes,
    sweeps."""
    store = Store.open(path)
    writer = store.begin("second", SELF)
    batch = [raw(data, BASE + position * CHUNK) for position, data in SECOND.items()]
    writer.put(batch[:10])
    writer.put([raw(b"old" * CHUNK, BASE + 20 * CHUNK)._replace(data=memoryview(bytes(CHUNK)))])
    writer.put(batch[10:])
    writer.commit(manifest("second", PROCESS, taken_at=2.0))
    store.remove("first")
    store.collect()


def in_child(work: Callable[[], None]) -> int:
    """The wait status of a forked child that does `work`."""
    gc.collect()
    pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def die_at(call: int, work: Callable[[], None], counted: Path | None = None) -> None:
    """Does `work`, and kills this process with SIGKILL before its `call`-th call of a function
    written in C, in whatever thread: each use of LMDB lies between two of them."""
    done = 0

    def count(frame: object, event: str, _: object) -> None:
        nonlocal done
        if event == "c_call":
            done += 1
            if done == call:
                os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(count)
    sys.setprofile(count)
    work()
    sys.setprofile(None)
    if counted:
        counted.write_text(str(done))


def prepare(path: Path) -> None:
    with Store.open(path, create=True, map_bytes=MIB) as store:
        take(store, "first", FIRST)


def is_whole(path: Path) -> str:
    """Checks all that must hold whatever happened; returns the images that there are."""
    with Store.open(path) as store:
        names = [info.image for info in store.images()]
        for name in names:
            check(store, name, FIRST if name == "first" else SECOND)
        store.collect()
        clean(store)
        for name in names:
            check(store, name, FIRST if name == "first" else SECOND)
        if "second" not in names:
            with store.begin("second", SELF) as again:
                again.put([raw(b"x")])
            clean(store)
    gc.collect()
    return " ".join(sorted(names))


def test_killed_between_any_two_calls(tmp_path: Path) -> None:
    """At 48 points spread over the whole story."""
    counted = tmp_path / "counted"
    prepare(tmp_path / "whole")
    assert in_child(partial(die_at, -1, partial(story, tmp_path / "whole"), counted)) == 0
    total = int(counted.read_text())
    assert total > 400
    seen = set()
    for number in range(48):
        path = tmp_path / str(number)
        prepare(path)
        call = 1 + total * number // 48
        status = in_child(partial(die_at, call, partial(story, path)))
        assert status in (0, signal.SIGKILL)
        seen.add(is_whole(path))
    assert seen >= {"first", "first second", "second"}, "before the commit, after it, after rm"


def test_killed_while_the_store_is_made(tmp_path: Path) -> None:
    def make(path: Path) -> None:
        Store.open(path, create=True, map_bytes=MIB)

    counted = tmp_path / "counted"
    assert in_child(partial(die_at, -1, partial(make, tmp_path / "whole"), counted)) == 0
    total = int(counted.read_text())
    for number in range(16):
        path = tmp_path / str(number)
        call = 1 + total * number // 16
        status = in_child(partial(die_at, call, partial(make, path)))
        assert status in (0, signal.SIGKILL)
        make(path)
        prepare(path)
        is_whole(path)


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment(tmp_path: Path, seed: int) -> None:
    """One store, killed again and again, in the middle of writes too."""
    random = Random(seed)
    path = tmp_path / "store"
    prepare(path)

    def work() -> None:
        while True:
            store = Store.open(path)
            for info in store.images():
                if info.image == "second":
                    store.remove("second")
            writer = store.begin("second", SELF)
            for start in range(0, 21, 3):
                part = [position for position in SECOND if start <= position < start + 3]
                writer.put([raw(SECOND[position], BASE + position * CHUNK) for position in part])
            writer.commit(manifest("second", PROCESS, taken_at=2.0))
            if random.random() < 0.5:
                store.collect()

    for _ in range(15):
        gc.collect()
        pid = os.fork()
        if not pid:
            try:
                work()
            finally:
                os._exit(1)
        time.sleep(random.uniform(0.001, 0.06))
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        with Store.open(path) as store:
            names = {info.image for info in store.images()}
            assert "first" in names
            assert names <= {"first", "second"}
            check(store, "first", FIRST)
            if "second" in names:
                check(store, "second", SECOND)
    is_whole(path)


def test_the_next_take_removes_what_a_dead_one_left(tmp_path: Path) -> None:
    path = tmp_path / "store"
    prepare(path)

    def work() -> None:
        writer = Store.open(path).begin("second")
        writer.put([raw(data, BASE + position * CHUNK) for position, data in noise(9).items()])
        writer._handoff.drain()
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(work) == signal.SIGKILL
    store = Store.open(path)
    environment = store._environment

    def counts() -> tuple[int, int]:
        with environment.read() as transaction:
            stat = [transaction.stat(environment.databases[name]) for name in ("takes", "chunks")]
        return stat[0]["entries"], stat[1]["entries"]

    assert counts() == (1, 12 + 20)
    with store.begin("second"):
        assert counts() == (1, 12), "its own record; the name is free at once"
    assert counts() == (0, 12)
    clean(store)


def test_what_a_living_take_put_is_not_swept(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", create=True)
    take(store, "first", FIRST)
    writer = store.begin("second", SELF)
    batch = [raw(data, BASE + position * CHUNK) for position, data in SECOND.items()]
    writer.put(batch[:15])
    writer._handoff.drain()
    assert store.collect() == 0
    writer.put(batch[15:])
    writer.commit(manifest("second", PROCESS, taken_at=2.0))
    store.remove("first")
    store.collect()
    check(store, "second", SECOND)
    clean(store)
