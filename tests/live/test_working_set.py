"""A lazy restore remembers what was touched first, and the next one brings that first."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshot import service, workingset
from snapshot.errors import StoreError
from snapshot.image import Image
from snapshot.restore import restore
from snapshot.store import Store
from snapshot.take import take
from snapshot.units import CHUNK
from tests.harness.processes import become_subreaper, wait_until
from tests.live.servers import await_end

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sudo pytest tests/live"),
]
SOURCE = Path(__file__).parent.parent / "targets" / "touches.c"
TOUCHES = 60


@pytest.fixture
def place(tmp_path: Path) -> Iterator[tuple[Path, Image]]:
    """The working directory of `touches`, and an image of it; the process is no more."""
    become_subreaper()
    program = tmp_path / "touches"
    subprocess.run(["gcc", "-std=gnu11", "-O2", "-o", program, SOURCE], check=True)
    with subprocess.Popen([program, "32"], cwd=tmp_path, stdin=subprocess.DEVNULL) as victim:
        try:
            wait_until((tmp_path / "done").exists, "touches ready")
            image = take(victim.pid, store=tmp_path / "store")
        finally:
            victim.kill()
    with image:
        yield tmp_path, image


def resident_chunks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 // CHUNK


def run(directory: Path, image: Image, *, working_set: bool = True) -> int:
    """Restores it, lets it touch its chunks when 90 of its 512 are in. -> faults."""
    (directory / "done").unlink(missing_ok=True)
    restored = restore(image, lazy=True, working_set=working_set)
    try:
        wait_until(lambda: resident_chunks(restored.pid) >= 90, "90 chunks")
        (directory / "do").touch()
        wait_until((directory / "done").exists, "its answer")
        assert (directory / "done").read_text() == "0"
        assert restored.complete() is None
    finally:
        os.kill(restored.pid, signal.SIGKILL)
        restored.wait()
    await_end()
    return restored.faults


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(service.PAUSE, "8")


@pytest.mark.usefixtures("slow")
def test_the_second_restore_waits_for_less(place: tuple[Path, Image]) -> None:
    directory, image = place
    assert run(directory, image, working_set=False) > TOUCHES // 2
    assert image.touched(0) == []  # nor is it noted
    first = run(directory, image)
    assert first > TOUCHES // 2
    noted = image.touched(0)
    assert len(noted) >= first // 2
    assert set(noted) <= set(image.addresses(0))
    assert run(directory, image) < first // 4
    assert image.touched(0)[: len(noted)] == noted
    assert run(directory, image, working_set=False) > TOUCHES // 2


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("what", ["damaged", "of nowhere", "not to be written"])
def test_it_is_only_a_hint(
    place: tuple[Path, Image], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, image = place
    environment, number = image._environment, image._record.number
    if what == "not to be written":

        def fails(*_: object) -> None:
            raise StoreError("no", "")

        monkeypatch.setattr(workingset, "save", fails)  # the forked server has it too
        (directory / "done").unlink()
        restored = restore(image, lazy=True, alone=True)
        assert restored.complete() is None
        os.kill(restored.pid, signal.SIGKILL)
        restored.wait()
        await_end()
        return
    workingset.save(environment, number, 0, [0x10000, CHUNK << 20])
    if what == "damaged":
        key = b"order" + number.to_bytes(8) + bytes(4)
        environment.write(
            lambda writing: writing.put(key, b"x" * 24, db=environment.databases["meta"])
        )
        assert image.touched(0) == []
    assert run(directory, image) > TOUCHES // 2


@pytest.mark.usefixtures("slow")
def test_it_goes_with_its_image(place: tuple[Path, Image], tmp_path: Path) -> None:
    directory, image = place
    image.note_touched(0, [CHUNK])
    image.note_touched(65536, [CHUNK])
    shutil.copytree(directory / "store", tmp_path / "other")
    store = Store.open(tmp_path / "other")
    store.remove(image.name)
    environment = store._environment
    with environment.read() as transaction:
        keys = [bytes(key) for key, _ in transaction.cursor(environment.databases["meta"])]
    assert keys == [b"format", b"next image", b"next sequence"]
