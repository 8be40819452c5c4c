"""A take does not show in its target: /proc tells the same before and after, and no program
notices anything. Not even when `snap` is killed on the way."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import snapshot
from tests.conftest import ROOT, Snap, Spawn
from tests.harness.faulting import faulting
from tests.harness.processes import wait_until
from tests.harness.victims import Victim

pytestmark = pytest.mark.live

VOLATILE = re.compile(
    r"^(Vm(RSS|HWM|Peak|PTE|Swap)|Rss\w+|(non)?voluntary_ctxt_switches|State|SigQ|x86_Thread\w+|"
    r"Cpus_allowed\w*):.*\n",
    re.M,
)


SIGNAL_SETS = re.compile(r"(?<=(?:ShdPnd|SigBlk):\t)[0-9a-f]{16}")
TIMER_SIGNALS = 1 << signal.SIGALRM - 1 | 1 << signal.SIGRTMIN + 6 - 1
"""Of threads16: pending at one moment and handled at the next, blocked while one is handled and
not in sigsuspend(2)."""

CPUS = "/sys/devices/system/cpu/online"
"""The C library's malloc looks there for an instant, when a thread allocates for the first time."""


def without_timers(signals: re.Match[str]) -> str:
    return f"{int(signals[0], 16) & ~TIMER_SIGNALS:016x}"


def observed(pid: int) -> dict[str, str]:
    """What /proc says of a process that a take must not change."""
    root = Path(f"/proc/{pid}")
    seen = {
        name: (root / name).read_text(errors="replace") for name in ("maps", "limits", "timers")
    }
    seen["flags"] = "\n".join(
        line
        for line in (root / "smaps").read_text(errors="replace").splitlines()
        if line.startswith("VmFlags") or re.match(r"[0-9a-f]+-", line)
    )
    seen["oom"] = (root / "oom_score_adj").read_text()
    seen["tasks"] = " ".join(sorted(os.listdir(root / "task"), key=int))
    for task in seen["tasks"].split():
        status = (root / "task" / task / "status").read_text(errors="replace")
        seen[f"status {task}"] = SIGNAL_SETS.sub(without_timers, VOLATILE.sub("", status))
        seen[f"comm {task}"] = (root / "task" / task / "comm").read_text()
        seen[f"children {task}"] = (root / "task" / task / "children").read_text()
    for fd in sorted(os.listdir(root / "fd"), key=int):
        with suppress(FileNotFoundError):  # closed meanwhile, by the program itself
            info = (root / "fdinfo" / fd).read_text()
            # A position moves as the program writes, a timerfd counts down.
            info = re.sub(r"^(pos|it_value|ticks|eventfd-count):.*\n", "", info, flags=re.M)
            link = os.readlink(root / "fd" / fd)
            if link != CPUS:
                seen[f"fd {fd}"] = link + "\n" + info
    return seen


def changes(before: dict[str, str], after: dict[str, str]) -> str:
    """Line by line what differs, for the message of a failed test."""
    found = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key, "").splitlines(), after.get(key, "").splitlines()
        found += [f"{key}: - {line}" for line in old if line not in new]
        found += [f"{key}: + {line}" for line in new if line not in old]
        if old != new and sorted(old) == sorted(new):
            found.append(f"{key}: other order")
    return "\n".join(found)


OWN = 20
"""A thread that has blocked all signals in so many looks has done so itself, it is not new."""


def settled(observe: Callable[[], dict[str, str]]) -> dict[str, str]:
    """What is observed once it is the same twice in a row: a thread that is just being made, a
    connection that is just being closed are the program's own doing."""
    seen: list[dict[str, str]] = [{}]

    def same() -> bool:
        seen.append(observe())
        making = any("SigBlk:\tffffff" in text for text in seen[-1].values())
        return seen[-1] == seen[-2] and (not making or len(seen) > OWN)

    wait_until(same, "the program's state settling")
    return seen[-1]


def lasting_changes(before: dict[str, str], observe: Callable[[], dict[str, str]]) -> str:
    """What stays different: a signal on its way between two threads does not."""
    seen = [changes(before, observe())]

    def none() -> bool:
        seen.append(changes(before, observe()))
        return not seen[-1]

    with suppress(TimeoutError):
        wait_until(none, "nothing being different", 5.0)
    return seen[-1]


@contextmanager
def unchanged(victim: Victim) -> Iterator[None]:
    # Ready is told before the pipe for telling it is closed, and before each thread has begun.
    for _ in range(2):
        victim.writes()
    if victim.name == "threads16":
        victim.goes_on()
    before = settled(lambda: observed(victim.pid))
    yield
    assert lasting_changes(before, lambda: observed(victim.pid)) == ""


VICTIMS = [
    ("writer", {"kind": "mixed", "mib": 32, "threads": 3, "sparse": 1}),
    ("writer", {"kind": "many", "mib": 16}),
    ("threads16", {}),
    ("ordered", {"rings": 2, "spread": 16}),
    ("edges", {"mib": 2}),
    ("exits", {"mib": 4}),
]


@pytest.mark.parametrize(("name", "options"), VICTIMS)
def test_nothing_changes(spawn: Spawn, store: Path, name: str, options: dict[str, object]) -> None:
    victim = spawn(name, **options)
    for number in range(3):
        with unchanged(victim):
            snapshot.take(victim.pid, name=f"image-{number}", store=store).close()
        victim.healthy()


def test_nothing_changes_in_python(spawn: Spawn, store: Path) -> None:
    """Its allocator changes the map at any time; the rest must stay, and nothing be armed."""

    def steady() -> dict[str, str]:
        seen = observed(app.pid)
        assert not re.search(r"^VmFlags:.* u[wmi]\b", seen["flags"], re.M)
        kept = {key: text for key, text in seen.items() if key not in ("maps", "flags")}
        return {key: re.sub(r"^Vm\w+:.*\n", "", text, flags=re.M) for key, text in kept.items()}

    app = spawn.python(mib=8)
    app.verify()  # its thread pool is complete
    app.goes_on()
    before = settled(steady)
    snapshot.take(app.pid, name="image", store=store).close()
    assert lasting_changes(before, steady) == ""
    app.verify()


def test_no_interrupted_call(spawn: Spawn, store: Path) -> None:
    """epoll_wait, futex, poll, nanosleep, read: none returns EINTR, however often we take."""
    victim = spawn("threads16")
    for number in range(20):
        with snapshot.take(victim.pid, name=f"image-{number}", store=store):
            victim.healthy()
    victim.goes_on()


def waits_in(pid: int, call: int) -> bool:
    return Path(f"/proc/{pid}/syscall").read_text().split()[0] == str(call)


def test_a_program_blocked_in_read(store: Path) -> None:
    """cat, waiting for its input, is still in the same call with the same arguments after it."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as cat:
        wait_until(lambda: waits_in(cat.pid, 0), "cat in read(2)")
        before = Path(f"/proc/{cat.pid}/syscall").read_text()
        snapshot.take(cat.pid, name="cat", store=store).close()
        wait_until(lambda: waits_in(cat.pid, 0), "cat in read(2)")
        assert Path(f"/proc/{cat.pid}/syscall").read_text() == before
        assert cat.communicate(b"still here")[0] == b"still here"


def test_a_sleep_is_not_cut_short(store: Path) -> None:
    with subprocess.Popen(["sleep", "2"]) as sleep:
        wait_until(lambda: waits_in(sleep.pid, 230), "sleep in clock_nanosleep(2)")
        for number in range(5):
            snapshot.take(sleep.pid, name=f"sleep-{number}", store=store).close()
            assert sleep.poll() is None
        assert sleep.wait(10) == 0


def test_a_stopped_process_stays_stopped(spawn: Spawn, store: Path) -> None:
    victim = spawn("writer", mib=8)
    victim.signal(signal.SIGSTOP)
    wait_until(lambda: "T" in state_of(victim.pid), "the victim stopping")
    with snapshot.take(victim.pid, name="image", store=store) as image:
        assert image.manifest.processes[0].stopped
    assert "T (stopped)" in state_of(victim.pid)
    victim.signal(signal.SIGCONT)
    victim.verify()


def state_of(pid: int) -> str:
    status = Path(f"/proc/{pid}/status").read_text()
    return status.split("State:\t")[1].split("\n")[0]


def huge_kib(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.split("AnonHugePages:")[1].split()[0])


def test_huge_pages_stay_huge(spawn: Spawn, store: Path) -> None:
    """The sweep releases whole huge pages. (A write that faults must split the one it is in: the
    victim stands still here.)"""
    victim = spawn("writer", kind="thp", mib=64)
    victim.signal(signal.SIGSTOP)
    wait_until(lambda: "T" in state_of(victim.pid), "the victim stopping")
    before = huge_kib(victim.pid)
    if before < 32 * 1024:
        pytest.skip(
            "no huge pages here: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        )
    snapshot.take(victim.pid, name="image", store=store).close()
    assert huge_kib(victim.pid) == before
    victim.signal(signal.SIGCONT)
    victim.verify()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stage", ["before-freeze", "frozen", "resumed"])
def test_snap_ends_on_the_way(spawn: Spawn, snap: Snap, stage: str, number: signal.Signals) -> None:
    """At `frozen` every thread of the target is stopped when its tracer dies."""
    victim = spawn("threads16")
    with unchanged(victim):
        ran = snap("take", victim.pid, "--hook", f"{stage}=kill -{int(number)} $PPID", ok=False)
        assert ran.code != 0
    victim.goes_on()
    assert snap.names() == []
    # What is left of the dead take is in nobody's way.
    with unchanged(victim):
        snap("take", victim.pid, "--name", "next")
    assert snap("verify", "next").json["ok"]


def test_memory_is_given_back(spawn: Spawn, store: Path) -> None:
    """The target does not grow by being snapshotted."""
    victim = spawn("writer", mib=64)
    before = int(Path(f"/proc/{victim.pid}/statm").read_text().split()[1])
    for number in range(3):
        snapshot.take(victim.pid, name=f"image-{number}", store=store).close()
    after = int(Path(f"/proc/{victim.pid}/statm").read_text().split()[1])
    assert after - before < 256, "pages"


LOOKING = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from snapshot.resources import descriptors
print(descriptors.direct_io(int(sys.argv[1])))
"""


def test_a_look_while_it_runs_takes_no_lock_of_a_writer_that_waits() -> None:
    """Or `snap`, killed in that look, could not end: its userfaultfd would stay open, and with it
    the writer would wait for ever."""
    with faulting() as pid:
        look = [sys.executable, "-c", LOOKING, str(pid)]
        with subprocess.Popen(look, stdout=subprocess.PIPE, text=True) as looking:
            try:
                assert looking.communicate(timeout=10)[0] == "False\n"
            finally:
                os.kill(pid, signal.SIGKILL)  # nothing else ends a look that waits
