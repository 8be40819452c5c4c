"""Why a thread cannot be traced or does not stop, in words of use to a user.

The conditions are those of ptrace(2), "Ptrace access mode checking", and of kernel/ptrace.c.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import NoReturn

from ..errors import DeniedError, KernelError, SnapError, TargetError
from .errnames import error_name

_CAP_SYS_PTRACE = 19
_PF_EXITING = 0x00000004
_PF_KTHREAD = 0x00200000
_ENDING_SECONDS = 0.5


def fail(tid: int, request: str, number: int) -> NoReturn:
    """The error for a request that should not have failed."""
    if number == errno.ESRCH and _ends(tid):
        raise TargetError(f"thread {tid} has ended ({request})", f"ps -p {tid}")
    raise KernelError(
        f"{request} for thread {tid}: {error_name(number)}",
        f"cat /proc/{tid}/status",
    )


def _ends(tid: int) -> bool:
    """Whether a thread has ended or is about to: between the signal that kills it and the flag that
    says so, nothing of it tells."""
    until = time.monotonic() + _ENDING_SECONDS
    while time.monotonic() < until:
        fields = status(tid)
        if not fields or fields["State"].startswith(("Z", "X")) or _flags(tid) & _PF_EXITING:
            return True
        time.sleep(0.001)
    return False


def _flags(tid: int) -> int:
    """PF_* of linux/sched.h (proc_pid_stat(5), field 9); 0 when there is no such thread."""
    fields = _text(f"/proc/{tid}/stat").rpartition(")")[2].split()
    return int(fields[6]) if len(fields) > 6 else 0


def stuck(tids: Sequence[int], timeout: float) -> str:
    """Names threads that did not stop in time, with what they are doing."""
    names = []
    for tid in tids[:5]:
        fields = status(tid)
        place = _text(f"/proc/{tid}/wchan") or "?"
        state = fields.get("State", "?")
        names.append(f"{tid} ({fields.get('Name', '?')}), state {state}, in {place}")
    more = f" and {len(tids) - 5} more" if len(tids) > 5 else ""
    return f"not stopped within {timeout:g} s: " + "; ".join(names) + more


def status(pid: int) -> dict[str, str]:
    """/proc/PID/status by field; empty when there is no such process."""
    lines = (line.partition(":") for line in _text(f"/proc/{pid}/status").splitlines())
    return {name: value.strip() for name, _, value in lines}


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def refused(tid: int, number: int) -> NoReturn:
    """The error for a thread that could not be seized."""
    fields = status(tid)
    if number == errno.EPERM and fields:
        raise _lasting(tid, fields) or _why_denied(tid, fields)
    if fields and fields.get("Tgid") != str(tid):
        leader = fields.get("Tgid", "?")
        raise TargetError(f"{tid} is a thread of process {leader}", f"ps -L -p {leader}")
    if number == errno.ESRCH or not fields:
        raise TargetError(f"there is no process {tid}", "ps -e")
    fail(tid, "PTRACE_SEIZE", number)


def refused_for_good(tid: int) -> None:
    """Raises the error for a thread that will not be ours in a moment either; returns for one that
    might (its process is in execve, say)."""
    if error := _lasting(tid, status(tid)):
        raise error


def _lasting(tid: int, fields: dict[str, str]) -> SnapError | None:
    """Why the kernel says EPERM, if it will say so for ever; None in what execve passes through."""
    label = f"process {tid} ({fields.get('Name', '?')})"
    if int(fields.get("Tgid", 0)) == os.getpid():
        return TargetError(f"{label} is this process itself: a tracer must be another process")
    tracer = int(fields.get("TracerPid", 0))
    if tracer == threading.get_native_id() and fields.get("State", "").startswith(("Z", "X")):
        return TargetError(f"{label} has ended", f"ps -p {tid}")
    if tracer:
        name = status(tracer).get("Name", "?")
        return TargetError(f"{label} is traced by {tracer} ({name}) already", f"ps -p {tracer}")
    if _flags(tid) & _PF_KTHREAD:
        return TargetError(f"{label} is a kernel thread: it has no memory of its own", "ps -ef")
    ended = fields.get("State", "").startswith(("Z", "X"))
    if ended and int(fields.get("Threads", 1)) <= 1:
        return TargetError(f"{label} is a zombie", f"ps -p {tid}")
    return None if ended or capable() else _denied(label, tid, fields)


def _why_denied(tid: int, fields: dict[str, str]) -> SnapError:
    label = f"process {tid} ({fields.get('Name', '?')})"
    if fields.get("State", "").startswith(("Z", "X")):
        return TargetError(f"{label}: its main thread has ended", f"ps -L -p {tid}")
    return _denied(label, tid, fields)


def capable() -> bool:
    """Whether this process may trace whomever it likes (CAP_SYS_PTRACE)."""
    effective = int(status(os.getpid()).get("CapEff", "0"), 16)
    return bool(effective >> _CAP_SYS_PTRACE & 1)


def _denied(label: str, tid: int, fields: dict[str, str]) -> DeniedError:
    return DeniedError(
        f"no permission to trace {label}: " + _obstacle(tid, fields), f"sudo snap check {tid}"
    )


def _obstacle(tid: int, fields: dict[str, str]) -> str:
    """What to name of the conditions of ptrace(2), "Ptrace access mode checking"."""
    if capable():
        return "a security module or its user namespace forbids it, though CAP_SYS_PTRACE is there"
    uids = set(fields.get("Uid", "").split())
    if uids != {str(os.getuid())}:
        return f"it runs as user {'/'.join(sorted(uids))}, and CAP_SYS_PTRACE is missing"
    scope = _text("/proc/sys/kernel/yama/ptrace_scope").strip()
    if scope not in ("", "0"):
        return (
            f"kernel.yama.ptrace_scope is {scope} (tracing of other processes is restricted), "
            "and CAP_SYS_PTRACE is missing"
        )
    try:
        hidden = os.stat(f"/proc/{tid}/stat").st_uid != os.getuid()
    except OSError:
        hidden = False
    if hidden:
        return (
            "it is not dumpable (prctl PR_SET_DUMPABLE, or its program file is unreadable), "
            "and CAP_SYS_PTRACE is missing"
        )
    return "CAP_SYS_PTRACE is missing (it may hold capabilities that this process lacks)"


def stop_name(stop: int) -> str:
    """A wait status for people: `signal SIGSEGV`."""
    number = stop >> 8 & 0x7F
    try:
        return f"signal {signal.Signals(number).name}"
    except ValueError:
        return f"stop {stop:#x}"
