"""Long proofs, run by `make stress`: the same checks as tests/live, many times in a row.

SNAP_STRESS_TIMES sets how often (default 200)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import snapshot
from snapshot.errors import TakeError
from snapshot.store import Store
from tests.conftest import Spawn
from tests.harness.takes import compared, restored

pytestmark = [
    pytest.mark.live,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif("SNAP_STRESS" not in os.environ, reason="takes long: make stress"),
]

TIMES = int(os.environ.get("SNAP_STRESS_TIMES", "200"))


def forget(store: Path, name: str) -> None:
    """Two hundred images are not kept: the newest is enough for dedup."""
    with Store.open(store) as opened:
        opened.remove(name)


@pytest.mark.parametrize("kind", ["anon", "mixed"])
def test_every_byte(spawn: Spawn, store: Path, kind: str) -> None:
    """Every byte of every image against the oracle, the writers at full speed throughout."""
    writer = spawn("writer", kind=kind, mib=96, threads=4, sparse=1, life=7200)
    for number in range(TIMES):
        assert compared(writer.pid, store, f"image-{number}") == [], f"image {number}"
        writer.healthy()
        if number:
            forget(store, f"image-{number - 1}")
        if number % 20 == 19:
            writer.verify()
            with Store.open(store) as opened:
                opened.collect()


def test_order(spawn: Spawn, store: Path) -> None:
    ordered = spawn.ordered(rings=4, pages=4000, spread=128, life=7200)
    for number in range(TIMES):
        with snapshot.take(ordered.pid, name=f"image-{number}", store=store) as image:
            assert ordered.torn(image.read) == [], f"image {number}"
        ordered.healthy()
        if number:
            forget(store, f"image-{number - 1}")


def test_sixteen_threads(spawn: Spawn, store: Path) -> None:
    """Life after life: each is taken from the one before it."""
    victim = spawn("threads16", life=7200)
    snapshot.take(victim.pid, name="image-0", store=store).close()
    victim.kill()
    for number in range(TIMES):
        with restored(victim, f"image-{number}", store, lazy=number % 2 == 0) as back:
            victim.goes_on()
            assert back.complete() is None
            snapshot.take(victim.pid, name=f"image-{number + 1}", store=store).close()
            victim.goes_on()
        forget(store, f"image-{number}")


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
def test_early_life(spawn: Spawn, store: Path, lazy: bool) -> None:
    victim = spawn("edges", mib=4, life=7200)
    snapshot.take(victim.pid, name="image", store=store).close()
    victim.kill()
    for _ in range(TIMES // 4):
        with restored(victim, "image", store, lazy):
            victim.verify()


STORMS = ["munmap", "madvise", "fork", "brk", "mremap", "protect", "threads"]


@pytest.mark.parametrize("what", STORMS)
def test_storm(spawn: Spawn, store: Path, what: str) -> None:
    """An image that is made is exact; a take that fails says so and harms nothing."""
    victim = spawn("storm", what=what, mib=8, threads=2, life=7200)
    failed = 0
    for number in range(TIMES // 4):
        try:
            assert compared(victim.pid, store, f"image-{number}") == []
        except TakeError:
            failed += 1
        victim.verify()
    print(f"{what}: {failed} of {TIMES // 4} takes could not be made exact")
    assert failed < TIMES // 8
