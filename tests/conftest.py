"""Fixtures of the live tests: victims, a store, the `snap` command; and that nothing is left."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from snapshot.ahead import EVERYTHING
from snapshot.kernel.task_iterator import TaskProgram
from tests.harness import hugepages, kernel, last_words, processes, redis, slow_tests, victims
from tests.harness.ledger import Ledger

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    """A shell's background jobs ignore these, and so would every program that a test starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGQUIT) is signal.SIG_IGN:
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("live") is None:
            continue
        reason = kernel.why_no_root() or kernel.why_no_write_protect()
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    with slow_tests.told(item):
        result = yield
    processes.give_memory_back()
    return result


@pytest.fixture(scope="session", autouse=True)
def last_words_are_kept(request: pytest.FixtureRequest) -> Iterator[None]:
    with last_words.kept(request.config):
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left(
    last_words_are_kept: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """No process and no mount of ours outlives the tests."""
    processes.become_subreaper()
    signal.signal(signal.SIGTERM, _terminated)
    ours = str(tmp_path_factory.getbasetemp())
    yield
    left = _end_leftovers()
    problems = [f"processes: {', '.join(left)}"] if left else []
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    problems += [f"mount: {line}" for line in mounts if ours in line]
    assert not problems, f"the tests left {'; '.join(problems)}"


def _terminated(number: int, frame: object) -> None:
    """A session that is ended from outside takes its processes along, as with Ctrl-C."""
    pytest.exit("ended by SIGTERM", 128 + number)


def _end_leftovers(before: frozenset[int] = frozenset()) -> list[str]:
    """Ends and reaps what is below us and was not there before; names what still ran."""
    found = [pid for pid in processes.descendants(os.getpid()) if pid not in before]
    # A helper of Python's own, once for each process that uses multiprocessing.
    found = [pid for pid in found if not _is_resource_tracker(pid)]
    # What was just told to end, or waits for another one's end, gets a moment for it.
    with suppress(TimeoutError):
        processes.wait_until(lambda: _all_ended(found), "the end of what a test started", 2.0)
    running = [pid for pid in found if not processes.ended(pid)]
    named = [f"{pid} {processes.command_line(pid)}" for pid in running]
    processes.kill_all(running)
    return named


def _all_ended(pids: list[int]) -> bool:
    return all(processes.ended(pid) for pid in pids)


def _is_resource_tracker(pid: int) -> bool:
    if processes.stat_fields(pid)[1:2] != [str(os.getpid())]:
        return False
    from multiprocessing import resource_tracker

    return getattr(resource_tracker._resource_tracker, "_pid", None) == pid


@pytest.fixture(autouse=True)
def ends_what_it_starts(request: pytest.FixtureRequest) -> Iterator[None]:
    """A live test that leaves a process behind fails, by name; the process is ended."""
    if request.node.get_closest_marker("live") is None:
        yield
        return
    before = frozenset(processes.descendants(os.getpid()))
    yield
    left = _end_leftovers(before)
    assert not left, f"left running: {', '.join(left)}"


class Reap:
    """Pids to be ended after the test: restored processes and their page servers."""

    def __init__(self) -> None:
        self.pids: list[int] = []

    def add(self, *pids: int | None) -> None:
        self.pids += [pid for pid in pids if pid]

    def kill(self, pid: int) -> None:
        """Now, and until the pid is free again."""
        processes.kill(pid)

    def end(self) -> None:
        processes.kill_all(self.pids)
        self.pids.clear()


@pytest.fixture
def reap() -> Iterator[Reap]:
    registry = Reap()
    yield registry
    registry.end()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    """Where a store may be made; removed at once, as pytest keeps its directories for a while."""
    yield tmp_path / "store"
    shutil.rmtree(tmp_path / "store", ignore_errors=True)


@pytest.fixture
def however_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writers can be let through however fast they are: all that is left is copied in the pause.
    And T0 does with a list of faults however small they are, and whatever they unmap."""
    for module, limit, value in (
        ("snapshot.ahead", "MOST_WRITTEN", EVERYTHING),
        ("snapshot.ahead", "MOST_LEFT", EVERYTHING),
        ("snapshot.take", "MOST_PASSED", EVERYTHING),
        ("snapshot.ahead", "LISTED", 0),
        ("snapshot.ahead", "PAGES_EACH", 1),
        ("snapshot.ahead", "QUIET", 0),
    ):
        monkeypatch.setattr(importlib.import_module(module), limit, value)


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where writers are let through T0 does with a list of faults, however little memory it is, and
    however much of it was written since a look: with little memory looks are short, and the one
    that counts may lie 20 ms back."""
    with TaskProgram() as program:
        if program.error:
            pytest.skip(f"nobody lists faults: {os.strerror(-program.error)}")
    ahead = importlib.import_module("snapshot.ahead")
    monkeypatch.setattr(ahead, "LISTED", 0)
    monkeypatch.setattr(ahead, "PAGES_EACH", 1)


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """40 huge pages that nobody else has. Asked for before `spawn`, whose victims have them."""
    try:
        with hugepages.more(40):
            yield
    except hugepages.Unavailable as reason:
        pytest.skip(f"{reason}; as root: echo 40 > /proc/sys/vm/nr_hugepages")


class Spawn:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.started: list[victims.Victim] = []

    def _place(self, name: str) -> Path:
        place = self.directory / f"{name}-{len(self.started)}"
        place.mkdir()
        return place

    def __call__(self, name: str, **options: object) -> victims.Victim:
        """A victim of tests/targets by name; options as its source says."""
        return self._keep(victims.c_victim(self._place(name), name, **options))

    def by(self, prefix: tuple[str, ...], name: str, **options: object) -> victims.Victim:
        """The same, executed by a command: setpriv, unshare."""
        return self._keep(victims.c_victim(self._place(name), name, *prefix, **options))

    def powerless(self, name: str, **options: object) -> victims.Victim:
        """The same without any capability: it may not make a userfaultfd itself."""
        return self.by(("setpriv", "--bounding-set=-all", "--inh-caps=-all"), name, **options)

    def ordered(self, **options: object) -> victims.Ordered:
        victim = self("ordered", **options)
        assert isinstance(victim, victims.Ordered)
        return victim

    def python(self, **options: object) -> victims.PyApp:
        app = victims.python_app(self._place("python"), **options)
        self._keep(app)
        return app

    def _keep(self, victim: victims.Victim) -> victims.Victim:
        self.started.append(victim)
        return victim

    def end(self) -> None:
        for victim in self.started:
            victim.kill()


@pytest.fixture
def spawn(tmp_path: Path, reap: Reap) -> Iterator[Spawn]:
    """Starts victims, and ends them (restored ones too) after the test."""
    spawning = Spawn(tmp_path)
    yield spawning
    spawning.end()


@dataclass
class Ran:
    """What a run of the command did."""

    code: int
    json: Any  # None when stdout was no JSON
    out: str
    err: str
    started: list[int] = field(default_factory=list)


class Snap:
    """Runs the `snap` command on one store."""

    def __init__(self, directory: Path, store: Path, reap: Reap) -> None:
        self.directory = directory
        self.store = store
        self.reap = reap
        installed = Path(sys.executable).parent / "snap"
        script = [sys.executable, str(ROOT / "cli.py")]
        self.command = [str(installed)] if installed.exists() else script
        self.runs = 0

    def __call__(
        self,
        *arguments: object,
        json_output: bool = True,
        store: Path | None = None,
        prefix: tuple[str, ...] = (),
        seconds: float = 120.0,
        ok: bool = True,
    ) -> Ran:
        """`snap ARGUMENTS --store DIR --json`; `ok` demands exit code 0.

        stdout and stderr are files: what it leaves behind (a restored process) may hold them open.
        """
        words = [*prefix, *self.command, *map(str, arguments), "--store", str(store or self.store)]
        if json_output:
            words.append("--json")
        self.runs += 1
        paths = [self.directory / f"snap-{self.runs}.{kind}" for kind in ("out", "err")]
        with paths[0].open("wb") as out, paths[1].open("wb") as err:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
            try:
                code = process.wait(seconds)
            except BaseException:
                process.kill()
                process.wait()
                print(paths[1].read_text(errors="replace"), file=sys.stderr)
                raise
        text, errors = (path.read_text(errors="replace") for path in paths)
        try:
            found = json.loads(text) if json_output else None
        except json.JSONDecodeError:
            found = None
        ran = Ran(code, found, text, errors)
        if isinstance(found, dict) and arguments[:1] == ("restore",) and code == 0:
            self.reap.add(found.get("pid"), found.get("server_pid"))
        if ok:
            assert code == 0, f"{' '.join(words)}: exit code {code}\n{errors}\n{text}"
        return ran

    def names(self) -> list[str]:
        """Images in the store; a store that was not made holds none."""
        if not (self.store / "data.mdb").exists():
            return []
        return [entry["image"] for entry in self("list").json]


@pytest.fixture
def snap(tmp_path: Path, store: Path, reap: Reap) -> Snap:
    return Snap(tmp_path, store, reap)


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[Callable[..., redis.Redis]]:
    """Starts redis-server(s); skipped, with the reason, where there is none."""
    if redis.SERVER is None:
        pytest.skip("no redis-server here: apt-get install redis-server")
    started: list[redis.Redis] = []

    def start(*arguments: str) -> redis.Redis:
        place = tmp_path / f"redis-{len(started)}"
        place.mkdir()
        started.append(redis.Redis(place, *arguments))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def load() -> Iterator[Callable[..., Ledger]]:
    """Starts the clients of tests/harness/ledger.py."""
    started: list[Ledger] = []

    def start(address: redis.Address, clients: int = 20) -> Ledger:
        started.append(Ledger(address, clients))
        return started[-1]

    yield start
    for one in started:
        if one.process.returncode is None:
            one.kill()
