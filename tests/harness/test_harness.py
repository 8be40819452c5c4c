"""The tests' own tools are shown to work without snap: victims, oracle, ledger, process keeping.

A checker counts only when it finds what it is there for, so each is given memory that is torn, a
byte that is flipped, a thread that stands still.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import ROOT, Spawn
from tests.harness import ledger, oracle, processes, redis, victims
from tests.harness.ledger import Ledger
from tests.harness.oracle import PAGE
from tests.harness.victims import Victim


def stopped(pid: int) -> bool:
    """Every thread of it: the others stop a little after the first."""
    states = []
    for task in os.listdir(f"/proc/{pid}/task"):
        text = Path(f"/proc/{pid}/task/{task}/stat").read_text()
        states.append(text[text.rindex(")") + 2])
    return all(state == "T" for state in states)


@contextmanager
def standing(pid: int) -> Iterator[None]:
    """SIGSTOP for as long as the block lasts: an instant without snap."""
    os.kill(pid, signal.SIGSTOP)
    try:
        processes.wait_until(lambda: stopped(pid), f"{pid} being stopped")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


class LiveMemory:
    """The memory of a process as it is while being read: a torn image."""

    def __init__(self, pid: int) -> None:
        self.fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY)

    def read(self, address: int, length: int) -> bytes:
        return os.pread(self.fd, length, address)

    def close(self) -> None:
        os.close(self.fd)


class Recorded:
    """An image made of what the oracle read, with bytes flipped at will."""

    def __init__(self, memory: oracle.Memory) -> None:
        self.memory = memory
        self.flipped: dict[int, int] = {}

    def read(self, address: int, length: int) -> bytes:
        try:
            data = bytearray(self.memory.at(address, length))
        except KeyError:
            data = bytearray(length)
        for at, bits in self.flipped.items():
            if address <= at < address + length:
                data[at - address] ^= bits
        return bytes(data)


KINDS = ["anon", "thp", "many", "memfd", "shm", "brk", "stack", "data", "file", "ro", "mixed"]


@pytest.mark.parametrize("kind", KINDS)
def test_writer_checks_its_memory(spawn: Spawn, kind: str) -> None:
    writer = spawn("writer", kind=kind, mib=8, sparse=1)
    writer.goes_on()
    writer.verify()


def test_writer_finds_a_changed_byte(spawn: Spawn) -> None:
    writer = spawn("writer", mib=8, threads=2)
    start, size = writer.status().values[1:3]
    # The middle of a page: the next writes will most likely go elsewhere.
    with open(f"/proc/{writer.pid}/mem", "r+b", buffering=0) as memory, standing(writer.pid):
        for page in range(0, size, PAGE):
            os.pwrite(memory.fileno(), b"\xff", start + page + 2048)
    with pytest.raises(AssertionError, match="is not of generation"):
        writer.verify()


def test_writer_finds_a_page_from_the_past(spawn: Spawn) -> None:
    """A page of an earlier instant is right in itself: only the ledger tells."""
    writer = spawn("writer", mib=8, threads=2)
    start, size = writer.status().values[1:3]
    with open(f"/proc/{writer.pid}/mem", "r+b", buffering=0) as memory:
        with standing(writer.pid):
            old = os.pread(memory.fileno(), size, start)
        writer.goes_on()
        with standing(writer.pid):
            os.pwrite(memory.fileno(), old, start)
    with pytest.raises(AssertionError, match=r"the ledger says|lacks its last write"):
        writer.verify()


ORDERED = [
    {"rings": 1, "pages": 2000},
    {"rings": 4, "pages": 1000, "spread": 64},
    {"rings": 3, "pages": 500, "spread": 32, "relay": 1},
]


@pytest.mark.parametrize("options", ORDERED)
def test_order_holds_at_an_instant(spawn: Spawn, options: dict[str, int]) -> None:
    ordered = spawn.ordered(**options)
    ordered.goes_on()
    memory = LiveMemory(ordered.pid)
    for _ in range(20):
        with standing(ordered.pid):
            assert ordered.torn(memory.read) == []
    memory.close()
    ordered.healthy()


@pytest.mark.parametrize("options", ORDERED[:2])
def test_order_shows_tearing(spawn: Spawn, options: dict[str, int]) -> None:
    """Read while it runs: of several instants, and the checker says so."""
    ordered = spawn.ordered(**options)
    memory = LiveMemory(ordered.pid)
    torn = [problem for _ in range(10) for problem in ordered.torn(memory.read)]
    memory.close()
    assert torn


def test_order_shows_one_old_page(spawn: Spawn) -> None:
    ordered = spawn.ordered(rings=1, pages=256)
    memory = LiveMemory(ordered.pid)
    address = ordered.rings()[0][100]
    with standing(ordered.pid):
        before = memory.read(address, 8)
    ordered.goes_on()
    with standing(ordered.pid):

        def read(at: int, length: int) -> bytes:
            return before if at == address else memory.read(at, length)

        assert ordered.torn(memory.read) == []
        assert any("counter 100" in problem for problem in ordered.torn(read))
    memory.close()


@pytest.mark.parametrize(
    ("counts", "right"),
    [
        ([5, 5, 5], True),
        ([5, 5, 4], True),
        ([5, 4, 4], True),
        ([5, 4, 3], False),
        ([4, 5, 5], False),
        ([5, 4, 5], False),
        ([5, 0, 0], False),
        ([0, 0, 0], True),
    ],
)
def test_order_rule(counts: list[int], right: bool) -> None:
    assert (victims.out_of_order(counts) == []) == right


def test_threads16_lives(spawn: Spawn) -> None:
    victim = spawn("threads16")
    assert len(os.listdir(f"/proc/{victim.pid}/task")) == 16
    victim.goes_on()


def test_threads16_sees_an_eintr(spawn: Spawn) -> None:
    """SIGSTOP and SIGCONT do what a take must not: epoll_wait returns EINTR."""
    victim = spawn("threads16")
    victim.goes_on()
    for _ in range(20):
        with standing(victim.pid):
            pass
    with pytest.raises(AssertionError, match="epoll_wait"):
        victim.goes_on()


def test_a_lane_that_stands_still_is_seen(spawn: Spawn) -> None:
    victim = spawn("writer", mib=4)
    with standing(victim.pid), pytest.raises(TimeoutError):
        victim.goes_on(seconds=0.3)


@pytest.mark.parametrize(
    "what", ["munmap", "madvise", "fork", "brk", "mremap", "protect", "threads"]
)
def test_storms(spawn: Spawn, what: str) -> None:
    victim = spawn("storm", what=what, mib=2, threads=1)
    victim.goes_on()
    victim.verify()


def test_edges(spawn: Spawn) -> None:
    victim = spawn("edges", mib=2)
    for _ in range(2):
        victim.verify()


@pytest.mark.parametrize(
    ("how", "status"),
    [("exit", 7), ("group", 7), ("exec", 0), ("abort", -6), ("segv", -11), ("kill", -9)],
)
def test_exits(spawn: Spawn, how: str, status: int) -> None:
    victim = spawn("exits", how=how)
    victim.signal(signal.SIGUSR1)
    assert victim.process.wait(20) == status


def test_python_app(spawn: Spawn) -> None:
    app = spawn.python(mib=4)
    app.goes_on()
    app.verify()
    assert app.ask()["progress"]["bank"] > 0
    assert app.ask(unix=True)["pid"] == app.pid


# --- the oracle ---------------------------------------------------------------------------------


@pytest.fixture
def writer(spawn: Spawn) -> Victim:
    return spawn("writer", kind="mixed", mib=32, sparse=1)


def test_oracle_reads_everything(writer: Victim) -> None:
    with standing(writer.pid):
        memory = oracle.read(writer.pid)
        again = oracle.read(writer.pid)
    assert memory.size > 20 << 20
    assert memory == again
    assert oracle.compare(memory, Recorded(again), writer.pid) == []
    # The writer's first kind of memory is there as the program itself knows it.
    start, size = writer.status().values[1:3]
    assert memory.at(start, PAGE) != bytes(PAGE)
    holes = {hole for hole in memory.holes if start <= hole[0] < start + size}
    for begin, end in holes:
        assert (begin - start) // PAGE % 8 == 7, f"{begin:#x}-{end:#x} is not empty by design"


def test_oracle_sees_private_changes_of_files(writer: Victim) -> None:
    """.data, .bss and a private mapping: the program's bytes, not the file's."""
    with standing(writer.pid):
        memory = oracle.read(writer.pid)
    private = [line for line in oracle.maps(writer.pid) if line.name.endswith("status.private")]
    assert private
    assert memory.at(private[0].start, PAGE) != b"\x5a" * PAGE


def test_oracle_finds_one_flipped_bit(writer: Victim) -> None:
    with standing(writer.pid):
        memory = oracle.read(writer.pid)
    image = Recorded(memory)
    start, data = memory.data[len(memory.data) // 2]
    hole = next(begin for begin, end in memory.holes if end - begin == PAGE)
    for address in (start, start + len(data) - 1, memory.data[-1][0] + 77, hole, hole + PAGE - 1):
        image.flipped = {address: 0x10}
        (found,) = oracle.compare(memory, image, writer.pid)
        assert found.address == address
        assert hex(address) in str(found)
        assert found.length == PAGE


def test_oracle_finds_tearing(writer: Victim) -> None:
    with standing(writer.pid):
        memory = oracle.read(writer.pid)
    writer.goes_on()
    live = LiveMemory(writer.pid)

    def torn() -> bool:
        # Not their number: the more is torn, the more of it is one difference.
        found = oracle.compare(memory, live, writer.pid)
        return sum(difference.length for difference in found) > 100 * PAGE

    # How soon the writer has got around is the scheduler's business.
    processes.wait_until(torn, "a hundred torn pages")
    live.close()


# --- redis --------------------------------------------------------------------------------------


def test_redis_data_is_known(redis_server: Callable[..., redis.Redis]) -> None:
    server = redis_server()
    keys = server.fill(8)
    assert server.wrong_values() == []
    with server.client(tcp=True) as client:
        assert client("DBSIZE") == keys
        client("SETRANGE", "key:100", 40, "x")
        client("DEL", "key:200")
        assert client("SAVE") == "OK"
    assert server.wrong_values() == [100, 200]
    assert (server.directory / "dump.rdb").exists()


def test_ledger_counts(
    redis_server: Callable[..., redis.Redis], load: Callable[..., Ledger]
) -> None:
    server = redis_server()
    clients = load(server.socket_path)
    clients.works()
    with server.client() as client:
        # Each MGET is of one instant for the keys of one client.
        for _ in range(20):
            assert [p for counts in ledger.read(client, 20) if (p := ledger.problems(counts))] == []
    report = clients.stop()
    assert report.errors == 0, report.first_error
    assert report.operations > 2000
    assert 0 < report.p50_ms <= report.p99_ms <= report.max_ms
    with server.client() as client:
        found = ledger.read(client, 20)
    # Stopped in the middle: the server may have carried out one command more than was answered.
    assert all(
        0 <= sum(there) - sum(told) <= 1
        for there, told in zip(found, report.acknowledged, strict=True)
    )


def test_ledger_notices(
    redis_server: Callable[..., redis.Redis], load: Callable[..., Ledger]
) -> None:
    server = redis_server()
    clients = load(server.socket_path, 4)
    clients.works(200)
    with server.client() as client:
        client("INCR", "ledger:2:b")
    processes.wait_until(lambda: clients.ask("stat").errors == 1, "the load seeing a wrong number")
    server.kill()
    processes.wait_until(lambda: clients.ask("stat").errors == 4, "the load seeing the end")
    assert clients.stop().first_error


def test_ledger_goes_on_between_keys(
    redis_server: Callable[..., redis.Redis], load: Callable[..., Ledger]
) -> None:
    server = redis_server()
    with server.client() as client:
        for key, count in (("0:a", 3), ("0:b", 2), ("0:c", 2), ("1:a", 5), ("1:b", 5), ("1:c", 4)):
            client("SET", f"ledger:{key}", count)
    clients = load(server.socket_path, 2)
    clients.works(100)
    assert clients.stop().errors == 0


@pytest.mark.parametrize(
    ("counts", "right"),
    [([3, 3, 3], True), ([4, 3, 3], True), ([4, 4, 3], True), ([4, 3, 2], False),
     ([3, 4, 3], False), ([3, 3, 4], False), ([5, 5, 3], False)],
)  # fmt: skip
def test_ledger_rule(counts: list[int], right: bool) -> None:
    assert (ledger.problems(counts) == "") == right


# --- keeping track of processes -------------------------------------------------------------------


def test_an_orphan_is_found_and_ended() -> None:
    """What a page server does: its parent ends, it lives on."""
    script = "import os, time\nif os.fork() == 0:\n time.sleep(600)\nos._exit(0)"
    before = set(processes.descendants(os.getpid()))
    subprocess.run([sys.executable, "-c", script], check=True)
    (orphan,) = set(processes.descendants(os.getpid())) - before
    assert processes.state(orphan) in ("S", "R", "D")
    processes.kill(orphan)
    assert processes.state(orphan) == ""
    processes.kill(orphan)


def test_a_victim_that_does_not_start_is_told(tmp_path: Path) -> None:
    victims.build()
    with pytest.raises(RuntimeError, match="did not get ready"):
        Victim(tmp_path, [str(victims.BIN / "writer"), "--kind", "nonsense"])


def pytest_in(directory: Path, more: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Another pytest, of the tests there alone; `more`: of environment."""
    words = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(directory)]
    words += ["-p", "no:cacheprovider", str(directory)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": "", **more}
    return subprocess.run(words, env=environment, capture_output=True, text=True)


def test_what_was_captured_is_told_when_the_tests_are_killed(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "import pytest\n"
        "from tests.harness import last_words\n"
        "@pytest.fixture(scope='session', autouse=True)\n"
        "def kept(request):\n"
        "    with last_words.kept(request.config):\n"
        "        yield\n"
    )
    (tmp_path / "test_ends.py").write_text(
        "import os, signal\n"
        "def test_ends():\n"
        "    os.write(2, b'why it ended')\n"
        "    if 'END' in os.environ:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for more, told in (({}, False), ({"END": "1"}, True)):
        ran = pytest_in(tmp_path, more)
        assert ran.returncode == (-signal.SIGKILL if told else 0), ran
        assert ("why it ended" in ran.stderr) == told


def test_who_takes_long_says_what_the_machine_did(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "import pytest\n"
        "from tests.harness import slow_tests\n"
        "slow_tests.LONG = 0.2\n"
        "@pytest.hookimpl(wrapper=True)\n"
        "def pytest_runtest_protocol(item):\n"
        "    with slow_tests.told(item):\n"
        "        return (yield)\n"
    )
    (tmp_path / "test_takes.py").write_text(
        "import time\n"
        "def test_long():\n"
        "    begin = time.process_time()\n"
        "    while time.process_time() < begin + 0.3:\n"
        "        pass\n"
        "def test_short():\n"
        "    pass\n"
    )
    ran = pytest_in(tmp_path, {})
    assert ran.returncode == 0, ran
    (line,) = (line for line in ran.stdout.splitlines() if " took " in line)
    told = re.match(r"test_takes.py::test_long took (\S+) s: processors used for (\S+) s, ", line)
    assert told is not None, line
    assert float(told[1]) >= 0.3
    assert float(told[2]) >= 0.2
    assert re.search(r"; most used by \d+ \S.* \d+ s, ", line)
