"""A new, nearly empty process with a chosen pid, that a restore rebuilds into the old one.

clone3(2) with set_tid needs CAP_CHECKPOINT_RESTORE (or CAP_SYS_ADMIN); a pid namespace of its own
needs CAP_SYS_ADMIN. A pid is in use as long as a process, a zombie, a thread, a process group or a
session has it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from ..errors import DeniedError, KernelError, RestoreError
from . import stub_x86_64 as stub
from ._native import ffi, lib
from .errnames import error_text

_WALL = 0x40000000
_PF_EXITING = 0x4
PATIENCE = 2.0
"""Seconds for the last holder of a pid to be gone."""
PID_NEW = "snap restore IMAGE --pid new"


class Spawned(Struct, eq=False):
    """A process that only sleeps, every signal but SIGTRAP blocked, and dies with its parent's
    thread until it is told otherwise (PR_SET_PDEATHSIG)."""

    pid: int  # as seen from here
    waited: int  # our child to wait for: the process, or pid 1 of its namespace
    pidfd: int  # of `waited`; ours to close
    namespace: bool  # it lives in a pid namespace of its own

    def kill(self) -> None:
        """Ends and reaps it (with its whole namespace); nothing is left. May be called twice.

        If it is traced, then by the calling OS thread: a leader cannot be reaped before its tracer
        has reaped every other thread.
        """
        if self.pidfd < 0:
            return
        threads = _threads(self.pid)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        for tid in threads:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(tid, _WALL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.waited, 0)
        self.close()

    def close(self) -> None:
        """Forgets the process, which goes on."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def spawn(pid: int, keep: Sequence[int] = (), namespace: bool = False) -> Spawned:
    """A new process with `pid` (0: any) that inherits the descriptors `keep` at their numbers,
    and 0, 1 and 2. With `namespace` the pid is that of a new pid namespace, whose pid 1 ends with
    the exit status of the process and takes the rest of the namespace with it.

    RestoreError when the pid is in use, naming by whom; DeniedError without the capability.
    """
    program = _memfd("snap-stub", stub.pause())
    init = _memfd("snap-init", stub.init(pid)) if namespace else -1
    try:
        request = ffi.new("spawn_request *")
        numbers = ffi.new("int[]", list(keep))
        request.program, request.pid, request.init = program, pid, init
        request.keep, request.keep_count = numbers, len(keep)
        result = lib.spawn(request)
        for _ in attempts(pid) if result == -errno.EEXIST else ():
            result = lib.spawn(request)
            if result != -errno.EEXIST:
                break
    finally:
        for opened in (program, init):
            if opened >= 0:
                os.close(opened)
    if result < 0:
        raise _error(-result, request.failed, pid)
    spawned = Spawned(result, result, request.pidfd, namespace)
    if namespace:
        try:
            spawned.pid = _only_child(result)
        except BaseException:
            spawned.kill()
            raise
    return spawned


def twin() -> int:
    """fork(2) with the descriptor table shared: -> pid of the child, 0 in the child. The caller has
    one thread only. The child ends with os._exit or exec."""
    pid = int(lib.spawn_twin())
    if pid < 0:
        raise KernelError(f"clone(CLONE_FILES): {os.strerror(-pid)}", "ulimit -u")
    return pid


def _threads(pid: int) -> list[int]:
    """All but the leader."""
    with contextlib.suppress(OSError):
        return [int(name) for name in os.listdir(f"/proc/{pid}/task") if int(name) != pid]
    return []


def _memfd(name: str, content: bytes) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.write(fd, content)
    return fd


def _only_child(init: int) -> int:
    """The child of pid 1 of the namespace, as seen from here."""
    children = Path(f"/proc/{init}/task/{init}/children")
    with contextlib.suppress(FileNotFoundError):  # only with CONFIG_PROC_CHILDREN
        listed = children.read_text().split()
        if listed:
            return int(listed[0])
    for each in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if each.name.isdigit() and _stat(each / "stat")[3 - 2] == str(init):
                return int(each.name)
    raise RestoreError("the process ended as soon as it was made", f"{PID_NEW} --eager")


def _stat(path: Path) -> list[str]:
    """Fields of /proc/PID/stat from the third (state) on: [state, ppid, pgrp, session, …]."""
    return path.read_text(errors="replace").rpartition(")")[2].split()


def holder(pid: int) -> str | None:
    """Who uses the number `pid` here: "process 12 (sh)", "thread 13 of process 12 (sh)",
    "zombie 12 (sh)", "process group of process 14 (cat)"; None when nobody does."""
    direct = Path(f"/proc/{pid}")
    with contextlib.suppress(OSError):
        comm = (direct / "comm").read_text(errors="replace").strip()
        state = _stat(direct / "stat")[0]
        status = (direct / "status").read_text(errors="replace")
        leader = next(
            (int(line[5:]) for line in status.splitlines() if line.startswith("Tgid:")), pid
        )
        if leader != pid:
            return f"thread {pid} of process {leader} ({comm})"
        return f"{'zombie' if state == 'Z' else 'process'} {pid} ({comm})"
    for each in Path("/proc").iterdir():
        if not each.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            fields = _stat(each / "stat")
            if str(pid) in fields[2:4]:
                comm = (each / "comm").read_text(errors="replace").strip()
                kind = "process group" if fields[2] == str(pid) else "session"
                return f"the {kind} of process {each.name} ({comm})"
    return None


def attempts(pid: int) -> Iterator[None]:
    """Yields as long as another attempt to get the number `pid` makes sense after EEXIST: its
    holder is ending or has just been reaped (the kernel frees the number a moment later)."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and _is_leaving(pid):
        time.sleep(0.001)
        yield


def _is_leaving(pid: int) -> bool:
    try:
        fields = _stat(Path(f"/proc/{pid}/stat"))
    except OSError:
        return holder(pid) is None
    return fields[0] in "ZX" or bool(int(fields[9 - 3]) & _PF_EXITING)


def in_use(pid: int) -> RestoreError:
    """The error for a number that somebody has."""
    who = holder(pid)
    message = f"pid {pid} is in use" + (f" by {who}" if who else "")
    return RestoreError(message, PID_NEW)


def _error(error: int, failed: int, pid: int) -> Exception:
    if failed == lib.SPAWN_CLONE and error == errno.EEXIST:
        return in_use(pid)
    if failed == lib.SPAWN_CLONE and error == errno.EINVAL and pid:
        message = f"pid {pid} cannot be chosen (larger than kernel.pid_max, or no set_tid)"
        return RestoreError(message, PID_NEW)
    what = {
        lib.SPAWN_CLONE: f"clone3(set_tid={pid})",
        lib.SPAWN_EXEC: "execveat of the stub",
        lib.SPAWN_INIT: "clone3(CLONE_NEWPID | CLONE_NEWNS)",
        lib.SPAWN_MOUNT: "mounting /proc in the new namespace",
    }.get(failed, "spawn")
    message = f"{what}: {error_text(error)}"
    if error in (errno.EPERM, errno.EACCES):
        return DeniedError(message, "sudo snap check")
    return KernelError(message, "snap check")
