"""Bringing a process back: image → rebuild → lazy.

Eager: the process is rebuilt, filled and let go. Lazy: it is let go with its memory missing, and a
page server (pageserver.py) brings each page at its first touch and streams the rest. Whatever goes
wrong before it runs, nothing of it is left.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, Protocol

from msgspec import MsgspecError, Struct, field

from .errors import DamagedError, TargetError, UnsupportedError
from .image import Image
from .manifest import Process
from .paging import PageServer
from .stats import Progress, ProgressCallback, Stopwatch

if TYPE_CHECKING:
    from .kernel.remote import Remote
    from .rebuild import Context, Rebuilt

log = logging.getLogger("snap")


class Hooks(Protocol):
    """hooks.Hooks."""

    def run(self, stage: str, /, *, pid: int, image: str) -> None: ...
    def wants(self, stage: str, /) -> bool: ...


class Restored(Struct, eq=False):
    """A restored process, which runs. It is a child of this process."""

    image: str
    pid: int
    mode: Literal["eager", "lazy"]
    ready_us: int  # from the start of the restore until it ran
    server_pid: int | None = None
    closed_connections: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    _waited: int = 0
    _server: PageServer | None = None
    _status: int | None = None
    _completing: threading.Lock = field(default_factory=threading.Lock)
    _completed: bool = False
    _failure: str | None = None

    def wait(self) -> int:
        """Until it ends -> its exit status, -n when signal n ended it (`--pid new`: 128 + n)."""
        if self._status is None:
            _, status = os.waitpid(self._waited, 0)
            self._status = os.waitstatus_to_exitcode(status)
        return self._status

    @property
    def faults(self) -> int:
        """How often a thread waited for a page that was missing; known after `complete`."""
        return self._server.faults if self._server else 0

    def complete(self) -> str | None:
        """Until all of its memory is there -> None, or why it was killed instead."""
        with self._completing:
            if self._server is not None and not self._completed:
                self._failure = self._server.complete()
                self._completed = True
            return self._failure


def restore(
    image: Image,
    *,
    lazy: bool = False,
    pid: Literal["keep", "new"] = "keep",
    hooks: Hooks | None = None,
    stdio: Sequence[int] = (0, 1, 2),
    progress: ProgressCallback | None = None,
    parent_stays: bool = False,
    alone: bool = False,
    working_set: bool = True,
) -> Restored:
    """Brings the process of `image` back; returns when it runs.

    `pid`: "keep" gives it its old pids, "new" a pid namespace of its own in which they are free.
    `stdio`: descriptors that stand in for those that led outside. `parent_stays`: the caller will
    wait for it, so its death signal may be armed. `alone`: this process was started for nothing but
    the restore, so a page server may be forked from it instead of being started anew.
    `working_set`: what restores of this image waited for comes first, and what this one waits for
    is noted for the next.
    Raises SnapError; then nothing is left of it.
    """
    job = _Restore(image, hooks, progress, alone=alone, working_set=working_set)
    process = _only_process(image)
    job.hook("before-restore", 0)
    with job.page_server(process, lazy) as server:
        from .rebuild import Context, rebuild  # while the server starts, on another CPU

        context = Context(image.manifest, image, stdio)
        memory = server.memory if server else job.fill
        new = rebuild(process, context, namespace=pid == "new", memory=memory)
        with _sensible(image), new as rebuilt:
            rebuilt.finish(context, parent_stays=parent_stays)
            job.hook("rebuilt", rebuilt.pid)
            rebuilt.run()
    return job.running(rebuilt, context, server)


class _Restore:
    """One `restore`."""

    def __init__(
        self,
        image: Image,
        hooks: Hooks | None,
        progress: ProgressCallback | None,
        *,
        alone: bool,
        working_set: bool,
    ) -> None:
        self._alone = alone
        self._working_set = working_set
        self._image = image
        self._hooks = hooks
        self._progress = progress
        self._clock = Stopwatch()

    def hook(self, stage: str, pid: int) -> None:
        if self._hooks is not None:
            self._hooks.run(stage, pid=pid, image=self._image.name)

    @contextmanager
    def page_server(self, process: Process, lazy: bool) -> Iterator[PageServer | None]:
        """A page server, if wanted and not all in vain; ended when the block fails."""
        if not lazy or not self._image.addresses(process.index):
            yield None
            return
        server = PageServer(
            self._image, process, alone=self._alone, working_set=self._working_set
        )
        try:
            yield server
        except BaseException as error:
            reason = server.abandon()
            if reason is not None and isinstance(error, TargetError):
                # A call made in it met a page that cannot be had, so the server has killed it.
                raise server.failed(reason) from error
            raise

    def fill(self, process: Process, remote: Remote, ctx: Context) -> None:
        """rebuild.Memory for an eager restore, with progress."""
        from . import rebuild

        total = self._image.manifest.stats.saved_bytes

        def filled(done: int) -> None:
            if self._progress is not None:
                self._progress(Progress("filling", done, total, seconds=self._clock.seconds))

        rebuild.fill_all(process, remote, ctx, filled)

    def running(self, rebuilt: Rebuilt, ctx: Context, server: PageServer | None) -> Restored:
        """From here on nothing can be taken back."""
        restored = Restored(
            image=self._image.name,
            pid=rebuilt.pid,
            mode="lazy" if server else "eager",
            ready_us=self._clock.elapsed_us,
            server_pid=server.pid if server else None,
            closed_connections=ctx.closed_connections,
            warnings=ctx.warnings,
            _waited=rebuilt.spawned.waited,
            _server=server,
        )
        if server is not None:
            server.running()
        self.hook("running", restored.pid)
        if server is None:
            self.hook("complete", restored.pid)
        elif self._hooks is not None and self._hooks.wants("complete"):
            # Not a daemon: an interpreter that is about to end waits for it, as the hook expects.
            threading.Thread(target=self._complete, args=(restored,), name="snap-complete").start()
        return restored

    def _complete(self, restored: Restored) -> None:
        failure = restored.complete()
        if failure is None:
            self.hook("complete", restored.pid)
        else:
            log.error("%d: %s", restored.pid, failure)


@contextmanager
def _sensible(image: Image) -> Iterator[None]:
    """What nobody wrote on purpose may be in the records of forty kinds of state: numbers that fit
    nowhere, names with zeros. Nothing is left of the process when one of them is met."""
    try:
        yield
    except (ValueError, OverflowError, LookupError, struct.error, MsgspecError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DamagedError(
            f"image {image.name} says what cannot be rebuilt: {reason}",
            f"snap restore {image.name} -v",
        ) from error


def _only_process(image: Image) -> Process:
    processes = image.manifest.processes
    if len(processes) != 1:
        pids = [
            f"process {process.pid} ({process.comm.decode(errors='replace')})"
            for process in processes
        ]
        raise UnsupportedError("an image of several processes cannot be restored yet", pids)
    return processes[0]
