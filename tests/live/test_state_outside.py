"""What is read from outside in place of asking is what would have been answered."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from signal import SIGCHLD

import msgspec
import pytest
from snapshot.kernel._native import ffi, lib

from snapshot.freeze import Frozen, freeze
from snapshot.kernel import task_iterator
from snapshot.kernel.arch_x86_64 import NR
from snapshot.kernel.ptrace import Tracee
from snapshot.kernel.remote import Interview, Packed, Remote, data_area
from snapshot.kernel.task_iterator import ProcessRecord, TaskAnswers, TaskProgram
from snapshot.manifest import Process
from snapshot.resources import settings
from snapshot.resources.capture import Preparation, capture_process, gather
from snapshot.resources.facts import Facts
from snapshot.resources.inquiry import Answers
from snapshot.resources.questions import Questions
from snapshot.resources.settings import (
    PR_GET_CHILD_SUBREAPER,
    PR_SET_CHILD_SUBREAPER,
    PR_SET_DUMPABLE,
    PR_SET_MDWE,
    PR_SET_MEMORY_MERGE,
    PR_SET_THP_DISABLE,
)
from snapshot.resources.signals import ACTION, SET_BYTES
from snapshot.resources.statement import Statement
from snapshot.resources.timers import PAIR
from snapshot.units import PAGE

from . import freezing
from .state_victim import Victim, build, running
from .visits import visited

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def victim_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="module")
def tasks() -> Iterator[TaskProgram]:
    with TaskProgram() as program:
        if program.error:
            pytest.skip(f"no BPF task iterator: {os.strerror(-program.error)}")
        yield program


@pytest.mark.parametrize("mode", ["blank", "state", "creds"])
def test_of_threads(tasks: TaskProgram, victim_program: Path, tmp_path: Path, mode: str) -> None:
    """Each thread, whatever it has set: byte for byte what its own calls return."""
    with running(victim_program, mode, tmp_path) as victim, freeze(victim.pid) as frozen:
        remote = frozen.remote
        facts = Facts.first(victim.pid)
        each = Questions(facts, remote.data, remote.data_size).others
        packed = each.inquiry.packed()
        assert packed is not None
        tids = [tracee.tid for tracee in frozen.threads]
        with TaskAnswers(tasks, victim.pid, len(tids), packed) as outside:
            assert outside.read(tids, remote.data)
            for i, tracee in enumerate(frozen.threads):
                seen = Answers.single(*outside.of(i))
                said = each.inquiry.run(remote.on(tracee))
                assert each.own(seen) == each.own(said)
                assert each.securebits(seen) == each.securebits(said)
                for _, answer in each.modules:
                    assert answer(seen) == answer(said)
    assert len(tids) == 4


def test_with_the_instruction_forbidden(
    tasks: TaskProgram, victim_program: Path, tmp_path: Path
) -> None:
    """The bit of that is not the same in all kernels: it was found out by trying."""
    assert bin(tasks.bits.no_tsc).count("1") == 1
    with running(victim_program, "state", tmp_path) as victim:
        expected = [thread["tsc"] for thread in victim.ask("report")["threads"]]
        assert set(expected) == {1, 2}
        room = ffi.new("snap_task[]", 8)
        fd = tasks.iterator(victim.pid, lib.SNAP_OF_THREADS)
        size = lib.snap_task_read(fd, room, ffi.sizeof(room))
        os.close(fd)
        found = [room[i] for i in range(size // ffi.sizeof("snap_task"))]
    found.sort(key=lambda task: int(task.tid))
    assert [2 if task.flags & tasks.bits.no_tsc else 1 for task in found] == expected


def test_more_threads_than_there_is_room_for(tasks: TaskProgram, victim_program: Path) -> None:
    with running(victim_program, "blank", Path("/")) as victim, freeze(victim.pid) as frozen:
        packed = Questions(Facts.first(victim.pid), *data_area(0)).packed[1]
        assert packed is not None
        tids = [tracee.tid for tracee in frozen.threads]
        with TaskAnswers(tasks, victim.pid, len(tids) - 1, packed) as outside:
            assert not outside.read(tids, 0)
            assert not outside.read(tids[1:], 0)  # the room for what the kernel says, too
        with TaskAnswers(tasks, victim.pid, len(tids), packed) as outside:
            assert not outside.read([*tids[1:], os.getpid()], 0)  # none of its threads


SWITCHING = r"""
static void *sleep_on(void *arg) { for (;;) pause(); return arg; }
int main(int argc, char **argv)
{
    pthread_t thread;
    open_page(argv);
    pthread_create(&thread, NULL, sleep_on, NULL);
    for (page->ready = 1; argc; page->count++)
        prctl(PR_SET_CHILD_SUBREAPER, page->count & 1);
}
"""
SWITCHING_ROUNDS = 60


@contextmanager
def stated(
    tasks: TaskProgram, victim: Victim, how: str = "stopped"
) -> Iterator[tuple[Statement, Frozen]]:
    """With the statement made in a first stop, or by a thread of ours while the process runs."""
    with Statement(victim.pid, tasks, data_area(0)) as statement:
        if how == "running":
            with visited(victim.pid) as (host, guest):
                statement.make_running(guest)
            yield statement, host
            return
        with freeze(victim.pid) as first:
            statement.look(first)
            statement.make(first)
        yield statement, first


def found_and_expected(pid: int, first: Frozen, prepared: Preparation) -> tuple[Process, Process]:
    """The same process with what was prepared, and with every thread asked."""
    with freeze(pid, earlier=first) as frozen:
        gathered = gather(frozen, prepared)
        gathered.complete()
        found = gathered.process(0, mappings=())
    with freeze(pid, earlier=first) as frozen:
        return found, capture_process(frozen, 0, mappings=())


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many threads each inquiry in the pause was."""
    asked: list[int] = []
    interview = Frozen.interview

    def count(
        self: Frozen, first: Packed, others: Packed, tracees: Sequence[Tracee], text: bytes
    ) -> Interview | None:
        asked.append(len(tracees))
        return interview(self, first, others, tracees, text)

    monkeypatch.setattr(Frozen, "interview", count)
    return asked


@pytest.mark.parametrize("how", ["stopped", "running"])
def test_nobody_is_asked(
    tasks: TaskProgram, victim_program: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    asked = counted(monkeypatch)
    with running(victim_program, "blank", Path("/")) as victim, stated(tasks, victim, how) as made:
        statement, first = made
        with Preparation(victim.pid, first.data, statement) as prepared:
            found, expected = found_and_expected(victim.pid, first, prepared)
    assert found == expected
    assert asked == []


def test_with_timers_the_leader_is_asked(
    tasks: TaskProgram, victim_program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their time goes on; the other threads are still not asked."""
    asked = counted(monkeypatch)
    with running(victim_program, "state", tmp_path) as victim, stated(tasks, victim) as made:
        statement, first = made
        with Preparation(victim.pid, first.data, statement) as prepared:
            found, expected = found_and_expected(victim.pid, first, prepared)
    assert asked == [1]
    assert found.threads == expected.threads
    assert found.layout == expected.layout
    names = set(expected.state) - {"timers"}
    assert {name: found.state[name] for name in names} == {
        name: expected.state[name] for name in names
    }
    assert found.state["timers"] != expected.state["timers"]


CHANGES: dict[str, tuple[int, tuple[int | bytes, ...]]] = {
    "dumpable": (NR.prctl, (PR_SET_DUMPABLE, 0)),
    "subreaper": (NR.prctl, (PR_SET_CHILD_SUBREAPER, 1)),
    "huge pages": (NR.prctl, (PR_SET_THP_DISABLE, 1)),
    "merging": (NR.prctl, (PR_SET_MEMORY_MERGE, 1)),
    "mdwe": (NR.prctl, (PR_SET_MDWE, 1)),
    "action": (NR.rt_sigaction, (35, ACTION.pack(1, 0, 0, 0), 0, SET_BYTES)),
    "flags of a default": (NR.rt_sigaction, (SIGCHLD, ACTION.pack(0, 2, 0, 0), 0, SET_BYTES)),
    "real": (NR.setitimer, (0, PAIR.pack(0, 0, 1000, 0), 0)),
    "virtual": (NR.setitimer, (1, PAIR.pack(0, 0, 1000, 0), 0)),
    "prof": (NR.setitimer, (2, PAIR.pack(0, 0, 1000, 0), 0)),
    "POSIX": (NR.timer_create, (1, 0, bytes(8))),
    "brk": (NR.brk, ()),
}
"""Calls with their arguments; bytes are put into the process, and their address is given."""


def change(remote: Remote, what: str) -> None:
    number, args = CHANGES[what]
    if what == "brk":
        args = (remote.call(NR.brk, 0) + PAGE,)
    remote.call(number, *(arg if isinstance(arg, int) else remote.put(arg) for arg in args))


@pytest.mark.parametrize("how", ["stopped", "running"])
@pytest.mark.parametrize("what", CHANGES)
def test_what_has_changed_is_asked_again(
    tasks: TaskProgram, victim_program: Path, monkeypatch: pytest.MonkeyPatch, what: str, how: str
) -> None:
    """Every call by which a process can change one of the answers."""
    asked = counted(monkeypatch)
    with running(victim_program, "blank", Path("/")) as victim, stated(tasks, victim, how) as made:
        statement, first = made
        before = statement.answers
        with Preparation(victim.pid, first.data, statement) as prepared:
            with freeze(victim.pid, earlier=first) as frozen:
                change(frozen.remote, what)
            found, expected = found_and_expected(victim.pid, first, prepared)
    assert before is not None
    assert asked == [1]
    assert found.layout == expected.layout
    changing = {"timers"} if what in ("real", "virtual", "prof") else set()
    for name in set(expected.state) - changing:
        assert found.state[name] == expected.state[name], name


def test_answers_that_change_while_they_are_given(
    tasks: TaskProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread switches something on and off all the time: what is found later is what is so
    then, whether it was asked again or not."""
    asked = counted(monkeypatch)
    with freezing.Victim(SWITCHING) as victim:
        for _ in range(SWITCHING_ROUNDS):
            with Statement(victim.pid, tasks, data_area(0)) as statement, ExitStack() as stack:
                with visited(victim.pid) as (host, guest):
                    statement.make_running(guest)
                prepared = stack.enter_context(Preparation(victim.pid, host.data, statement))
                frozen = stack.enter_context(freeze(victim.pid, earlier=host))
                gathered = gather(frozen, prepared)
                gathered.complete()
                state = gathered.process(0, mappings=()).state["settings"]
                place = frozen.remote.put(bytes(8))
                frozen.remote.call(NR.prctl, PR_GET_CHILD_SUBREAPER, place)
                now = bool(frozen.remote.get(place, 1)[0])
                assert msgspec.msgpack.decode(state, type=settings.State).subreaper == now
    assert asked


def test_a_process_that_has_ended(tasks: TaskProgram, victim_program: Path) -> None:
    with running(victim_program, "blank", Path("/")) as victim, ExitStack() as stack:
        record = stack.enter_context(ProcessRecord(tasks, victim.pid))
        victim.process.kill()
        victim.process.wait()
        assert record.read() is None


def test_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(task_iterator.UNWANTED, "1")
    with TaskProgram() as program:
        assert program.error == -errno.EPERM


def test_of_a_process_that_is_none(tasks: TaskProgram) -> None:
    with ProcessRecord(tasks, 4_000_000) as record:
        assert record.read() is None
