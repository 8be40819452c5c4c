"""Whatever the target does with its memory during a take, the image is the memory of T0.

Each operation of tests/targets/storm.c and storm_more.c alone, then mixed at random by several
threads; with memory copied ahead of T0, and with T0 at once. tests/stress/test_storm.py does
thousands. Each victim checks its own memory too.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import snapshot
from snapshot.ahead import Ahead
from snapshot.pump import Pump, Round
from snapshot.store import Store
from tests.conftest import Spawn
from tests.harness import hugepages, oracle
from tests.harness.processes import wait_until
from tests.harness.storms import MORE, SHARING, Tally, merging, swap, swapped_out
from tests.harness.takes import take_with_oracle

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("however_fast")]

MODES: dict[str, dict[str, Any]] = {
    "ahead": {"writers": "wait"},
    "now": {"now": True},
    "pass": {},  # where they can: however_fast
}
WAITING = ["ahead", "now"]
PRIVATE = {"pass": {"private": 1}}
"""Options of victims whose writers can be let through."""
SMALL = 4 << 20


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", MORE)
def test_one_operation(spawn: Spawn, store: Path, what: str, mode: str) -> None:
    private = PRIVATE.get(mode, {}) if what not in SHARING else {}
    victim = spawn("storm", what=what, mib=1, pause=1, **private)
    tally = Tally()
    tally.take(victim.pid, store, "image", **MODES[mode])
    assert (tally.torn, tally.failed) == ([], 0), str(tally)
    assert tally.passed == (mode == "pass" and what not in SHARING)
    victim.verify()
    victim.goes_on()


@pytest.mark.parametrize("mode", WAITING)
@pytest.mark.parametrize("what", ["hugetlb", "mix"])
def test_huge_pages(huge_pages: None, spawn: Spawn, store: Path, what: str, mode: str) -> None:
    victim = spawn("storm", what=what, mib=1, threads=3, pause=1, seed=5)
    tally = Tally()
    for number in range(3):
        tally.take(victim.pid, store, f"image-{number}", **MODES[mode])
        victim.verify()
    assert (tally.torn, tally.failed) == ([], 0), str(tally)
    victim.goes_on()
    wait_until(lambda: hugepages.used() > 0, "its having huge pages")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", [1, 2])
def test_mix(spawn: Spawn, store: Path, seed: int, mode: str) -> None:
    own = PRIVATE.get(mode, {})
    victim = spawn("storm", what="mix", mib=1, threads=3, pause=1, seed=seed, **own)
    tally = Tally()
    for number in range(3):
        tally.take(victim.pid, store, f"image-{number}", **MODES[mode])
        victim.verify()
    assert (tally.torn, tally.failed) == ([], 0), f"seed {seed}: {tally}"
    victim.goes_on()


@pytest.mark.parametrize("guard", ["always", "never"])
@pytest.mark.parametrize("mode", MODES)
def test_mix_with_little_staging(spawn: Spawn, store: Path, mode: str, guard: str) -> None:
    """`never` fails rather than try again, and then nothing is left; it is never torn."""
    own = PRIVATE.get(mode, {})
    victim = spawn("storm", what="mix", mib=2, threads=3, pause=1, seed=4, **own)
    tally = Tally()
    for number in range(2):
        options = {**MODES[mode], "guard": guard, "memory": SMALL}
        tally.take(victim.pid, store, f"image-{number}", **options)
        victim.verify()
    assert tally.torn == [], str(tally)
    assert tally.retried == 0
    if guard == "always":
        assert tally.failed == 0, str(tally)
    with Store.open(store) as opened:
        assert len(opened.images()) == tally.exact_at_once


@pytest.mark.parametrize("mode", MODES)
def test_swapped_out(spawn: Spawn, store: Path, tmp_path: Path, mode: str) -> None:
    with swap(tmp_path) as reason:
        if reason:
            pytest.skip(f"no swap: {reason}")
        before = swapped_out()
        victim = spawn("storm", what="cold", mib=2, pause=1, **PRIVATE.get(mode, {}))
        try:
            tally = Tally()
            for number in range(2):
                tally.take(victim.pid, store, f"image-{number}", **MODES[mode])
            assert (tally.torn, tally.failed) == ([], 0), str(tally)
            victim.verify()
            assert swapped_out() > before
        finally:
            victim.kill()  # or swapoff brings all of it back


@pytest.mark.parametrize("mode", MODES)
def test_merged(spawn: Spawn, store: Path, mode: str) -> None:
    with merging() as reason:
        if reason:
            pytest.skip(reason)
        victim = spawn("storm", what="merge", mib=2, pause=1, **PRIVATE.get(mode, {}))
        tally = Tally()
        for number in range(2):
            tally.take(victim.pid, store, f"image-{number}", **MODES[mode])
        assert (tally.torn, tally.failed) == ([], 0), str(tally)
        victim.verify()


@pytest.mark.parametrize("guard", ["always", "never"])
@pytest.mark.parametrize("mode", MODES)
def test_rounds_that_never_converge(spawn: Spawn, store: Path, mode: str, guard: str) -> None:
    """All of it is written all the time: the remainder is nearly everything, and exact."""
    writer = spawn("writer", kind="anon", mib=48, threads=2)
    memory, image = take_with_oracle(
        writer.pid, store, "image", **MODES[mode], guard=guard, memory=SMALL
    )
    with image:
        assert oracle.compare(memory, image, writer.pid) == []
        assert image.manifest.stats.attempts == 1
        assert image.manifest.stats.remainder_bytes > SMALL
        assert image.manifest.stats.writers == ("pass" if mode == "pass" else "wait")
    writer.verify()
    writer.goes_on()


def test_written_by_another_process(spawn: Spawn, store: Path) -> None:
    """process_vm_writev into protected memory waits like any other writer."""
    victim = spawn("exits", mib=64)
    start, size = victim.status().values[:2]
    libc = ctypes.CDLL(None, use_errno=True)
    ours = ctypes.create_string_buffer(b"b" * size, size)
    local = (ctypes.c_size_t * 2)(ctypes.addressof(ours), size)
    remote = (ctypes.c_size_t * 2)(start, size)
    written = []

    def write(context: object) -> None:
        written.append(libc.process_vm_writev(victim.pid, local, 1, remote, 1, 0))

    seen: list[oracle.Memory] = []
    hooks: dict[str, Callable[[object], None]] = {
        "frozen": lambda _: seen.append(oracle.read(victim.pid)),
        "resumed": write,
    }
    with snapshot.take(victim.pid, name="image", store=store, now=True, hooks=hooks) as image:
        assert oracle.compare(seen[-1], image, victim.pid) == []
        assert image.manifest.stats.attempts == 1
    assert written == [size]
    victim.healthy()


DIRECT = """
import mmap, os, signal, sys
area = mmap.mmap(-1, 24 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.write(b"x" * len(area))
opened = []
print("ready", flush=True)
for line in sys.stdin:
    if line == "open\\n":
        opened.append(os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT))
    else:
        os.close(opened.pop())
    print("done", flush=True)
"""


def test_a_file_that_was_open_for_direct_io(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a part of the copying ahead only: a device may have written past the page tables."""
    (tmp_path / "file").write_bytes(bytes(4096))
    command = [sys.executable, "-c", DIRECT, str(tmp_path / "file")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def does(word: str) -> None:
            assert process.stdin
            assert process.stdout
            process.stdin.write(f"{word}\n")
            process.stdin.flush()
            assert process.stdout.readline() == "done\n"

        def opened(pump: Pump, report: Callable[[], None], *, patient: bool) -> Round:
            does("open")
            return one_round(pump, report, patient=patient)

        def closed(ahead: Ahead, report: Callable[[], None], *, patient: bool) -> None:
            copy(ahead, report, patient=patient)
            does("close")

        one_round, copy = Pump.round, Ahead.copy
        monkeypatch.setattr(Pump, "round", opened)
        monkeypatch.setattr(Ahead, "copy", closed)
        try:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            memory, image = take_with_oracle(process.pid, store, "image", writers="wait")
            with image:
                assert oracle.compare(memory, image, process.pid) == []
                assert image.manifest.stats.rounds == 1
                assert image.manifest.stats.remainder_bytes >= 24 << 20
        finally:
            process.kill()
