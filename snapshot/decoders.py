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

from .kernel.fdcalls import close_others
from .units import CHUNK

if TYPE_CHECKING:
    from .image import Image

_REQUEST = struct.Struct("<IQ")  # slot, chunk address
_ANSWER = struct.Struct("<IIHH")  # slot, 1 when it was decoded, present, nonzero
_AHEAD = 8
"""Chunks for each decoder to work on."""
_NICE = 5
_MOST = 4
"""Decoders, however many CPUs there are: one server puts their pages in place."""


class Decoded(NamedTuple):
    """lazy.Content; `data` is good until `Decoders.free`."""

    present: int
    nonzero: int
    data: memoryview


class Answer(NamedTuple):
    slot: int
    content: Decoded | None  # None: it could not be decoded


class _Decoder:
    def __init__(self, pid: int, requests: int, answers: int, slots: Iterable[int]) -> None:
        self.pid = pid
        self.requests = requests
        self.answers = answers
        self.free = list(slots)
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
        self._memory = mmap.mmap(-1, max(1, count * _AHEAD) * CHUNK)
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

    def room(self) -> bool:
        return any(one.free for one in self._all)

    def ask(self, address: int) -> int | None:
        """Has a chunk decoded. -> its slot; None: no room, or all have ended."""
        for one in sorted(self._all, key=lambda one: -len(one.free)):
            if one.free:
                slot = one.free.pop()
                with suppress(OSError):
                    os.write(one.requests, _REQUEST.pack(slot, address))
                    one.busy.add(slot)
                    return slot
                one.free.append(slot)
        return None

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
        for slot, good, present, nonzero in _ANSWER.iter_unpack(data):
            if slot not in one.busy:
                continue
            one.busy.discard(slot)
            view = self._view[slot * CHUNK : (slot + 1) * CHUNK]
            found.append(Answer(slot, Decoded(present, nonzero, view) if good else None))
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
    gc.freeze()  # nothing of the server's is to be closed here by its own
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    close_others(keep)
    with suppress(OSError), open("/proc/self/comm", "wb") as file:
        file.write(b"snap-decoder")
    os.nice(_NICE)
    opened: Image | None = None
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    poll.register(server, select.POLLIN)
    while True:
        if any(fd == server for fd, _ in poll.poll()):
            os._exit(0)
        request = os.read(requests, _REQUEST.size)
        if not request:
            os._exit(0)
        slot, address = _REQUEST.unpack(request)
        chunk = None
        with suppress(Exception):  # the server meets it itself, and says so
            opened = opened or source.again()
            chunk = opened.chunk(space, address)
        if chunk is not None:
            memory[slot * CHUNK : (slot + 1) * CHUNK] = chunk.data
            os.write(answers, _ANSWER.pack(slot, 1, chunk.present, chunk.nonzero))
        else:
            os.write(answers, _ANSWER.pack(slot, 0, 0, 0))

