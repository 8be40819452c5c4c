"""A lazy restore on the side of `snap restore`: start a page server, hand it the process.

What is imported here delays the start of the server, which is forked; lazymemory.py is needed only
when the process is there.
"""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import pageserver
from .errors import RestoreError
from .image import Image
from .kernel import fdcalls
from .manifest import Process

if TYPE_CHECKING:
    from .kernel.remote import Remote
    from .rebuild import Context

MESSAGE_BYTES = 1 << 16
_SECONDS = 60.0
"""A page server that has not opened its image by then never will."""


class PageServer:
    """A page server that is starting, or at work. It outlives this process once the restored
    process is its own."""

    def __init__(self, image: Image, process: Process, *, alone: bool, working_set: bool) -> None:
        """Starts one; it opens the image while the process is being rebuilt. For the two see
        restore.restore."""
        self._working_set = working_set
        self.faults = 0
        """Pages that were waited for; known when it is complete."""
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._log = image.store_path / "pageserver.log"
        self.pid = 0
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        log = os.open(self._log, flags, 0o600)
        with theirs:
            if alone and _has_one_thread():
                self._starter = _fork(image, process, theirs.fileno(), log)
            else:
                self._starter = _exec(image, process, theirs.fileno(), log)
        os.close(log)

    def memory(self, process: Process, remote: Remote, ctx: Context) -> None:
        """For rebuild: what this server can bring, it brings from here on, also to the kernel when
        that touches the memory of the new process; the rest is filled."""
        from . import lazymemory

        with lazymemory.missing(process, remote) as (uffd, handle, plan):
            self._expect("opened")
            self._reap()
            plan["working_set"] = self._working_set
            self._send(json.dumps(plan).encode(), uffd.fd, handle)
        lazymemory.fill_rest(process, remote, ctx)
        self.pid = self._expect("ready")["server"]

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
            while (message := self._message(None))["event"] != "complete":
                pass
            self.faults = message["faults"]
        except RestoreError as error:
            return error.message
        finally:
            self._await_end()
        return None

    def _reap(self) -> None:
        """The process that has made the guardian and has ended."""
        if self._starter:
            with suppress(ChildProcessError):
                os.waitpid(self._starter, 0)
        self._starter = 0

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
        self._reap()
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


def _has_one_thread() -> bool:
    return len(os.listdir("/proc/self/task")) == 1


def _fork(image: Image, process: Process, control: int, log: int) -> int:
    """From this very interpreter, which has imported all that a page server needs and read the
    index of the image. -> pid of who makes the guardian and ends."""
    image.addresses(process.index)
    store = str(image.store_path.resolve())
    # No handler of ours may run in the child: it would unwind what is the parent's.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            try:
                _become_server(image, {control}, log)
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
                pageserver.start(control, store, image.name, process.index, image)
            except BaseException as error:
                pageserver.say(None, f"the page server cannot be started: {error!r}")
            finally:
                os._exit(1)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return pid


def _become_server(image: Image, keep: set[int], log: int) -> None:
    """What a new program would be: in a session of its own, with no handlers, and no descriptors
    but `keep`, `log` as stderr, and those of objects that close them some time."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd, source in ((0, null), (1, null), (2, log)):
        os.dup2(source, fd, inheritable=True)
    fdcalls.close_others({0, 1, 2, *keep, *image.descriptors})
    os.environ["PYTHONPATH"] = _python_path()


def _exec(image: Image, process: Process, control: int, log: int) -> int:
    """The same in a new interpreter."""
    store = str(image.store_path.resolve())
    started = subprocess.Popen(
        [
            *(sys.executable, "-m", "snapshot.pageserver", "--start"),
            *(str(control), store, image.name, str(process.index)),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=log,
        pass_fds=(control,),
        start_new_session=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": _python_path()},
    )
    started.returncode = 0  # it is waited for by its pid
    return started.pid


def _python_path() -> str:
    root = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
