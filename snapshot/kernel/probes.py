"""Single probes from outside on a harmless process, for `snap check`: each really does the thing.

Every probe returns "" when it worked and otherwise the reason, with the errno's name.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import SnapError
from ..units import PAGE
from . import kcmp, pidfd, spawn
from ._native import ffi, lib
from .errnames import error_text
from .task_iterator import ProcessRecord, TaskProgram

STOP_US = 3_000_000


class _Failed(Exception):
    pass


def _probe(work: Callable[..., None]) -> Callable[..., str]:
    def probe(*args: object) -> str:
        try:
            work(*args)
        except (_Failed, SnapError) as error:
            return str(error)
        except OSError as error:
            return error_text(error.errno or 0)
        return ""

    probe.__doc__ = work.__doc__
    return probe


@_probe
def trace(pid: int) -> None:
    """PTRACE_SEIZE, INTERRUPT, the stop, DETACH, on a process that is not our descendant."""
    _check(lib.snap_seize(pid, 0))
    try:
        stop = ffi.new("int *")
        _check(lib.snap_halt(pid, STOP_US, stop))
    finally:
        lib.snap_detach(pid, 0)


@_probe
def read_memory(pid: int, address: int, expected: bytes) -> None:
    """process_vm_readv(2)."""

    class Vector(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    here = ctypes.create_string_buffer(len(expected))
    local = Vector(ctypes.addressof(here), len(expected))
    remote = Vector(address, len(expected))
    libc = ctypes.CDLL(None, use_errno=True)
    call = libc.process_vm_readv
    call.restype = ctypes.c_ssize_t
    one = ctypes.c_ulong(1)
    if call(pid, ctypes.byref(local), one, ctypes.byref(remote), one, ctypes.c_ulong(0)) < 0:
        _check(-ctypes.get_errno())
    if here.raw != expected:
        raise _Failed("other bytes than expected")


@_probe
def open_memory(pid: int) -> None:
    """Opening /proc/PID/mem: exactly the check that ptrace makes, without touching the process."""
    os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC))


@_probe
def scan_pages(pid: int, address: int) -> None:
    """PAGEMAP_SCAN finds the one page that is present."""
    with _pagemap(pid) as fd:
        found = ffi.new("snap_page_range[1]")
        onward = ffi.new("uint64_t *")
        present = int(lib.SNAP_PAGE_PRESENT)
        count = lib.snap_pagemap_scan(fd, address, address + PAGE, 0, present, 0, found, 1, onward)
        _check(count)
        if count != 1 or (found[0].start, found[0].end) != (address, address + PAGE):
            raise _Failed("it does not find a page that is present")


@_probe
def take_descriptor(pid: int) -> None:
    """pidfd_getfd(2) of its descriptor 0."""
    held = pidfd.open(pid)
    try:
        os.close(pidfd.getfd(held, 0))
    finally:
        os.close(held)


@_probe
def compare_descriptors(pid: int) -> None:
    """kcmp(2) of its descriptors 0 and 1."""
    kcmp.same_file(pid, 0, 1)


@_probe
def read_tasks(pid: int) -> None:
    """The BPF task iterator gives the record of the process."""
    with TaskProgram() as program:
        _check(program.error)
        with ProcessRecord(program, pid) as record:
            if record.read() is None:
                raise _Failed("it finds no process")


@_probe
def choose_pid() -> None:
    """clone3(2) with set_tid, of a pid that has just become free."""
    first = spawn.spawn(0)
    first.kill()
    spawn.spawn(first.pid).kill()


@_probe
def pid_namespace() -> None:
    """clone3(2) with CLONE_NEWPID, and the pid 4242 in there."""
    spawn.spawn(4242, namespace=True).kill()


@_probe
def map_files(pid: int) -> None:
    """/proc/PID/map_files, which leads to mapped files that have no name any more."""
    for name in os.listdir(f"/proc/{pid}/map_files"):
        os.readlink(f"/proc/{pid}/map_files/{name}")
        Path(f"/proc/{pid}/map_files/{name}").stat()
        return


@contextlib.contextmanager
def _pagemap(pid: int) -> Iterator[int]:
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _check(result: int) -> None:
    if result < 0:
        raise _Failed(error_text(-result))
