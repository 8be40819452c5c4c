"""A process of which a thread waits for a page that nobody brings, with a lock of the kernel's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import ROOT
from tests.harness.processes import wait_until

# Its second thread stays in epoll_wait, with the epoll's lock: the event is to be stored in a page
# that is missing.
PROGRAM = f"""
import ctypes, mmap, os, select, sys, threading
sys.path.insert(0, {str(ROOT)!r})
from snapshot.kernel._native import lib
from snapshot.kernel.uffd import Uffd
area = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
address = ctypes.addressof(ctypes.c_char.from_buffer(area))
uffd = Uffd.open()
uffd.api(0)
uffd.register(address, 4096, lib.UFFDIO_REGISTER_MODE_MISSING)
epoll, event = select.epoll(), os.eventfd(1)
epoll.register(event, select.EPOLLIN)
wait = ctypes.CDLL(None).epoll_wait
call = lambda: wait(epoll.fileno(), ctypes.c_void_p(address), 1, -1)
threading.Thread(target=call, daemon=True).start()
sys.stdin.read()
"""


@contextmanager
def faulting() -> Iterator[int]:
    """Its pid. Who looks at the epoll in its fdinfo waits until it is killed, and cannot be killed
    before."""
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            tasks = Path(f"/proc/{process.pid}/task")

            def faults() -> bool:
                places = [(task / "wchan").read_text() for task in tasks.iterdir()]
                return any("handle_userfault" in place for place in places)

            wait_until(faults, "the fault")
            yield process.pid
        finally:
            process.kill()
