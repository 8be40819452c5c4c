"""A lazy restore: what the process sees of its memory while pages are missing, whatever it does to
that memory and whoever dies meanwhile."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import get_args

import pytest

from snapshot import faults, pageserver, service
from snapshot.errors import RestoreError, SnapError
from snapshot.image import Image
from snapshot.journal import Journal
from snapshot.records import NUMBER
from snapshot.restore import Restored, restore
from snapshot.store import Store
from snapshot.take import take
from snapshot.units import CHUNK, align_down
from tests.conftest import Spawn
from tests.harness.processes import (
    become_subreaper,
    children,
    kill,
    open_files,
    state,
    wait_until,
)
from tests.live.servers import await_end, servers
from tests.live.stopped_copy import copy

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sudo pytest tests/live"),
]
SOURCE = Path(__file__).parent.parent / "targets" / "changes.c"
MIB = 16


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    become_subreaper()
    made = tmp_path_factory.mktemp("bin") / "changes"
    subprocess.run(["gcc", "-std=gnu11", "-O2", "-pthread", "-o", made, SOURCE], check=True)
    return made


@pytest.fixture(scope="module")
def place(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Image]]:
    """The working directory of `changes`, and an image of it; the process is no more."""
    directory = tmp_path_factory.mktemp("changes")
    with subprocess.Popen([program, str(MIB)], cwd=directory, stdin=subprocess.DEVNULL) as victim:
        try:
            wait_until((directory / "done").exists, "changes ready")
            copied = copy(victim.pid)
        finally:
            victim.kill()
    with copied.put(directory / "store") as image:
        yield directory, image


class Lazy:
    """A restored `changes`."""

    def __init__(self, directory: Path, restored: Restored) -> None:
        self.directory = directory
        self.restored = restored
        self.pid = restored.pid
        self._log = directory / "store" / "pageserver.log"
        self._logged = self._log.stat().st_size if self._log.exists() else 0

    @property
    def log(self) -> str:
        """What the servers of this one have had to say."""
        return self._log.read_bytes()[self._logged :].decode()

    def command(self, word: str) -> None:
        (self.directory / "do.new").write_text(word)
        (self.directory / "do.new").rename(self.directory / "do")

    def answer(self, seconds: float = 20) -> str:
        done = self.directory / "done"
        wait_until(done.exists, "an answer of changes", seconds)
        text = done.read_text()
        done.unlink()
        return text

    def does(self, word: str) -> str:
        self.command(word)
        return self.answer()

    @property
    def server(self) -> int:
        assert self.restored.server_pid is not None
        return self.restored.server_pid

    @property
    def guardian(self) -> int:
        return int(Path(f"/proc/{self.server}/stat").read_text().rpartition(")")[2].split()[1])

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            self.restored.wait()


@pytest.fixture
def lazily(
    place: tuple[Path, Image], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Lazy]:
    """A fresh one, its pages coming slowly unless asked for (parameter: ms a chunk)."""
    directory, image = place
    monkeypatch.setenv(service.PAUSE, str(getattr(request, "param", 60)))
    for name in ("do", "done"):
        (directory / name).unlink(missing_ok=True)
    lazy = Lazy(directory, restore(image, lazy=True))
    yield lazy
    lazy.end()
    await_end()


def journal_of(server: int) -> Path:
    for name, file in open_files(server).items():
        if "memfd:snap-journal" in file:
            return Path(f"/proc/{server}/fd/{name}")
    raise AssertionError(f"process {server} has no journal")


def kill_one_that_has_brought(filled: int) -> int:
    """A page server, once it has put more than `filled` pages in place -> how many there are."""
    wait_until(lambda: bool(servers("snap-pages")), "a server")
    (server,) = servers("snap-pages")
    fd = os.open(journal_of(server), os.O_RDWR | os.O_CLOEXEC)
    try:
        journal = Journal(fd)
        wait_until(lambda: journal.filled > filled, "a page that it brings")
        os.kill(server, signal.SIGKILL)
        wait_until(lambda: server not in servers(), "its end")
        return journal.filled
    finally:
        os.close(fd)


def missing(pid: int) -> bool:
    return " um" in Path(f"/proc/{pid}/smaps").read_text()


COMMANDS = (
    *("all", "dontneed", "free", "move", "grow", "unmap", "brk"),
    *("protect", "fork", "spawn", "threads", "write"),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_memory_is_right_while_pages_are_missing(lazily: Lazy, command: str) -> None:
    assert missing(lazily.pid)
    assert lazily.does(command) == "ok"


@pytest.mark.parametrize("lazily", [0], indirect=True)
@pytest.mark.parametrize("command", COMMANDS)
def test_memory_is_right_while_pages_come_fast(lazily: Lazy, command: str) -> None:
    assert lazily.does(command) == "ok"


@pytest.mark.parametrize("command", ["all", "fork"])
def test_nothing_of_ours_stays(lazily: Lazy, command: str) -> None:
    """After the last page: no userfaultfd, no registered memory, no server."""
    assert b"userfaultfd" in b"".join(links(lazily.pid))
    assert lazily.does(command) == "ok"
    assert lazily.restored.complete() is None
    assert not missing(lazily.pid)
    assert b"userfaultfd" not in b"".join(links(lazily.pid))
    await_end()
    assert lazily.does("all" if command == "all" else "spawn") == "ok"


def links(pid: int) -> list[bytes]:
    directory = f"/proc/{pid}/fd"
    return [os.readlink(os.fsencode(f"{directory}/{name}")) for name in os.listdir(directory)]


def test_a_child_outlives_the_parent_with_pages_missing(lazily: Lazy) -> None:
    assert lazily.does("orphan") == "ok"
    lazily.end()
    assert lazily.answer() == "orphan ok"


@pytest.mark.parametrize("command", ["exec", "exit"])
def test_the_server_ends_with_the_memory_it_serves(lazily: Lazy, command: str) -> None:
    lazily.command(command)
    if command == "exec":
        assert lazily.answer().strip() == "ok"
    else:
        assert lazily.restored.wait() == 5
    await_end()


@pytest.mark.parametrize("command", ["all", "move", "fork", "dontneed", "threads"])
def test_a_server_that_is_killed_is_replaced(lazily: Lazy, command: str) -> None:
    """Again and again, while the process works on memory that is missing; the first time before a
    page that it needs has come. The guardian stays who it is."""
    os.kill(lazily.server, signal.SIGSTOP)
    lazily.command(command)
    os.kill(lazily.server, signal.SIGKILL)
    done = lazily.directory / "done"
    killed = 1
    deadline = time.monotonic() + 20
    while not done.exists() and time.monotonic() < deadline and killed < 4:
        for pid in servers("snap-pages"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed += 1
    assert lazily.answer() == "ok"
    assert "starting another one" in lazily.log
    assert "the guardian ended" not in lazily.log


@pytest.mark.parametrize("lazily", [20], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_decoders_that_say_nothing_are_done_without(lazily: Lazy, number: int) -> None:
    wait_until(lambda: bool(servers("snap-decoder")), "decoders")
    for pid in servers("snap-decoder"):
        os.kill(pid, number)
    assert missing(lazily.pid)
    assert lazily.restored.complete() is None
    assert not servers("snap-decoder")
    assert lazily.does("all") == "ok"


def test_events_that_a_dead_server_had_read_are_not_lost(lazily: Lazy) -> None:
    """Memory given up stays given up, memory moved is found by the server that takes over."""
    assert lazily.does("change") == "ok"
    os.kill(lazily.server, signal.SIGKILL)
    assert lazily.does("changed") == "ok"
    assert "starting another one" in lazily.log


def test_a_guardian_that_is_killed_is_replaced(lazily: Lazy) -> None:
    guardian = lazily.guardian
    os.kill(guardian, signal.SIGKILL)
    wait_until(lambda: "takes its place" in lazily.log, "another guardian")
    os.kill(lazily.server, signal.SIGKILL)
    assert lazily.does("all") == "ok"


def test_server_and_guardian_killed_at_once_are_replaced(lazily: Lazy) -> None:
    """With a child that misses pages too: nothing of it is known to anybody else."""
    assert lazily.does("change") == "ok"
    guardian, server = lazily.guardian, lazily.server
    os.kill(guardian, signal.SIGSTOP)  # or it would start another server
    os.kill(server, signal.SIGKILL)
    os.kill(guardian, signal.SIGKILL)
    assert lazily.does("changed") == "ok"
    assert "starting another one" in lazily.log


@pytest.mark.parametrize("first", ["snap-guardian", "snap-pages"])
def test_a_child_of_the_restored_process_outlives_server_and_guardian(
    lazily: Lazy, first: str
) -> None:
    """Its userfaultfd is in their table alone."""
    lazily.command("orphan")
    wait_until(lambda: len(children(lazily.pid)) > 0, "a child with missing pages")
    for name in (first, "snap-guardian", "snap-pages"):
        for pid in servers(name):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert lazily.answer() == "ok"
    lazily.end()
    assert lazily.answer() == "orphan ok"


def test_a_keeper_that_is_killed_is_replaced(lazily: Lazy) -> None:
    wait_until(lambda: len(servers("snap-keeper")) == 1, "the keeper")
    (keeper,) = servers("snap-keeper")
    os.kill(keeper, signal.SIGKILL)
    wait_until(lambda: "the keeper ended" in lazily.log, "another keeper")
    test_server_and_guardian_killed_at_once_are_replaced(lazily)


@pytest.fixture(params=get_args(faults.Succession))
def fatal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """One guardian or keeper kills itself at a point: the first one to come there that finds this
    file. `fatal.stem` is the point."""
    file = tmp_path / f"{request.param}.once"
    monkeypatch.setenv("SNAP_FAULT", request.param)
    monkeypatch.setenv("SNAP_FAULT_ONCE", str(file))
    return file


def test_who_takes_over_is_killed_too(fatal: Path, lazily: Lazy) -> None:
    """Another one goes on, with the child that has missing pages as well."""
    assert lazily.does("change") == "ok"
    fatal.touch()
    first = lazily.guardian if fatal.stem in ("led", "followed") else lazily.server
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: not fatal.exists(), f"{fatal.stem} being reached")
    # A guardian has its name from when it has a keeper.
    both = ("snap-guardian", "snap-pages")
    wait_until(lambda: all(servers(name) for name in both), "another guardian and a server")
    for server in servers("snap-pages"):
        os.kill(server, signal.SIGKILL)
    assert lazily.does("changed") == "ok"


@pytest.mark.parametrize("lazily", [20], indirect=True)
def test_many_servers_may_be_killed_as_long_as_pages_come(lazily: Lazy) -> None:
    """Only servers that bring nothing are given up."""
    filled = 0
    for _ in range(pageserver.ATTEMPTS + 2):
        filled = kill_one_that_has_brought(filled)
    assert missing(lazily.pid)
    assert lazily.does("all") == "ok"


def test_with_nobody_left_it_hangs_and_can_be_killed(lazily: Lazy) -> None:
    """Never zeros: it waits for ever."""
    wait_until(lambda: len(servers()) == 3, "all three")
    left = servers("snap-keeper") + servers("snap-guardian") + servers("snap-pages")
    for pid in left:  # or they would start others
        os.kill(pid, signal.SIGSTOP)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not servers(), "all being dead")
    lazily.command("all")
    with pytest.raises(TimeoutError):
        lazily.answer(seconds=1)
    lazily.end()


@pytest.mark.parametrize("alone", [False, True])
def test_it_outlives_snap_restore(
    place: tuple[Path, Image], monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    """Process and server go on when the command and its session are gone."""
    directory, image = place
    monkeypatch.setenv(service.PAUSE, "20")
    (directory / "done").unlink(missing_ok=True)
    script = (
        "import sys; from pathlib import Path; from snapshot.store import Store;"
        "from snapshot.restore import restore;"
        "restored = restore(Store.open(Path(sys.argv[1])).image(sys.argv[2]), lazy=True,"
        f"alone={alone});"
        "print(restored.pid)"
    )
    command = [sys.executable, "-c", script, str(directory / "store"), image.name]
    ran = subprocess.run(
        command, capture_output=True, text=True, check=True, start_new_session=True, timeout=60
    )
    pid = int(ran.stdout)
    try:
        assert missing(pid)
        lazy = Lazy(directory, Restored(image.name, pid, "lazy", 0, _waited=pid))
        assert lazy.does("fork") == "ok"
    finally:
        kill(pid)
    await_end()


@contextmanager
def damaged_at(image: Image, address: int, store: Path) -> Iterator[Image]:
    """A copy of the image in `store`, with one damaged chunk."""
    shutil.copytree(image.store_path, store)
    damage(image, address, store)
    with Store.open(store).image(image.name) as damaged:
        yield damaged


def far_away(image: Image) -> int:
    """A chunk of the large area, that nothing touches by itself."""
    largest = max(image.mappings, key=lambda one: one.size * (one.kind == "anon"))
    return next(at for at in image.addresses(0) if at > largest.start + 4 * 1024 * 1024)


def test_a_damaged_chunk_ends_the_process(
    place: tuple[Path, Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never wrong bytes: it is killed, and the message says what is damaged."""
    directory, image = place
    monkeypatch.setenv(service.PAUSE, "20")
    store, address = tmp_path / "store", far_away(image)
    (directory / "done").unlink(missing_ok=True)
    with damaged_at(image, address, store) as damaged:
        lazy = Lazy(directory, restore(damaged, lazy=True))
        try:
            lazy.command("all")
            failure = lazy.restored.complete()
            assert failure is not None
            assert f"{address:#x}" in failure
            assert "checksum" in failure
            assert lazy.restored.wait() == -signal.SIGKILL
            assert "killed process" in (store / "pageserver.log").read_text()
        finally:
            lazy.end()
            (directory / "do").unlink(missing_ok=True)
    await_end()


def test_a_damaged_chunk_that_a_restore_itself_needs(spawn: Spawn, tmp_path: Path) -> None:
    """A call made in the process on its way meets it: one error, which says so."""
    victim = spawn("threads16")
    with take(victim.pid, store=tmp_path / "good") as image:
        victim.kill()
        rseq = image.manifest.processes[0].threads[-1].rseq
        if rseq is None:
            pytest.skip("this C library registers no rseq area")
        address = align_down(rseq.address, CHUNK)
        refused = pytest.raises(RestoreError, match=f"{address:#x}")
        with damaged_at(image, address, tmp_path / "store") as damaged, refused:
            restore(damaged, lazy=True)
    await_end()
    assert not Path(f"/proc/{victim.pid}").exists()


def test_a_damaged_chunk_ends_children_that_have_outlived_their_parent_too(
    place: tuple[Path, Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, image = place
    monkeypatch.setenv(service.PAUSE, "20")
    store = tmp_path / "store"
    (directory / "done").unlink(missing_ok=True)
    with damaged_at(image, far_away(image), store) as damaged:
        lazy = Lazy(directory, restore(damaged, lazy=True))
        try:
            assert lazy.does("orphan") == "ok"
            (child,) = children(lazy.pid)
            lazy.end()
            wait_until(lambda: state(child) in ("", "Z"), "the child being killed")
            assert not (directory / "done").exists()  # "orphan ok", or worse
            assert f"killed its child {child}" in (store / "pageserver.log").read_text()
        finally:
            lazy.end()
    await_end()


def damage(image: Image, address: int, store: Path) -> None:
    """Flips a bit of the chunk at `address`, in the file of a copy of the store."""
    entry = image._space(0).find(address)
    assert entry is not None
    with image._environment.read() as transaction:
        value = transaction.get(
            NUMBER.pack(entry.sequence), db=image._environment.databases["chunks"]
        )
        found = bytes(value)
    data = (store / "data.mdb").read_bytes()
    assert found in data
    middle = len(found) // 2
    changed = found[:middle] + bytes([found[middle] ^ 1]) + found[middle + 1 :]
    # A page that LMDB has copied is in the file twice.
    (store / "data.mdb").write_bytes(data.replace(found, changed))


def test_a_store_that_is_gone_is_an_error_before_the_process_runs(
    place: tuple[Path, Image], tmp_path: Path
) -> None:
    _, image = place
    store = tmp_path / "store"
    shutil.copytree(image.store_path, store)
    with Store.open(store).image(image.name) as opened:
        (store / "data.mdb").rename(store / "hidden")
        with pytest.raises(SnapError):
            restore(opened, lazy=True)
    await_end()
