"""What a page server process does: an image on one side, the userfaultfd of a process on the other.

`lazy.Server` is the loop; here are its surroundings: the image, the message of `snap restore` with
the descriptors, the guardian to keep alive, and leaving no trace when all pages are in.
"""

from __future__ import annotations

import array
import gc
import json
import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import keeper, pageserver, workingset
from .decoders import Decoders
from .errors import KernelError, SnapError
from .image import Image
from .journal import RUNNING, Journal
from .kernel import fdcalls, procfs, urgency
from .kernel.stored import Stored
from .kernel.uffd import Uffd, UffdError
from .lazy import Client, Server
from .maps import parse_smaps
from .missing import Missing
from .pageserver import Plan
from .store import Store

PATIENCE = 30.0
"""Seconds in which a process that somebody else traces is tried again."""
NOTE_SECONDS = 5
"""For the one write to the store, when all pages are in."""
PAUSE = "SNAP_TEST_STREAM_PAUSE_MS"
"""For tests: pages keep missing for longer."""


class Service:
    def __init__(self, journal: Journal, plan: Plan, inherited: Image | None = None) -> None:
        """Opens the image, or the one that the parent had open: StoreError, DamagedError."""
        self.journal = journal
        self.plan = plan
        if inherited is not None:
            self.image = inherited.again()
        else:
            self.image = Store.open(Path(plan.store)).image(plan.image)
        before, plan.lease = plan.lease, self.image.lease_descriptor
        journal.set_plan(plan.fields())
        if before >= 0:
            os.close(before)
        self.image.addresses(plan.space)  # reads and verifies the index now, not at the first fault
        self._patience = time.monotonic() + PATIENCE
        self._server = Server(self.image, plan.space, journal, self._finish)
        self._server.pause_ms = int(os.environ.get(PAUSE, "0"))
        self._successor = -1
        self._watch_successor()
        self._decoders = Decoders(self.image, plan.space)
        self._server.use(self._decoders)
        self._stored: Stored | None = None

    def locate(self) -> None:
        """Where the chunks lie in the store: nobody need wait for this. What there is by now stays,
        and is not looked at again and again by Python's collector, while threads wait."""
        self._stored = Stored.new(self.image.places(self.plan.space))
        gc.freeze()

    @property
    def faults(self) -> int:
        return self._server.faults

    def receive(self) -> bool:
        """Waits for the userfaultfd and the ranges; False when `snap restore` has ended first."""
        with socket.socket(fileno=os.dup(self.plan.control)) as control:
            data, ancillary, _, _ = control.recvmsg(64, socket.CMSG_SPACE(3 * 4))
        if not data:
            return False
        numbers = array.array("i")
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers.frombytes(content)
        uffd, pidfd, sent = numbers
        with os.fdopen(sent, "rb") as file:
            file.seek(0)
            fields: dict[str, Any] = {**self.plan.fields(), **json.load(file)}
        plan = Plan({**fields, "uffd": uffd, "pidfd": pidfd})
        self.plan.__dict__.update(plan.__dict__)
        self.journal.set_plan(self.plan.fields())
        self.journal.state = RUNNING
        self._add()
        return True

    def take_over(self) -> None:
        """Goes on where another server ended."""
        self._add()
        self._server.take_over()

    def _add(self) -> None:
        # The plan's own stays open: by it a child is known that has outlived the process.
        uffd, missing = Uffd(os.dup(self.plan.uffd)), Missing.of(self.plan.ranges)
        self._server.add(uffd, missing, self._stored)
        if self.plan.working_set:
            with suppress(SnapError):
                self._server.stream_first(self.image.touched(self.plan.space))
        if not self.plan.running:
            self._server.hold = True
            self._server.watch(self.plan.control, self._let_go)

    def _let_go(self) -> None:
        """`snap restore` says that the process runs, or has ended (and the process with it, if it
        did not run): until then it is traced."""
        self._server.unwatch(self.plan.control)
        with suppress(OSError):
            os.read(self.plan.control, 64)  # unread bytes would make our end a connection reset
        self._server.hold = False
        self._patience = time.monotonic() + PATIENCE
        self.plan.running = True
        self.journal.set_plan(self.plan.fields())

    def run(self) -> None:
        self._server.run()
        urgency.calm_down()
        self._decoders.close()
        os.close(self._successor)

    def close(self) -> None:
        """Nothing is missing any more: what is left is to note for the next restore what this one
        waited for. A store that cannot be written to is no matter, and one whose writer stands
        still must not keep this process."""
        if self.plan.working_set:
            signal.alarm(NOTE_SECONDS)
            with suppress(SnapError, OSError):
                before = dict.fromkeys(self.image.touched(self.plan.space))
                touched = [*(before | self._server.touched)][: workingset.MOST]
                if len(touched) > len(before):
                    self.image.note_touched(self.plan.space, touched)
        self.image.close()

    def _finish(self, client: Client) -> bool:
        """Lets go of a process that has all its pages. The userfaultfd of a forked child is ours
        alone; that of the restored process is also held by itself, and by what it has forked."""
        if client.number != 0 or not pageserver.alive(self.plan.pidfd):
            return True
        urgency.calm_down()
        with suppress(UffdError, SnapError, OSError):
            self._unregister(client)
        self._server.drain(client)
        for pid in self._holders(client):
            try:
                _close_in(pid, self.plan.duplicate, client.uffd)
            except (SnapError, OSError) as error:
                if time.monotonic() < self._patience:
                    return False  # somebody traces it just now
                pageserver.say(self.plan, f"descriptor {self.plan.duplicate} stays open: {error}")
        return True

    def _unregister(self, client: Client) -> None:
        """Pages that were missing are zeros of the process's own from here on; all who wait go on.
        Nothing is write-protected, so this takes the mmap lock for microseconds at any size."""
        for line in parse_smaps(procfs.read(self.plan.pid, "smaps")):
            if "um" in line.vm_flags:
                with suppress(UffdError):
                    client.uffd.unregister(line.start, line.size)

    def _holders(self, client: Client) -> list[int]:
        """Processes that have the duplicate: the restored one and those it has forked."""
        found = []
        name = f"fd/{self.plan.duplicate}"
        for entry in os.listdir("/proc"):
            if not entry.isdigit() or int(entry) == os.getpid():
                continue
            with suppress(OSError, SnapError):
                pid = int(entry)
                if b"userfaultfd" in procfs.link(pid, name) and client.uffd.held_by(
                    pid, self.plan.duplicate
                ):
                    found.append(pid)
        return found

    def _watch_successor(self) -> None:
        """Somebody must be there to go on when we are killed. When no process can be made just now,
        pages are served all the same, and it is tried again."""
        try:
            self._successor = keeper.successor(self.journal, self.journal.generation)
        except KernelError as error:
            pageserver.say(self.plan, f"no keeper yet: {error.message}")
            self._successor = fdcalls.timerfd_create(time.CLOCK_MONOTONIC)
            fdcalls.timerfd_settime(self._successor, 0, int(pageserver.AGAIN * 1e9), 0)
        self._server.watch(self._successor, self._successor_ended)

    def _successor_ended(self) -> None:
        self._server.unwatch(self._successor)
        os.close(self._successor)
        pageserver.reap()
        self._watch_successor()


def _close_in(pid: int, fd: int, uffd: Uffd) -> None:
    """Closes the duplicate in a process, which stops for that."""
    from .freeze import freeze  # not needed to start
    from .kernel.arch_x86_64 import NR

    with freeze(pid) as frozen:
        if uffd.held_by(pid, fd):
            frozen.remote.call(NR.close, fd)
