"""Programs that check themselves go on where the image was taken: lazily and eagerly restored."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import snapshot
from snapshot.kernel.arch_x86_64 import NR, Registers
from tests.conftest import Reap, Snap, Spawn
from tests.harness import oracle, processes
from tests.harness.processes import wait_until
from tests.harness.takes import compared, restored, take_with_oracle

pytestmark = pytest.mark.live

MODES = pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
PIDS = pytest.mark.parametrize("pid", ["keep", "new"])


@MODES
@PIDS
def test_sixteen_threads(spawn: Spawn, snap: Snap, lazy: bool, pid: str) -> None:
    """By the command, as a user would; SIGKILL in between."""
    victim = spawn("threads16")
    victim.goes_on()
    taken = snap("take", victim.pid, "--name", "image").json
    assert taken["threads"] == 16
    victim.goes_on()
    victim.kill()
    back = snap("restore", "image", "--lazy" if lazy else "--eager", "--pid", pid).json
    assert back["mode"] == ("lazy" if lazy else "eager")
    assert (back["pid"] == victim.pid) == (pid == "keep")
    assert back["closed_connections"] == []
    victim.became(back["pid"])
    assert len(os.listdir(f"/proc/{victim.pid}/task")) == 16
    for _ in range(3):
        victim.goes_on()


def test_no_restart_block_in_an_image(spawn: Spawn, store: Path) -> None:
    """restart_syscall means something in the thread that was interrupted alone: an image holds the
    call that it stands for, also for a thread that is just about to make it (rax, rip before the
    instruction) or that has been stopped in it again (-516, its number in orig_rax)."""
    victim = spawn("threads16")
    found = []
    for number in range(10):
        with snapshot.take(victim.pid, name=f"image-{number}", store=store) as image:
            for thread in image.threads:
                registers = Registers.unpack(thread.registers)
                if NR.restart_syscall in (registers.rax, registers.orig_rax):
                    code = image.read(registers.rip - 7, 9).hex()
                    found.append((number, thread.comm, registers.rax, registers.orig_rax, code))
    assert found == []


@MODES
def test_python(spawn: Spawn, snap: Snap, lazy: bool) -> None:
    """Threads, sqlite3 in memory, open files, an asyncio server on TCP and a unix socket."""
    app = spawn.python(mib=32)
    app.goes_on()
    taken = snap("take", app.pid, "--name", "image").json
    assert taken["closed_connections"] == []
    at_t0 = app.ask()["progress"]["bank"]
    app.goes_on()
    app.kill()
    back = snap("restore", "image", "--lazy" if lazy else "--eager").json
    assert back["pid"] == app.pid
    assert app.ask()["progress"]["bank"] > 0
    assert app.ask(unix=True)["pid"] == app.pid
    app.verify()
    app.goes_on()
    wait_until(lambda: app.ask()["progress"]["bank"] > at_t0, "the bank going on past T0")


@MODES
def test_python_with_a_client(spawn: Spawn, snap: Snap, lazy: bool) -> None:
    """A connection to somebody else comes back ended; the server lives on without it."""
    from tests.harness import redis

    app = spawn.python(mib=4)
    port = int((app.directory / "port").read_text())
    with redis.connect(("127.0.0.1", port)) as client:
        client.sendall(b"stat\n")
        assert client.recv(65536)
        taken = snap("take", app.pid, "--name", "image").json
        assert len(taken["closed_connections"]) == 1
        assert str(port) in taken["closed_connections"][0]
        client.sendall(b"stat\n")
        assert client.recv(65536), "the live program keeps its connection"
        app.kill()
    back = snap("restore", "image", "--lazy" if lazy else "--eager").json
    assert len(back["closed_connections"]) == 1
    app.verify()
    app.goes_on()


KINDS = ["anon", "thp", "many", "memfd", "shm", "brk", "stack", "data", "file", "ro", "mixed"]


@MODES
@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_every_kind(spawn: Spawn, store: Path, kind: str, lazy: bool) -> None:
    """The writer checks each page before it writes to it again."""
    writer = spawn("writer", kind=kind, mib=32, sparse=1)
    snapshot.take(writer.pid, name="image", store=store).close()
    writer.goes_on()
    writer.kill()
    with restored(writer, "image", store, lazy):
        writer.goes_on()
        writer.verify()


@MODES
def test_early_life(spawn: Spawn, store: Path, lazy: bool) -> None:
    """fork, brk, mremap, MADV_DONTNEED, munmap, shared memory, reads by the kernel: the first that
    the program does, with most pages still missing; again when all are there."""
    victim = spawn("edges", mib=8)
    snapshot.take(victim.pid, name="image", store=store).close()
    victim.kill()
    with restored(victim, "image", store, lazy):
        for _ in range(2):
            victim.verify()


OPERATIONS = [
    "fork", "spawn", "drop", "heap", "move", "grow", "cut", "guard", "share", "together", "kernel",
    "partly",
]  # fmt: skip


@pytest.mark.parametrize("only", OPERATIONS)
def test_one_operation_first(spawn: Spawn, store: Path, only: str) -> None:
    """Each as the very first thing after a lazy restore."""
    victim = spawn("edges", mib=4, only=only)
    snapshot.take(victim.pid, name="image", store=store).close()
    victim.kill()
    with restored(victim, "image", store, lazy=True):
        victim.verify()


@MODES
@pytest.mark.parametrize("what", ["munmap", "madvise", "fork", "brk", "mremap", "protect"])
def test_storm_goes_on(spawn: Spawn, store: Path, what: str, lazy: bool) -> None:
    victim = spawn("storm", what=what, mib=4, alone=1)
    snapshot.take(victim.pid, name="image", store=store).close()
    victim.kill()
    with restored(victim, "image", store, lazy):
        victim.verify()
        victim.goes_on()
        victim.verify()


def test_five_times(spawn: Spawn, store: Path) -> None:
    """One image restored five times, one after the other, in turn lazily and eagerly; each life
    begins at the same instant."""
    victim = spawn("threads16")
    memory, image = take_with_oracle(victim.pid, store, "image")
    with image:
        before = victim.status()
        victim.goes_on()
        victim.kill()
        for lazy in (True, False, True, False, True):
            with restored(victim, "image", store, lazy) as back:
                assert back.pid == victim.process.pid
                wait_until(lambda: victim.status().sequence < before.sequence + 50, "a new life")
                victim.goes_on()
        assert oracle.compare(memory, image) == [], "a restore wrote to the image"


@MODES
def test_take_of_a_restored_process(spawn: Spawn, store: Path, lazy: bool) -> None:
    """The image of a second life, and a third life from it."""
    victim = spawn("writer", kind="mixed", mib=32, sparse=1)
    snapshot.take(victim.pid, name="first", store=store).close()
    victim.kill()
    with restored(victim, "first", store, lazy) as back:
        assert back.complete() is None
        victim.goes_on()
        assert compared(victim.pid, store, "second") == []
        victim.verify()
    with restored(victim, "second", store, lazy):
        victim.goes_on()
        victim.verify()
        assert compared(victim.pid, store, "third") == [] if not lazy else True


@MODES
def test_threads_of_a_second_life(spawn: Spawn, store: Path, lazy: bool) -> None:
    victim = spawn("threads16")
    names = ["first", "second", "third"]
    snapshot.take(victim.pid, name=names[0], store=store).close()
    victim.kill()
    for name, following in itertools.pairwise(names):
        with restored(victim, name, store, lazy) as back:
            victim.goes_on()
            assert back.complete() is None
            snapshot.take(victim.pid, name=following, store=store).close()
            victim.goes_on()


@contextmanager
def occupied(pid: int) -> Iterator[None]:
    """Another process has the pid, as after a reboot's worth of pid reuse."""
    last = Path("/proc/sys/kernel/ns_last_pid")
    for _ in range(200):
        last.write_text(str(pid - 1))
        with subprocess.Popen(["sleep", "600"]) as sleep:
            try:
                if sleep.pid == pid:
                    yield
                    return
            finally:
                sleep.kill()
    pytest.fail(f"pid {pid} was not to be had")


@MODES
def test_pid_is_somebody_elses(spawn: Spawn, snap: Snap, lazy: bool) -> None:
    victim = spawn("threads16")
    snap("take", victim.pid, "--name", "image")
    victim.kill()
    old = victim.pid
    mode = "--lazy" if lazy else "--eager"
    with occupied(old):
        refused = snap("restore", "image", mode, ok=False)
        assert refused.code == 9, refused.err
        assert str(old) in refused.json["error"]
        assert "--pid new" in refused.json["hint"]
        back = snap("restore", "image", mode, "--pid", "new").json
        assert back["pid"] != old
        victim.became(back["pid"])
        victim.goes_on()
        # In its namespace it is who it was.
        assert victim.status().pid == old
        assert f"\t{old}\n" in Path(f"/proc/{back['pid']}/status").read_text()
        victim.kill()


def test_beside_the_original(spawn: Spawn, snap: Snap) -> None:
    """--pid new while the target itself still runs (here: stands, so that only one writes)."""
    original = spawn("writer", mib=16)
    snap("take", original.pid, "--name", "image")
    original.signal(signal.SIGSTOP)
    pid = original.pid
    back = snap("restore", "image", "--lazy", "--pid", "new").json
    original.became(back["pid"])
    original.goes_on()
    original.verify()
    original.kill()
    original.became(pid)
    original.signal(signal.SIGCONT)
    original.goes_on()
    original.verify()


@MODES
@PIDS
def test_wait_returns_the_exit_status(
    spawn: Spawn, snap: Snap, reap: Reap, lazy: bool, pid: str
) -> None:
    """`snap restore --wait` passes the signal on and ends as the program does."""
    victim = spawn("exits", how="exit")
    snap("take", victim.pid, "--name", "image")
    victim.kill()
    out = snap.directory / "waiting"
    words = ["restore", "image", "--lazy" if lazy else "--eager", "--pid", pid, "--wait", "--json"]
    with out.open("wb") as stdout:
        waiting = subprocess.Popen(
            [*snap.command, *words, "--store", str(snap.store)], stdout=stdout
        )
    try:
        wait_until(lambda: out.read_text().endswith("}\n"), "the process running")
        assert waiting.poll() is None
        waiting.send_signal(signal.SIGUSR1)
        assert waiting.wait(30) == 7
    finally:
        waiting.kill()
        waiting.wait()


@MODES
@pytest.mark.parametrize(("how", "code"), [("abort", 134), ("segv", 139), ("group", 7)])
def test_other_ends(spawn: Spawn, snap: Snap, how: str, code: int, lazy: bool) -> None:
    victim = spawn("exits", how=how)
    snap("take", victim.pid, "--name", "image")
    victim.kill()
    hook = "running=kill -USR1 $SNAP_PID"
    mode = "--lazy" if lazy else "--eager"
    ran = snap("restore", "image", mode, "--wait", "--hook", hook, ok=False)
    assert ran.code == code, ran.err
    processes.has_ended(victim.pid)


def test_stages_of_restore(spawn: Spawn, store: Path) -> None:
    """The hooks of a lazy restore, in order, each with the process as it is then."""
    victim = spawn("writer", mib=32)
    snapshot.take(victim.pid, name="image", store=store).close()
    victim.kill()
    seen: list[tuple[str, int]] = []
    hooks = {
        stage: lambda context: seen.append((context.stage, context.pid))
        for stage in ("before-restore", "rebuilt", "running", "complete")
    }
    back = snapshot.restore("image", store=store, lazy=True, hooks=hooks)
    try:
        assert back.complete() is None
        victim.became(back.pid)
        victim.verify()
    finally:
        processes.kill_all([pid for pid in (back.pid, back.server_pid) if pid])
    pid = back.pid
    assert seen[:3] == [("before-restore", 0), ("rebuilt", pid), ("running", pid)]
    assert seen[3:] in ([], [("complete", pid)])
