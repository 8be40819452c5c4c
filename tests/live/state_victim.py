"""The victim of test_state_resources.py, and what rebuild.py would do with its state.

The program is tests/targets/state.c; without ASLR its addresses are the same in every run, so that
the state of one fits another.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from snapshot.freeze import Frozen, freeze
from snapshot.kernel import procfs
from snapshot.kernel.arch_x86_64 import NR
from snapshot.kernel.ptrace import EXITKILL
from snapshot.manifest import Process, pack, unpack
from snapshot.resources import stages
from snapshot.resources.capture import capture_process
from snapshot.resources.timers import State as Timers

SOURCE = Path(__file__).parents[1] / "targets" / "state.c"
BUT_SIGTRAP = (1 << 64) - 1 & ~(1 << 4)


def build(directory: Path) -> Path:
    built = directory / "state"
    flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-static", "-no-pie", "-pthread"]
    subprocess.run(["gcc", *flags, str(SOURCE), "-o", str(built)], check=True)
    for parent in (directory, *directory.parents[:2]):  # other users run it too
        parent.chmod(0o755)
    return built


class Victim:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid = process.pid

    def ask(self, command: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert isinstance(answer, dict)
        return answer


@contextmanager
def running(program: Path, mode: str, directory: Path, **options: Any) -> Iterator[Victim]:
    process = subprocess.Popen(
        [str(program), mode, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
        env={},
        **options,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Victim(process)
    finally:
        process.kill()
        process.communicate()


@dataclasses.dataclass
class Ctx:
    warnings: list[str] = dataclasses.field(default_factory=list)


def capture(pid: int) -> Process:
    with freeze(pid) as frozen:
        return capture_process(frozen, 0, mappings=())


def rebuild(process: Process, pid: int, parent_stays: bool = True) -> list[str]:
    """What rebuild.py does with a new process, in one that has the same threads at the same
    addresses. Returns the warnings."""
    ctx = Ctx()
    with freeze(pid) as frozen:
        process = renumbered(process, frozen)
        for tracee in frozen.threads:  # as there: no guard, which would put back what is changed
            tracee.set_options(tracee.options | EXITKILL)
        remote = frozen.remote
        remotes = {tracee.tid: remote.on(tracee) for tracee in frozen.threads}
        for tracee in frozen.threads:
            tracee.set_signal_mask(BUT_SIGTRAP)
            rseq = tracee.rseq()
            assert rseq is not None
            remotes[tracee.tid].call(NR.rseq, rseq.address, rseq.size, 1, rseq.signature)
        brk = remote.call(NR.brk, 0)
        stages.early(process, remote, ctx)
        for thread in process.threads:
            stages.thread(process, thread, remotes[thread.tid], ctx)
        process = replace(process, layout=replace(process.layout, brk=brk))
        stages.placed(process, remote, ctx)
        stages.last(process, remotes, ctx, parent_stays=parent_stays)
        for tracee, thread in zip(frozen.threads, process.threads, strict=True):
            assert tracee.rseq() is not None
            tracee.set_signal_mask(thread.signal_mask)
    return ctx.warnings


def renumbered(process: Process, frozen: Frozen) -> Process:
    """The same state for threads with other numbers."""
    new = [tracee.tid for tracee in frozen.threads]
    tids = dict(zip((thread.tid for thread in process.threads), new, strict=True))
    timers = unpack(process.state["timers"], Timers)
    posix = tuple(replace(timer, target=tids[timer.target]) for timer in timers.posix)
    return replace(
        process,
        pid=frozen.pid,
        sid=frozen.pid if process.sid == process.pid else process.sid,
        pgid=frozen.pid if process.pgid == process.pid else process.pgid,
        threads=tuple(replace(thread, tid=tids[thread.tid]) for thread in process.threads),
        state={**process.state, "timers": pack(replace(timers, posix=posix))},
    )


def changed(process: Process, name: str, kind: type[Any], **fields: Any) -> Process:
    """The process with other values in one state, in whichever record it is kept."""

    def new(state: dict[str, msgspec.Raw]) -> dict[str, msgspec.Raw]:
        if name not in state:
            return state
        return {**state, name: pack(replace(unpack(state[name], kind), **fields))}

    threads = tuple(replace(thread, state=new(thread.state)) for thread in process.threads)
    return replace(process, state=new(process.state), threads=threads)


def without_times(report: dict[str, Any]) -> dict[str, Any]:
    timers = {number: pair[0] for number, pair in report["timers"].items()}
    return {**report, "timers": timers, "itimers": [pair[0] for pair in report["itimers"]]}


def outside(pid: int) -> dict[object, object]:
    """What /proc shows of a process that a capture must leave alone."""
    status: dict[object, object] = {}
    for tid in procfs.threads(pid):
        lines = procfs.read(pid, "status", tid).decode("latin-1").split("\n")
        # The scratch of injected calls was mapped for an instant; SigQ counts all of a user.
        memory = ("Rss", "VmPeak", "VmRSS", "VmHWM", "VmPTE")
        noise = ("State", "voluntary", "nonvoluntary", "SigQ", *memory)
        status[tid] = [line for line in lines if not line.startswith(noise)]
    return {
        **status,
        "maps": procfs.maps(pid),
        "timers": procfs.read(pid, "timers"),
        "limits": procfs.limits(pid),
        "fd": sorted(procfs.names(pid, "fd")),
        "comms": [procfs.comm(pid, tid) for tid in procfs.threads(pid)],
        "flags": [line.vm_flags for line in procfs.smaps(pid)],
    }
