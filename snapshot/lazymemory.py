"""Memory of a new process that is left missing, for a page server to bring.

Its userfaultfd is made inside it and handed out: the new process has the power for that, and keeps
a duplicate until all pages are in (pageserver.py says why).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import fill, lazy
from .errors import DeniedError, RestoreError
from .kernel import pidfd as pidfds
from .kernel import uffd
from .kernel.arch_x86_64 import NR
from .kernel.errnames import error_name
from .kernel.remote import Call, Remote
from .kernel.uffd import Uffd
from .manifest import Process
from .rebuild import Context

_HIGH = 900
"""The duplicate in the restored process gets this number or the next free one."""
_F_DUPFD_CLOEXEC = 1030


@contextmanager
def missing(process: Process, remote: Remote) -> Iterator[tuple[Uffd, int, dict[str, Any]]]:
    """Registers what can come later -> its userfaultfd, a pidfd of the process, and what the
    server must know of them. Both are closed at the end of the block: the server has its own."""
    number, duplicate = _create(process, remote)
    pid = remote.tracee.tid
    handle = os.pidfd_open(pid)
    try:
        with Uffd(pidfds.getfd(handle, number)) as opened:
            remote.call(NR.close, number)
            opened.api(lazy.EVENTS)
            ranges = fill.lazy_ranges(process)
            for start, end in ranges:
                opened.register(start, end - start, uffd.MISSING)
            yield opened, handle, {"pid": pid, "duplicate": duplicate, "ranges": ranges}
    finally:
        os.close(handle)


def fill_rest(process: Process, remote: Remote, ctx: Context) -> None:
    """What no page server can bring."""
    fill.fill(ctx.image, process, fill.at_once(process), remote.tracee)


def _create(process: Process, remote: Remote) -> tuple[int, int]:
    """A userfaultfd of the new process, made inside it while it still has the power for that.
    -> its number, and that of the duplicate which stays until all pages are in."""
    (number,) = remote.batch([Call(NR.userfaultfd, (os.O_CLOEXEC | os.O_NONBLOCK,))])
    if number < 0:
        raise DeniedError(
            f"userfaultfd(2) in the new process: {error_name(number)}",
            "snap restore IMAGE --eager",
        )
    highest = max((one.fd for one in process.descriptors), default=2)
    for lowest in (max(highest + 1, _HIGH), highest + 1):
        (duplicate,) = remote.batch([Call(NR.fcntl, (number, _F_DUPFD_CLOEXEC, lowest))])
        if duplicate >= 0:
            return number, duplicate
    raise RestoreError(f"no descriptor is free above {highest}", "ulimit -n 4096")
