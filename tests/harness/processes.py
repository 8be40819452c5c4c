"""Starting, watching and ending processes in tests, without sleeping and without leaving any.

The test session is made a subreaper (prctl): whatever is orphaned below it (a page server, a
restored process whose `snap restore` has ended) becomes its child and can be found, and reaped.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
WALL = 0x40000000  # __WALL of wait4(2): threads too
_ONE_LOOK = 0.5
"""Seconds that a look and its pause count for at most."""
_libc = ctypes.CDLL(None, use_errno=True)


def become_subreaper() -> None:
    if _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def give_memory_back() -> None:
    """What malloc keeps of what was freed here: oracles are made of single pages, gigabytes of them
    in all the tests, and each fork copies the page tables of what is kept."""
    _libc.malloc_trim(0)


def wait_until(true: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """Until `true()` holds: for states that nothing announces. TimeoutError names `what`. A time in
    which the whole machine stood still counts little."""
    waited, before = 0.0, time.monotonic()
    pause = 0.0005
    while not true():
        now = time.monotonic()
        waited += min(now - before, _ONE_LOOK)
        if waited > seconds:
            raise TimeoutError(f"{what}: not after {seconds:g} s")
        before = now
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)


def stat_fields(pid: int) -> list[str]:
    """/proc/PID/stat from field 3 (the state) on; [] when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text[text.rindex(")") + 2 :].split()


def state(pid: int) -> str:
    """The one letter of /proc/PID/stat, or '' when there is no such process."""
    fields = stat_fields(pid)
    return fields[0] if fields else ""


def children(pid: int) -> list[int]:
    """Children of all threads of `pid`, zombies included."""
    found: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with suppress(FileNotFoundError, ProcessLookupError):
                text = Path(f"/proc/{pid}/task/{task}/children").read_text()
                found += [int(child) for child in text.split()]
    return found


def descendants(pid: int) -> list[int]:
    """Every process below `pid`, parents before their children."""
    found = children(pid)
    for child in found:
        found += children(child)
    return found


def members(leader: int) -> list[int]:
    """Every process whose process group or session has that number."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in pids if str(leader) in stat_fields(pid)[2:4]]


def open_files(pid: int) -> dict[str, str]:
    """The links of /proc/PID/fd by descriptor; what is closed while they are read is left out."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            found[name] = os.readlink(f"/proc/{pid}/fd/{name}")
    return found


def command_line(pid: int) -> str:
    """For messages. Not /proc/PID/cmdline: reading that touches the process's own memory, which
    would wait for ever on a restored process whose page server is gone."""
    try:
        comm = Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return "(gone)"
    return f"{comm} [{state(pid)}]"


def watchdogs() -> list[int]:
    """Of takes of this process and of those below it, as far as they have their names by now."""
    return [pid for pid in descendants(os.getpid()) if "snap-watchdog" in command_line(pid)]


def nothing_watches() -> bool:
    """Whether all of those have ended."""
    return all(map(ended, watchdogs()))


def threads(pid: int) -> str:
    """Each thread with its state, its tracer and where in the kernel it waits: for messages."""
    found = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with suppress(FileNotFoundError, ProcessLookupError):
                root = Path(f"/proc/{pid}/task/{task}")
                status = dict(
                    line.split(":\t", 1) for line in (root / "status").read_text().splitlines()
                )
                place = (root / "wchan").read_text()
                tracer = status["TracerPid"].strip()
                found.append(f"{task} {status['Name']} {status['State']} {tracer} {place}")
    return "; ".join(found)


def ended(pid: int) -> bool:
    """Whether `pid` is gone for good, its number free again. A zombie of our own is reaped."""
    letter = state(pid)
    if letter != "Z":
        return letter == ""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return state(pid) == ""


def kill(pid: int, seconds: float = 20.0) -> None:
    """SIGKILL and wait until nothing of the process is left (its pid can be used again)."""
    try:
        handle = os.pidfd_open(pid)
    except (ProcessLookupError, FileNotFoundError):  # gone, its number perhaps a thread's by now
        return
    try:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        if not poll.poll(1000):
            _reap_traced(pid)
        if not poll.poll(seconds * 1000):
            raise TimeoutError(f"process {pid} did not end on SIGKILL: {threads(pid)}")
    finally:
        os.close(handle)
    wait_until(lambda: ended(pid), f"process {pid} being reaped", seconds)


def _reap_traced(pid: int) -> None:
    """Threads that this very process traces, after a freeze that failed, hold their process back
    until they are waited for."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with suppress(ChildProcessError):
                os.waitpid(int(task), os.WNOHANG | WALL)


def kill_all(pids: list[int]) -> None:
    """All of them first, then wait: a page server may hold what its client waits for."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid in pids:
        kill(pid)


def has_ended(pid: int, seconds: float = 20.0) -> None:
    """Waits until `pid` ends by itself and is reaped; TimeoutError otherwise."""
    wait_until(lambda: ended(pid), f"the end of process {pid}", seconds)
