"""What else may be done to a store while an image of it is being served lazily."""

from __future__ import annotations

import gc
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import snapshot
from snapshot import service
from snapshot.errors import StoreError
from snapshot.image import Image
from snapshot.restore import restore
from snapshot.store import Store
from tests.harness.processes import kill, wait_until
from tests.live.servers import await_end, servers
from tests.live.stopped_copy import copy
from tests.live.test_lazy import Lazy, missing, program

__all__ = ["program"]  # a fixture
pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sudo pytest tests/live"),
]
MIB = 16


@pytest.fixture
def place(program: Path, tmp_path: Path) -> Iterator[tuple[Path, Image]]:
    with subprocess.Popen([program, str(MIB)], cwd=tmp_path, stdin=subprocess.DEVNULL) as victim:
        try:
            wait_until((tmp_path / "done").exists, "changes ready")
            copied = copy(victim.pid)
        finally:
            victim.kill()
    (tmp_path / "done").unlink()
    with copied.put(tmp_path / "store") as image:
        yield tmp_path, image


@pytest.fixture
def lazily(place: tuple[Path, Image], monkeypatch: pytest.MonkeyPatch) -> Iterator[Lazy]:
    directory, image = place
    monkeypatch.setenv(service.PAUSE, "30")
    lazy = Lazy(directory, restore(image, lazy=True))
    image.close()  # only the page server holds it now
    gc.collect()
    yield lazy
    lazy.end()
    await_end()


def test_rm_names_who_needs_it_and_gc_leaves_it(lazily: Lazy) -> None:
    path = lazily.directory / "store"
    with Store.open(path) as store:
        name = lazily.restored.image
        with pytest.raises(StoreError, match="is in use") as caught:
            store.remove(name)
        assert any(str(pid) in caught.value.message for pid in servers())
        store.collect()
        assert missing(lazily.pid)
        assert lazily.does("all") == "ok"
        assert lazily.restored.complete() is None
        await_end()
        store.remove(name)
        assert store.collect() > 0
    assert lazily.does("all") == "ok"


def test_rm_is_refused_also_while_a_server_replaces_another(lazily: Lazy) -> None:
    """The lease is the image's, not the server's."""
    with Store.open(lazily.directory / "store") as store:
        os.kill(lazily.server, 9)
        for _ in range(200):
            with pytest.raises(StoreError, match="is in use"):
                store.remove(lazily.restored.image)
            store.collect()
        assert lazily.does("all") == "ok"


def test_a_second_restore_of_the_same_image(lazily: Lazy) -> None:
    """The same pid is refused, and harms nothing; another namespace works, beside the first."""
    directory = lazily.directory
    with Store.open(directory / "store") as store, store.image(lazily.restored.image) as image:
        with pytest.raises(snapshot.errors.RestoreError, match="in use"):
            restore(image, lazy=True)
        second = restore(image, lazy=True, pid="new")
        try:
            assert missing(lazily.pid)
            # Either may take a command: they share the directory.
            for _ in range(2):
                assert lazily.does("all") == "ok"
        finally:
            kill(second.pid)
            with suppress(ChildProcessError):
                second.wait()
    assert lazily.does("all") == "ok"


def test_takes_into_the_same_store(lazily: Lazy, program: Path, tmp_path: Path) -> None:
    """Of another process, with removal and collection of what was taken, again and again."""
    other = tmp_path / "other"
    other.mkdir()
    with subprocess.Popen([program, str(MIB)], cwd=other, stdin=subprocess.DEVNULL) as victim:
        try:
            wait_until((other / "done").exists, "changes ready")
            path = lazily.directory / "store"
            for number in range(5):
                snapshot.take(victim.pid, name=f"other-{number}", store=path).close()
                with Store.open(path) as store:
                    if number:
                        store.remove(f"other-{number - 1}")
                    store.collect()
                assert lazily.does("all") == "ok"
        finally:
            victim.kill()
    with Store.open(path) as store, store.image("other-4") as image:
        assert list(image.verify()) == []
        with store.image(lazily.restored.image) as served:
            assert list(served.verify()) == []


def test_a_take_of_the_process_that_is_being_served(lazily: Lazy) -> None:
    """Refused or exact, but never with zeros for what is missing."""
    path = lazily.directory / "store"
    with (
        suppress(snapshot.errors.SnapError),
        snapshot.take(lazily.pid, name="again", store=path) as image,
    ):
        missing_then = missing(lazily.pid)
        area = max(image.mappings, key=lambda one: one.size * (one.kind == "anon"))
        for page in range(0, MIB * 256, 37):
            data = image.read(area.start + page * 4096, 8)
            wanted = 0 if page % 3 == 2 else page + 1
            assert int.from_bytes(data, "little") == wanted, (page, missing_then)
    assert lazily.does("all") == "ok"
