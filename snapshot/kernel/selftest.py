"""A process that tries on itself what take and restore will do to others, for `snap check`.

`python -m snapshot.kernel.selftest` leaves its parent (so that it is nobody's descendant, as most
targets are), prints one JSON line {"pid", "page", "features", "results"} and then waits for the end
of its input, a harmless process to be probed from outside. A result is "" when the thing works,
otherwise the reason. `page` is the address of a page that holds PATTERN.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import sys
import threading
from collections.abc import Callable

from ..errors import SnapError
from ..events import Fault, parse
from ..units import PAGE
from . import uffd
from .errnames import error_text
from .uffd import FEATURES, Uffd

PATTERN = b"snap selftest "
USERFAULTFD_IOC_NEW = 0xAA00
SYS_userfaultfd = 323
LIMIT_MS = 3000


def system_call() -> str:
    """userfaultfd(2) itself, without the way around it."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(SYS_userfaultfd, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        return error_text(ctypes.get_errno())
    os.close(fd)
    return ""


def device() -> str:
    """/dev/userfaultfd and its one ioctl."""
    try:
        fd = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return error_text(error.errno or 0)
    try:
        os.close(fcntl.ioctl(fd, USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        return error_text(error.errno or 0)
    finally:
        os.close(fd)
    return ""


def write_protect(memory: mmap.mmap, features: int) -> str:
    """Arm a page, write to it from another thread, see the fault and the old byte, release it."""
    address = _address(memory)
    memory[0] = 1
    with Uffd.open() as handle:
        handle.api(features)
        handle.register(address, PAGE, uffd.WP)
        handle.writeprotect(address, PAGE, on=True)
        writer = threading.Thread(target=ctypes.memset, args=(address, 2, 1), daemon=True)
        writer.start()
        seen = _fault(handle, address)
        if not seen and memory[0] != 1:
            seen = "the byte changed before the page was released"
        handle.writeprotect(address, PAGE, on=False)
        writer.join(LIMIT_MS / 1000)
        if not seen and memory[0] != 2:
            seen = "the write did not go through after the release"
    return seen


def missing(memory: mmap.mmap) -> str:
    """Leave a page out, read it from another thread, put it in place."""
    address = _address(memory)
    read: list[bytes] = []
    with Uffd.open() as handle:
        handle.api(FEATURES["EVENT_FORK"])  # only with CAP_SYS_PTRACE, and no lazy restore without
        handle.register(address, PAGE, uffd.MISSING)

        def touch() -> None:
            copied = ctypes.create_string_buffer(1)
            ctypes.memmove(copied, address, 1)
            read.append(copied.raw)

        reader = threading.Thread(target=touch, daemon=True)
        reader.start()
        seen = _fault(handle, address)
        handle.copy(address, bytearray(b"\x07" * PAGE), PAGE)
        reader.join(LIMIT_MS / 1000)
    return seen or ("" if read == [b"\x07"] else "the page was not the one put in place")


def _fault(handle: Uffd, address: int) -> str:
    if not handle.poll(LIMIT_MS):
        return f"no fault within {LIMIT_MS} ms"
    found = [event for event in parse(handle.read_msgs()) if isinstance(event, Fault)]
    if not found or found[0].address & -PAGE != address:
        return "another event instead of the fault"
    return ""


def _anonymous() -> mmap.mmap:
    return mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _shared() -> mmap.mmap:
    fd = os.memfd_create("snap-selftest")
    try:
        os.truncate(fd, PAGE)
        return mmap.mmap(fd, PAGE, mmap.MAP_SHARED)
    finally:
        os.close(fd)


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _tried(test: Callable[[], str]) -> str:
    try:
        return test()
    except Exception as error:
        return str(error) or type(error).__name__


def run() -> dict[str, str]:
    """All results by name."""
    wp = FEATURES["PAGEFAULT_FLAG_WP"]
    shared = wp | FEATURES["WP_HUGETLBFS_SHMEM"]
    return {
        "system_call": _tried(system_call),
        "device": _tried(device),
        "wp_private": _tried(lambda: write_protect(_anonymous(), wp)),
        "wp_shared": _tried(lambda: write_protect(_shared(), shared)),
        "missing": _tried(lambda: missing(_anonymous())),
    }


def _main() -> None:
    if os.fork():
        os._exit(0)
    memory = _anonymous()
    memory[: len(PATTERN)] = PATTERN
    features: list[str] = []
    with contextlib.suppress(SnapError):  # "system_call" and "device" say why
        features = uffd.names(uffd.available())
    report = {
        "pid": os.getpid(),
        "page": _address(memory),
        "features": features,
        "results": run(),
    }
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    _main()
