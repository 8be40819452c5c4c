"""A lazy restore on the side of `snap restore`: start a page server, hand it the process."""

from __future__ import annotations

import array
import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import fill, lazy
from .errors import DeniedError, RestoreError
from .image import Image
from .kernel import pidfd as pidfds
from .kernel import uffd
from .kernel.arch_x86_64 import NR
from .kernel.errnames import error_name
from .kernel.remote import Call, Remote
from .kernel.uffd import Uffd
from .manifest import Process
from .rebuild import Context

MESSAGE_BYTES = 1 << 16
_HIGH = 900
"""The duplicate in the restored process gets this number or the next free one."""
_F_DUPFD_CLOEXEC = 1030
_SECONDS = 60.0
"""A page server that has not opened its image by then never will."""


class PageServer:
    """A page server that is starting, or at work. It outlives this process once the restored
    process is its own."""

    def __init__(self, image: Image, process: Process) -> None:
        """Starts one; it opens the image while the process is being rebuilt."""
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._log = image.store_path / "pageserver.log"
        self.pid = 0
        root = str(Path(__file__).resolve().parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        store = str(image.store_path.resolve())
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        log = os.open(self._log, flags, 0o600)
        with theirs:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "snapshot.pageserver", "--start"),
                    *(str(theirs.fileno()), store, image.name, str(process.index)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                cwd="/",
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
        os.close(log)

    def memory(self, process: Process, remote: Remote, ctx: Context) -> None:
        """For rebuild: what this server can bring, it brings from here on, also to the kernel when
        that touches the memory of the new process; the rest is filled."""
        self._expect("opened")
        self._process.wait()  # it has forked
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
                plan = {"pid": pid, "duplicate": duplicate, "ranges": ranges}
                self._send(json.dumps(plan).encode(), opened.fd, handle)
            self.pid = self._expect("ready")["server"]
        finally:
            os.close(handle)
        fill.fill(ctx.image, process, fill.at_once(process), remote.tracee)

    def _send(self, plan: bytes, *descriptors: int) -> None:
        """The plan goes as a file: with tens of thousands of regions it is too long to be sent."""
        with os.fdopen(os.memfd_create("snap-plan", os.MFD_CLOEXEC), "wb") as file:
            file.write(plan)
            file.flush()
            rights = array.array("i", [*descriptors, file.fileno()])
            self._control.sendmsg([b"plan"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])

    def running(self) -> None:
        """The process has been let go: the server may stop it for a moment at the end."""
        with suppress(OSError):
            self._control.send(b"running", socket.MSG_NOSIGNAL)

    def complete(self) -> str | None:
        """Waits until all pages are in and the server has ended -> None; or what went wrong, if the
        process was killed."""
        try:
            while self._message(None)["event"] != "complete":
                pass
        except RestoreError as error:
            return error.message
        finally:
            self._await_end()
        return None

    def _await_end(self) -> str | None:
        """Guardian and server share their end of the connection: it closes with the last one.
        -> why they ended, if they say so."""
        reason = None
        with suppress(OSError):
            self._control.settimeout(_SECONDS)
            while data := self._control.recv(MESSAGE_BYTES):
                reason = json.loads(data).get("message", reason)
        self._control.close()
        return reason

    def abandon(self) -> str | None:
        """The process is no more, or never was: waits for the end of guardian and server. -> why
        they ended, if that came first."""
        self._process.wait()
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)
        return self._await_end()

    def failed(self, reason: str) -> RestoreError:
        """What it said of its end, as an error."""
        return RestoreError(f"page server: {reason}", f"tail {self._log}")

    def _expect(self, event: str) -> dict[str, Any]:
        message = self._message(_SECONDS)
        if message["event"] != event:
            raise RestoreError(f"the page server said {message}", f"cat {self._log}")
        return message

    def _message(self, seconds: float | None) -> dict[str, Any]:
        self._control.settimeout(seconds)
        try:
            data = self._control.recv(MESSAGE_BYTES)
        except ConnectionResetError:
            data = b""
        except TimeoutError:
            raise RestoreError(
                f"the page server did not answer in {seconds} s", f"cat {self._log}"
            ) from None
        if not data:
            raise RestoreError("the page server ended", f"tail {self._log}")
        message: dict[str, Any] = json.loads(data)
        if message["event"] == "failed":
            raise self.failed(message["message"])
        return message


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
