"""A snap that stands still, or whose store does, does not keep its target waiting for long."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, Reap, Snap, Spawn
from tests.harness import processes
from tests.harness.faulting import faulting
from tests.harness.victims import BIN, Victim

pytestmark = pytest.mark.live

STALL = 1


def unharmed(victim: Victim) -> None:
    victim.goes_on()
    victim.verify()
    status = Path(f"/proc/{victim.pid}/status").read_text()
    assert "TracerPid:\t0" in status
    assert " uw" not in Path(f"/proc/{victim.pid}/smaps").read_text()
    processes.wait_until(processes.nothing_watches, "the end of the watchdog")


@pytest.mark.parametrize("stage", ["frozen", "resumed"])
def test_snap_is_stopped(spawn: Spawn, snap: Snap, stage: str) -> None:
    """SIGSTOP in the middle of a take: in the pause, and while writers wait for it."""
    victim = spawn("writer", kind="anon", mib=64, threads=2)
    hook = f"{stage}=kill -STOP $PPID"
    ran = snap("take", victim.pid, "--now", "--stall", STALL, "--hook", hook, ok=False)
    assert ran.code == -signal.SIGKILL
    assert f"process {victim.pid} is not kept waiting" in ran.err
    assert re.search(r"^snap: snap-faults: (-?\d+|running) in \w+$", ran.err, re.MULTILINE)
    unharmed(victim)
    assert snap.names() == []
    snap("take", victim.pid, "--name", "next")
    assert snap("verify", "next").json["ok"]


BEATING = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from snapshot.kernel.watchdog import Watchdog
with Watchdog(1, {STALL}) as watchdog:
    watchdog.beat()
    print(flush=True)
    while sys.stdin.readline() != "end\\n":
        watchdog.beat()
        print(flush=True)
"""


def test_the_whole_machine_stands_still(reap: Reap) -> None:
    """The watchdog too: it comes first when time goes on, long after the last beat by the clock."""
    pipe = subprocess.PIPE
    words = [sys.executable, "-c", BEATING]
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, bufsize=1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        reap.add(process.pid)
        assert process.stdout.readline() == "\n"
        processes.wait_until(lambda: len(processes.watchdogs()) == 1, "its watchdog")
        (watchdog,) = processes.watchdogs()
        both = (process.pid, watchdog)
        for pid in both:
            os.kill(pid, signal.SIGSTOP)
        processes.wait_until(lambda: {*map(processes.state, both)} == {"T"}, "their stop")
        time.sleep(2 * STALL)  # what is waited for is that time passes
        looks = switches(watchdog)
        os.kill(watchdog, signal.SIGCONT)
        processes.wait_until(lambda: switches(watchdog) >= looks + 2, "a look of the watchdog")
        os.kill(process.pid, signal.SIGCONT)
        process.stdin.write("beat\n")
        assert process.stdout.readline() == "\n"
        process.stdin.write("end\n")
        assert process.wait(20) == 0


def switches(pid: int) -> int:
    """How often it has waited for something."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("\nvoluntary_ctxt_switches:")[1].split()[0])


def test_ctrl_z_does_not_stop_it(spawn: Spawn, snap: Snap) -> None:
    victim = spawn("writer", kind="anon", mib=16)
    for stage in ("frozen", "resumed"):
        snap("take", victim.pid, "--name", stage, "--hook", f"{stage}=kill -TSTP $PPID")
    unharmed(victim)


def test_the_store_is_stuck(spawn: Spawn, snap: Snap, tmp_path: Path) -> None:
    """Its disk does not answer, and there is no room to spill to: writers wait for a second,
    then the take is given up."""
    victim = spawn("writer", kind="anon", mib=96, threads=2)
    snap("take", victim.pid, "--name", "first")  # makes the store
    stuck = tmp_path / "stuck"
    shim = ("env", f"LD_PRELOAD={BIN / 'stuckdisk.so'}", f"STUCK_DISK={stuck}")
    words = [*shim, *snap.command, "take", str(victim.pid), "--store", str(snap.store), "--now"]
    words += ["--memory", "4M", "--stall", str(STALL), "--hook", f"frozen=touch {stuck}"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        processes.wait_until(stuck.exists, "T0")
        processes.wait_until(lambda: not armed(victim.pid), "the target being let go")
        victim.goes_on()
        stuck.unlink()  # the disk answers again: now it can undo what it wrote
        _, error = process.communicate(timeout=60)
    assert process.returncode == 8, error
    assert "the store took nothing" in error
    unharmed(victim)
    assert snap.names() == ["first"]


def armed(pid: int) -> bool:
    return " uw" in Path(f"/proc/{pid}/smaps").read_text()


# Killed in a look from which the kernel lets nobody return: an epoll of FAULTING's, which holds its
# lock for as long as nobody serves its fault.
STUCK = f"""
import os, signal, sys, threading
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from snapshot.hooks import Hooks
from snapshot.take import take
target, store, infos = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
def kill():
    while "ep_show_fdinfo" not in Path(f"/proc/{{os.getpid()}}/wchan").read_text():
        pass
    os.kill(os.getpid(), signal.SIGKILL)
def look(context):
    threading.Thread(target=kill).start()
    (infos / sys.argv[4]).read_bytes()
hooks = Hooks(dict(resumed=look), installed=False)
take(target, store=store, name="image", memory=4 << 20, now=True, stall={STALL}, hooks=hooks)
"""


def test_a_snap_that_is_killed_and_cannot_end(spawn: Spawn, snap: Snap) -> None:
    # The sweep waits for the store, and few writes go past it: there is time to be killed in.
    victim = spawn("writer", kind="anon", mib=512, threads=2, rate=300)
    with faulting() as other:
        infos = Path(f"/proc/{other}/fdinfo")
        (epoll,) = (
            name for name, file in processes.open_files(other).items() if "eventpoll" in file
        )
        words = [sys.executable, "-c", STUCK, str(victim.pid), str(snap.store), str(infos), epoll]
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
            try:
                processes.wait_until(lambda: has_died(process.pid), "its other threads' end")
                assert armed(victim.pid)
                processes.wait_until(lambda: not armed(victim.pid), "the target being let go")
                victim.goes_on()
                victim.verify()
                assert process.poll() is None
            finally:
                os.kill(other, signal.SIGKILL)
            _, error = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGKILL
    assert f"process {victim.pid} is not kept waiting" in error
    unharmed(victim)
    assert snap.names() == []
    snap("take", victim.pid, "--name", "next")


def has_died(pid: int) -> bool:
    """It was killed, and one thread, which is stuck, is left of it."""
    status, place = (Path(f"/proc/{pid}/{name}").read_text() for name in ("status", "wchan"))
    return "\nThreads:\t1\n" in status and "ep_show_fdinfo" in place
