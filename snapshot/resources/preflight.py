"""What of a process cannot be taken or will be missing, known before anything is touched."""

from __future__ import annotations

import os

from ..errors import TargetError
from ..kernel import procfs
from . import credentials

SHARED_NAMESPACES = ("mnt", "net", "ipc", "uts", "cgroup", "time")
"""A restored process lives in those of `snap restore`."""


def unsupported(pid: int) -> list[str]:
    """Things of process `pid` that make a take impossible, each as a line for people."""
    things = []
    if _foreign(pid, "user"):
        things.append("another user namespace (its capabilities would count in this one)")
    for tid in procfs.threads(pid):
        try:
            status = procfs.status(pid, tid)
        except TargetError:
            continue  # this thread has ended meanwhile
        if "x86_Thread_features" in status and "shstk" in status["x86_Thread_features"]:
            things.append(f"thread {tid} has a shadow stack")
    return things


def warnings(pid: int) -> list[str]:
    """What a restored process will not have as it was."""
    found = namespaces(pid)
    confined = credentials.warning(credentials.state(procfs.status(pid), 0), pid)
    return [*found, confined] if confined else found


def namespaces(pid: int) -> list[str]:
    """Those that the process is in, and a restored one will not be."""
    return [
        f"process {pid} is in another {name} namespace; it will be restored in that of snap"
        for name in SHARED_NAMESPACES
        if _foreign(pid, name)
    ]


def _foreign(pid: int, name: str) -> bool:
    try:
        own = os.readlink(f"/proc/self/ns/{name}")
    except OSError:
        return False  # not in this kernel
    return os.fsencode(own) != procfs.link(pid, f"ns/{name}")
