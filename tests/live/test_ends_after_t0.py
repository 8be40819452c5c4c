"""The target ends right after T0: the image is whole all the same. What is unsaved when it exits
is saved while it waits for that; SIGKILL, and execve of a single thread, leave no time for it, and
then there is a clear error that leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import snapshot
from snapshot.errors import TakeError
from snapshot.hooks import HookContext, Hooks
from snapshot.image import Image
from snapshot.store import Store
from snapshot.take import take
from tests.conftest import Snap, Spawn
from tests.harness import oracle, processes
from tests.harness.busystore import BusyStore
from tests.harness.processes import wait_until
from tests.harness.victims import BIN, Victim

pytestmark = pytest.mark.live

HOW = ["exit", "group", "exec", "abort", "kill", "SIGKILL"]
STAGES = ["frozen", "resumed"]
LITTLE = 4 << 20
"""Staging: with the store busy little more than this is saved, but for what the target writes: some
60 MiB on their way to the store."""
MIB = 160
"""Of a target, so that not all can be."""


def end(victim: Victim, how: str) -> None:
    victim.signal(signal.SIGKILL if how == "SIGKILL" else signal.SIGUSR1)


def has_ended(victim: Victim) -> None:
    """For good: also as the program that it became by exec."""
    victim.process.wait(20)
    assert not victim.lives()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", HOW)
def test_nothing_is_unsaved(spawn: Spawn, store: Path, how: str, stage: str) -> None:
    victim = spawn("exits", how="exit" if how == "SIGKILL" else how, mib=1)
    seen: list[oracle.Memory] = []

    def frozen(context: HookContext) -> None:
        seen.append(oracle.read(context.pid))
        if stage == "frozen":
            end(victim, how)

    hooks = {
        "frozen": frozen,
        "resumed": lambda _: end(victim, how) if stage == "resumed" else None,
    }
    with snapshot.take(victim.pid, name="image", store=store, hooks=hooks) as image:
        has_ended(victim)
        assert oracle.compare(seen[-1], image) == []
        assert image.manifest.stats.attempts == 1
        assert list(image.verify()) == []


# --- much is unsaved ----------------------------------------------------------------------------


@pytest.fixture
def busy(store: Path) -> Iterator[BusyStore]:
    with BusyStore(store) as busy:
        yield busy


def is_traced(pid: int) -> bool:
    """Any thread of it."""
    found = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status")]
    return not all("TracerPid:\t0\n" in status for status in found)


def thread_states(pid: int) -> str:
    """One letter each, the leader first: t: in a stop of its tracer, Z: ended."""
    tids = sorted(map(int, os.listdir(f"/proc/{pid}/task")))
    return "".join(processes.state(tid) for tid in tids)


def taken(
    victim: Victim,
    busy: BusyStore,
    frozen: Callable[[], object],
    resumed: Callable[[], object],
    **options: Any,
) -> tuple[oracle.Memory, Image]:
    """An image whose memory is unsaved, for nobody can store any, until `resumed` has returned;
    and what the oracle read at T0. A hook at `resumed` cannot fail a take, but what went wrong in
    it is raised here."""
    seen: list[oracle.Memory] = []
    failed: list[BaseException] = []

    def at_t0(context: HookContext) -> None:
        seen.append(oracle.read(context.pid))
        busy.hold()
        frozen()

    def after(_: HookContext) -> None:
        try:
            resumed()
        except BaseException as error:
            failed.append(error)
        busy.release()

    hooks = Hooks({"frozen": at_t0, "resumed": after}, installed=False)
    words = {"now": True, "attempts": 1, "memory": LITTLE, **options}
    try:
        image = take(victim.pid, name="image", store=busy.path, hooks=hooks, **words)
    finally:
        if failed:
            raise failed[0]
    return seen[-1], image


def nothing() -> None:
    pass


def gone(victim: Victim) -> bool:
    """For good, or by an execve."""
    try:
        program = Path(f"/proc/{victim.pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return program != "exits" or thread_states(victim.pid).strip("Z") == ""


ENDS = [
    ("exit", 7),
    ("group", 7),
    ("abort", -signal.SIGABRT),
    ("segv", -signal.SIGSEGV),
    ("each", 7),
]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("how", "status", "by"),
    [
        *((how, status, by) for how, status in ENDS for by in ("main", "second")),
        ("exec", 0, "main"),
    ],
)
def test_waits_until_all_is_saved(
    spawn: Spawn, busy: BusyStore, how: str, status: int, by: str, stage: str
) -> None:
    """Which does not take until the store has it all. The parent hears the true end."""
    victim = spawn("exits", how=how, by=by, mib=MIB)

    def resumed() -> None:
        if stage == "resumed":
            end(victim, how)
        wait_until(lambda: gone(victim), "its end")

    memory, image = taken(
        victim, busy, lambda: end(victim, how) if stage == "frozen" else None, resumed
    )
    with image:
        assert victim.process.wait(20) == status
        assert not victim.lives()
        assert image.manifest.stats.attempts == 1
        assert image.manifest.stats.remainder_bytes > MIB << 20
        assert oracle.compare(memory, image) == []
        assert list(image.verify()) == []


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", ["SIGKILL", "kill", "exec"])
def test_cannot_wait(spawn: Spawn, busy: BusyStore, how: str, stage: str) -> None:
    """It is gone at once, whatever is unsaved, and that is said."""
    alone = how == "exec"
    victim = spawn(
        "exits", how="exit" if how == "SIGKILL" else how, mib=MIB, alone=int(alone), after=0
    )

    def resumed() -> None:
        if stage == "resumed":
            end(victim, how)
        wait_until(lambda: gone(victim), "its end")

    with pytest.raises(TakeError) as raised:
        taken(victim, busy, lambda: end(victim, how) if stage == "frozen" else None, resumed)
    assert raised.value.exit_code == 8
    assert "ended" in raised.value.message
    has_ended(victim)
    assert victim.process.returncode == (0 if how == "exec" else -signal.SIGKILL)
    with Store.open(busy.path) as opened:
        assert opened.images() == []


def test_a_thread_ends_alone(spawn: Spawn, busy: BusyStore) -> None:
    """main calls pthread_exit, as it were: nothing waits, the other thread goes on."""
    victim = spawn("exits", how="thread", mib=MIB)

    def resumed() -> None:
        end(victim, "thread")
        wait_until(lambda: thread_states(victim.pid)[0] == "Z", "the end of main")
        before = victim.status().progress[1]
        wait_until(lambda: victim.status().progress[1] > before, "the other thread going on")
        assert is_traced(victim.pid), "all was saved before"

    memory, image = taken(victim, busy, nothing, resumed)
    with image:
        assert oracle.compare(memory, image, victim.pid) == []


def test_nobody_traces_what_is_saved(spawn: Spawn, store: Path) -> None:
    """The remainder was copied in the pause: nothing of the take is left with the target."""
    victim = spawn("writer", mib=16)
    seen: list[bool] = []
    hooks = {"resumed": lambda _: seen.append(is_traced(victim.pid))}
    snapshot.take(
        victim.pid, name="image", store=store, hooks=hooks, now=True, guard="always"
    ).close()
    assert seen == [False]


@pytest.mark.parametrize("kind", ["numbered", "ignored"])
def test_signals_are_neither_lost_nor_felt(spawn: Spawn, busy: BusyStore, kind: str) -> None:
    """`signals` checks their order, or that a call which they only wake is not interrupted."""
    victim = spawn("signals", kind=kind, mib=MIB, pause=300)
    victim.goes_on()

    def resumed() -> None:
        before = victim.status().progress
        wait_until(lambda: victim.status().progress[1] >= before[1] + 2000, "signals coming in")
        after = victim.status().progress
        assert all(new > old for new, old in zip(after, before, strict=True))
        assert is_traced(victim.pid), "all was saved before"

    memory, image = taken(victim, busy, nothing, resumed)
    victim.goes_on()
    with image:
        assert oracle.compare(memory, image, victim.pid) == []


@pytest.mark.parametrize("stage", ["frozen", "resumed"])
def test_stopped_and_continued(spawn: Spawn, busy: BusyStore, stage: str) -> None:
    victim = spawn("exits", mib=MIB)

    def resumed() -> None:
        if stage == "resumed":
            victim.signal(signal.SIGSTOP)
        wait_until(lambda: thread_states(victim.pid) == "Tt", "the stop")
        assert is_traced(victim.pid)
        victim.signal(signal.SIGCONT)
        before = victim.status().progress[1]
        wait_until(lambda: victim.status().progress[1] > before, "its going on")
        victim.signal(signal.SIGSTOP)
        wait_until(lambda: thread_states(victim.pid) == "Tt", "the second stop")

    memory, image = taken(
        victim, busy, lambda: victim.signal(signal.SIGSTOP) if stage == "frozen" else None, resumed
    )
    with image:
        assert not is_traced(victim.pid)
        assert thread_states(victim.pid) == "TT"
        assert oracle.compare(memory, image, victim.pid) == []
    victim.signal(signal.SIGCONT)
    before = victim.status().progress[1]
    wait_until(lambda: victim.status().progress[1] > before, "its going on")


# --- snap is another process ----------------------------------------------------------------------


class StuckTake:
    """`snap take --now` that can store nothing after T0, nor spill it, until `go_on`."""

    def __init__(self, snap: Snap, victim: Victim, *options: str) -> None:
        self.stuck = snap.directory / "stuck"
        self.error = snap.directory / "stuck-error"
        shim = ("env", f"LD_PRELOAD={BIN / 'stuckdisk.so'}", f"STUCK_DISK={self.stuck}")
        words = [*shim, *snap.command, "take", str(victim.pid), "--name", "image", "--now"]
        words += ["--store", str(snap.store), "--memory", "4M", *options, "--hook"]
        with self.error.open("wb") as error:
            self.process = subprocess.Popen(
                [*words, f"frozen=touch {self.stuck}"], stdout=subprocess.DEVNULL, stderr=error
            )
        wait_until(self.stuck.exists, "T0")
        wait_until(lambda: "t" not in thread_states(victim.pid), "the end of the pause")

    def go_on(self) -> int:
        self.stuck.unlink()
        return self.process.wait(60)

    def __enter__(self) -> StuckTake:
        return self

    def __exit__(self, *_: object) -> None:
        self.stuck.unlink(missing_ok=True)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def wait_for(pid: int, what: int) -> int:
    """The next change of a child of ours, and its si_status; it stays a zombie."""
    found = os.waitid(os.P_PID, pid, what | os.WNOWAIT)
    assert found is not None
    return found.si_status


@pytest.mark.parametrize(("how", "status"), [("group", 7), ("abort", signal.SIGABRT)])
def test_the_parent_hears_of_it_when_all_is_saved(
    spawn: Spawn, snap: Snap, how: str, status: int
) -> None:
    victim = spawn("exits", how=how, mib=MIB, alone=1)
    with StuckTake(snap, victim) as stuck:
        end(victim, how)
        wait_until(lambda: thread_states(victim.pid) == "t", "it being held")
        assert os.waitid(os.P_PID, victim.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        assert stuck.go_on() == 0, stuck.error.read_text()
    assert wait_for(victim.pid, os.WEXITED) == status
    assert snap("verify", "image").json["ok"]


def test_the_parent_sees_stops(spawn: Spawn, snap: Snap) -> None:
    victim = spawn("exits", mib=MIB, alone=1)
    with StuckTake(snap, victim) as stuck:
        victim.signal(signal.SIGSTOP)
        found = os.waitid(os.P_PID, victim.pid, os.WSTOPPED)
        assert found is not None
        assert (found.si_code, found.si_status) == (os.CLD_STOPPED, signal.SIGSTOP)
        victim.signal(signal.SIGCONT)
        found = os.waitid(os.P_PID, victim.pid, os.WCONTINUED)
        assert found is not None
        assert found.si_code == os.CLD_CONTINUED
        assert is_traced(victim.pid)
        assert stuck.go_on() == 0, stuck.error.read_text()
    assert not is_traced(victim.pid)


def test_is_not_held_for_longer_than_the_stall(spawn: Spawn, snap: Snap) -> None:
    victim = spawn("exits", how="group", mib=MIB, alone=1)
    with StuckTake(snap, victim, "--stall", "2") as stuck:
        end(victim, "group")
        wait_until(lambda: thread_states(victim.pid) == "t", "it being held")
        assert victim.process.wait(20) == 7
        assert stuck.go_on() == 8
        assert "ended" in stuck.error.read_text() or "took nothing" in stuck.error.read_text()
    assert snap.names() == []


def test_snap_is_killed_while_the_target_is_held(spawn: Spawn, snap: Snap) -> None:
    victim = spawn("exits", how="group", mib=MIB, alone=1)
    with StuckTake(snap, victim) as stuck:
        end(victim, "group")
        wait_until(lambda: thread_states(victim.pid) == "t", "it being held")
        stuck.process.kill()
        assert victim.process.wait(20) == 7
        stuck.process.wait(20)
    assert snap.names() == []
