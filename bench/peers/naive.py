"""Stop and copy: SIGSTOP, process_vm_readv of all writable memory, SIGCONT.

Into a buffer that is used again and again, and nothing is kept: no copy of a stopped process can be
faster than this, whatever it does with the bytes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from bench.figures import Row
from tests.harness import processes

PIECE = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def why_not() -> str | None:
    return None if hasattr(_libc, "process_vm_readv") else "the C library has no process_vm_readv"


def _stands(pid: int) -> bool:
    return all(processes.state(int(task)) == "T" for task in os.listdir(f"/proc/{pid}/task"))


def _writable(pid: int) -> Iterator[tuple[int, int]]:
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, permissions = line.split()[:2]
        if permissions.startswith("rw"):
            start, end = (int(one, 16) for one in addresses.split("-"))
            yield start, end


def _present(pid: int, start: int, end: int) -> bool:
    """Whether anything is there: reservations that nobody wrote to are not copied by anyone."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        entries = os.pread(pagemap.fileno(), (end - start) >> 12 << 3, start >> 12 << 3)
    return any(entries[7::8])


def copy(pid: int) -> Row:
    buffer = ctypes.create_string_buffer(PIECE)
    local, remote = _Vector(ctypes.addressof(buffer), PIECE), _Vector()
    done = 0
    began = time.monotonic_ns()
    os.kill(pid, signal.SIGSTOP)
    try:
        while not _stands(pid):
            pass
        for start, end in _writable(pid):
            for at in range(start, end, PIECE):
                length = min(PIECE, end - at)
                if not _present(pid, at, at + length):
                    continue
                remote.base, remote.length = at, length
                got = _libc.process_vm_readv(
                    pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0
                )
                done += max(got, 0)
    finally:
        os.kill(pid, signal.SIGCONT)
    ended = time.monotonic_ns()
    return {"pause_us": (ended - began) / 1000, "saved_bytes": done, "exit_code": 0}
