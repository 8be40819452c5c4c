"""Processes that unpack and verify the chunks which nobody waits for, beside the page server.

The server alone holds userfaultfds and the ledger and puts pages in place; what takes most of the
time, zstd and BLAKE3, is done here, ahead of it, in memory that both share. Processes and not
threads: a fault must not wait for the interpreter lock, and the server must be able to make a
keeper, which a process with threads cannot.

A decoder decides nothing: it may end, or hang, at any time, and the server does its work then.
"""

from __future__ import annotations

import gc
import mmap
import os
import select
import signal
import struct
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from .kernel import urgency
from .kernel.fast_path import OWN, RUN
from .kernel.fdcalls import close_others
from .kernel.stored import Stored
from .units import CHUNK

if TYPE_CHECKING:
    from .image import Image

_REQUEST = struct.Struct("<IIQ")  # slot, how many chunks, the address of the first
_ANSWER = struct.Struct(f"<II{RUN}H")  # slot, chunks that were decoded, the pages present of each
_AHEAD = 4
"""Runs for each decoder to work on."""
_NICE = 5
_MOST = 4
"""Decoders, however many CPUs there are: one server puts their pages in place."""


class Answer(NamedTuple):
    """A run of chunks, or the rest of one."""

    slot: int
    present: tuple[int, ...]  # the pages of each that belong to the image; none: not decoded
    data: memoryview  # of all of them; good until `Decoders.free`


class _Decoder:
    def __init__(self, pid: int, requests: int, answers: int, slots: Iterable[int]) -> None:
        self.pid = pid
        self.requests = requests
        self.answers = answers
        self.free = list(slots)
        self.first_slot = self.free[0]
        self.busy: set[int] = set()

    def end(self) -> None:
        os.close(self.requests)
        os.close(self.answers)
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)  # our child: its pid is nobody else's
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


class Decoders:
    """In the server, which asks for chunks and is answered in any order."""

    def __init__(self, source: Image, space: int, count: int | None = None) -> None:
        """Made while the server has one thread; the store is opened by each at its first chunk."""
        count = min(len(os.sched_getaffinity(0)), _MOST) if count is None else count
        self._count = count
        self.each = _AHEAD
        self._memory = mmap.mmap(-1, max(1, count * _AHEAD) * RUN * CHUNK)
        self._view = memoryview(self._memory)
        self._all: list[_Decoder] = []
        self._of_slot: dict[int, _Decoder] = {}
        for number in range(count):
            slots = range(number * _AHEAD, (number + 1) * _AHEAD)
            with suppress(OSError):  # no process can be made: one less
                decoder = self._start(source, space, slots)
                self._all.append(decoder)
                self._of_slot.update(dict.fromkeys(slots, decoder))

    @property
    def descriptors(self) -> list[int]:
        """Readable when there are answers, or a decoder has ended."""
        return [one.answers for one in self._all]

    @property
    def memory(self) -> mmap.mmap:
        """Where they decode to: `each` slots of each, of RUN chunks."""
        return self._memory

    @property
    def pipes(self) -> list[tuple[int, int]]:
        """Where to ask a decoder and where it answers, in the order of their slots."""
        found = [(-1, -1)] * self._count
        for one in self._all:
            found[one.first_slot // self.each] = one.requests, one.answers
        return found

    def room(self) -> bool:
        return any(one.free for one in self._all)

    def ask(self, address: int, chunks: int) -> int | None:
        """Has a run decoded, of at most RUN chunks. -> its slot; None: no room, or all have
        ended."""
        one = max(self._all, key=lambda one: len(one.free), default=None)
        if one is None or not one.free:
            return None
        slot = one.free.pop()
        try:
            os.write(one.requests, _REQUEST.pack(slot, chunks, address))
        except OSError:  # it has ended, and its answers say so
            one.free.append(slot)
            return None
        one.busy.add(slot)
        return slot

    def answers(self, fd: int) -> list[Answer] | None:
        """What a decoder has done; None when it has ended: `lose` it."""
        one = next(one for one in self._all if one.answers == fd)
        try:
            data = os.read(fd, _ANSWER.size * _AHEAD)
        except BlockingIOError:
            return []
        if not data:
            return None
        found = []
        for slot, good, *present in _ANSWER.iter_unpack(data):
            if slot in one.busy:
                one.busy.discard(slot)
                view = self._view[slot * RUN * CHUNK : (slot + 1) * RUN * CHUNK]
                found.append(Answer(slot, tuple(present[:good]), view))
        return found

    def free(self, slot: int) -> None:
        one = self._of_slot.get(slot)
        if one is not None:
            one.free.append(slot)

    def lose(self, fd: int) -> set[int]:
        """A decoder has ended: -> the slots that it will not answer for."""
        one = next(one for one in self._all if one.answers == fd)
        self._all.remove(one)
        self._of_slot = {slot: each for slot, each in self._of_slot.items() if each is not one}
        one.end()
        return one.busy

    def insist(self) -> None:
        """They run where nobody else wants to, and that seems to be nowhere: now they get a share.
        """
        for one in self._all:
            urgency.ordinary(one.pid)

    def close(self) -> None:
        """Ends them: none has the image in use when this returns."""
        while self._all:
            self._all.pop().end()

    def _start(self, source: Image, space: int, slots: range) -> _Decoder:
        theirs, requests = os.pipe()
        answers, ours = os.pipe()
        os.set_blocking(answers, False)
        os.set_blocking(requests, False)
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                # Others that share the server's table would keep a pipe open: its end is watched.
                ended = os.pidfd_open(server)
                if os.getppid() != server:
                    os._exit(0)
                keep = {2, theirs, ours, ended, *source.descriptors}
                _decode_all(source, space, self._view, theirs, ours, ended, keep)
            finally:
                os._exit(1)
        os.close(theirs)
        os.close(ours)
        return _Decoder(pid, requests, answers, slots)


def _decode_all(
    source: Image,
    space: int,
    memory: memoryview,
    requests: int,
    answers: int,
    server: int,
    keep: set[int],
) -> NoReturn:
    """A decoder, until the server ends or closes its pipe."""
    with suppress(OSError), open("/proc/self/comm", "wb") as file:
        file.write(b"snap-decoder")
    gc.freeze()  # nothing of the server's is to be closed here by its own
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    close_others(keep)
    os.nice(_NICE)
    urgency.last()
    opened: Image | None = None
    stored: Stored | None = None
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    poll.register(server, select.POLLIN)
    while True:
        if any(fd == server for fd, _ in poll.poll()):
            os._exit(0)
        request = os.read(requests, _REQUEST.size)
        if not request:
            os._exit(0)
        slot, count, address = _REQUEST.unpack(request)
        place = (slot & ~OWN) * RUN * CHUNK
        present = [0] * RUN
        good = 0
        with suppress(Exception):  # the server meets it itself, and says so
            if opened is None:
                opened = source.again()
                stored = Stored.new(opened.places(space))
            found = stored.run(address, count, memory, place) if stored else []
            present[: len(found)] = found
            for at in range(len(found), count):
                chunk = opened.chunk(space, address + at * CHUNK)
                if chunk is not None:
                    present[at] = chunk.present
                    memory[place + at * CHUNK : place + (at + 1) * CHUNK] = chunk.data
            good = count
        os.write(answers, _ANSWER.pack(slot, good, *present))
