"""What must outlive a page server: its plan and every event that it has read, in shared memory.

Reading an event lets the process that caused it go on, so an event that only a dead server knew
would be lost: a page given up would come back from the image, a child would run on zeros. The
kernel therefore writes the messages straight into this memory, which the guardian shares; a server
that takes over replays them. Faults need no record: they are woken, and fault again.

Layout, in slots of 32 bytes (the size of a message) after a header page and the plan: batches of
one head (MARK, client, count) and `count` messages as the kernel wrote them. `count` is set after
the read: a batch at the tail with count 0 may hold messages that were read by a server that died.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from . import events
from .events import Event, Fault, Fork
from .kernel import uffd
from .kernel._native import ffi, lib
from .units import MIB, PAGE

SLOT = uffd.MESSAGE_BYTES
PLAN_OFFSET = PAGE
PLAN_BYTES = 64 * MIB
START = PLAN_OFFSET + PLAN_BYTES
SIZE = START + 1024 * MIB
"""Sparse: memory is used for what is written. Room for 32 million events."""
BATCH = 64
"""Most messages of one read."""
MARK, GONE = 0xB0, 0xB1
"""First bytes of the head of a batch, and of a slot that says that a client is done with."""

STARTING, RUNNING, DONE, FAILED = range(4)
"""`Journal.state`: before the plan is known; pages are missing; all are in; given up."""

_HEAD = struct.Struct("<B3xIQQQ")  # MARK or GONE, client, count, 0, 0
_STATE, _TAIL, _FILLED, _STARTS, _PLAN = range(0, 40, 8)
_SERVER, _KEEPER, _LEAD, _BEFORE, _GENERATION, _GENERATIONS, _NEWEST = range(40, 96, 8)
_U64 = struct.Struct("<Q")


class JournalFull(Exception):
    """The process caused more events than there is room for."""


class Messages(Protocol):
    """A userfaultfd, or what reads one."""

    def read_into(self, memory: mmap.mmap, offset: int, most: int, /) -> int:
        """As uffd.Uffd.read_into."""


class Entry(NamedTuple):
    """`event` is None when the client is done with (ended, exec'ed or complete)."""

    client: int
    event: Event | None


class _Word:
    """A number of the journal, there for all processes at once. `none`: what stands for a zero."""

    def __init__(self, offset: int, none: int = 0) -> None:
        self._offset = offset
        self._none = none

    def __get__(self, journal: Journal, _: type[Journal]) -> int:
        return journal._get(self._offset) + self._none

    def __set__(self, journal: Journal, value: int) -> None:
        journal._set(self._offset, value - self._none)


class Journal:
    """A memfd, mapped by the guardian and the server; `fd` is theirs in common."""

    state = _Word(_STATE)
    filled = _Word(_FILLED)
    """Pages put in place so far, by all servers."""
    server = _Word(_SERVER, -1)
    """A pidfd of the server, in the shared table; -1 while none has begun."""
    keeper = _Word(_KEEPER, -1)
    """A pidfd of the newest keeper, in the shared table; -1 without one."""
    newest = _Word(_NEWEST)
    """The pid of the newest keeper."""
    lead = _Word(_LEAD)
    """The pid of the guardian (keeper.py)."""
    generation = _Word(_GENERATION)
    """Of descriptor tables: keepers of an older one must not act."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, SIZE)

    @classmethod
    def create(cls) -> Journal:
        fd = os.memfd_create("snap-journal", os.MFD_CLOEXEC)
        os.ftruncate(fd, SIZE)
        journal = cls(fd)
        journal._set(_TAIL, START)
        return journal

    @property
    def futile(self) -> int:
        """Servers in a row that ended and had put no page in place."""
        return 0 if self.filled > self._get(_BEFORE) else self._get(_STARTS)

    def note_start(self) -> None:
        """A server goes on where another one ended."""
        self._set(_STARTS, self.futile + 1)
        self._set(_BEFORE, self.filled)

    def claim(self, before: int, pid: int) -> bool:
        """Gives the lead to `pid` if `before` has it: one atomic step."""
        word = ffi.from_buffer("uint64_t[]", self._memory, require_writable=True)
        return bool(lib.snap_claim(word + _LEAD // 8, before, pid))

    def new_generation(self) -> int:
        """A number that no table had. Only for who has the lead."""
        self._set(_GENERATIONS, self._get(_GENERATIONS) + 1)
        return self._get(_GENERATIONS)

    @property
    def plan(self) -> Any:
        """What `set_plan` was given; None before."""
        length = self._get(_PLAN)
        if not length:
            return None
        return json.loads(self._memory[PLAN_OFFSET : PLAN_OFFSET + length])

    def set_plan(self, plan: Any) -> None:
        data = json.dumps(plan).encode()
        if len(data) > PLAN_BYTES:
            raise JournalFull(f"a plan of {len(data)} bytes")
        self._memory[PLAN_OFFSET : PLAN_OFFSET + len(data)] = data
        self._set(_PLAN, len(data))

    def read(self, source: Messages, client: int) -> list[Event]:
        """Reads what the userfaultfd of `client` has, at most BATCH messages; events are on
        record when this returns, and also when it does not."""
        tail = self._get(_TAIL)
        if tail + (BATCH + 1) * SLOT > SIZE:
            raise JournalFull(f"{(tail - START) // SLOT} events")
        _HEAD.pack_into(self._memory, tail, MARK, client, 0, 0, 0)
        first = tail + SLOT
        count = source.read_into(self._memory, first, BATCH)
        messages = list(events.parse(self._memory[first : first + count * SLOT]))
        if not all(isinstance(message, Fault) for message in messages):
            self._commit(tail, client, count)
        return messages

    def gone(self, client: int) -> None:
        """Notes that `client` is done with, before its userfaultfd is closed: the number of the
        descriptor may then be used again."""
        tail = self._get(_TAIL)
        if tail + SLOT > SIZE:
            raise JournalFull(f"{(tail - START) // SLOT} events")
        _HEAD.pack_into(self._memory, tail, GONE, client, 0, 0, 0)
        self._set(_TAIL, tail + SLOT)

    def replay(self) -> Iterator[Entry]:
        """All events so far in order. Only while nobody reads, with no server left alive."""
        position, tail = START, self._get(_TAIL)
        while position < tail:
            mark, client, count, _, _ = _HEAD.unpack_from(self._memory, position)
            position += SLOT
            if mark == GONE:
                yield Entry(client, None)
                continue
            yield from self._events(client, position, count)
            position += count * SLOT
        mark, client, _, _, _ = _HEAD.unpack_from(self._memory, tail)
        if mark == MARK:  # a read that its server may not have lived to account for
            count = 0
            while count < BATCH and self._memory[tail + (count + 1) * SLOT]:
                count += 1
            yield from self._events(client, tail + SLOT, count)
            self._commit(tail, client, count)

    def forked(self) -> list[int]:
        """Descriptors of the children that may still miss pages; clients are numbered in the order
        of the forks, the restored process is 0."""
        found: dict[int, int] = {}
        made = 1
        for client, event in self.replay():
            if event is None:
                found.pop(client, None)
            elif isinstance(event, Fork):
                found[made] = event.fd
                made += 1
        return list(found.values())

    def _events(self, client: int, start: int, count: int) -> Iterator[Entry]:
        for event in events.parse(self._memory[start : start + count * SLOT]):
            if not isinstance(event, Fault):
                yield Entry(client, event)

    def _commit(self, tail: int, client: int, count: int) -> None:
        _HEAD.pack_into(self._memory, tail, MARK, client, count, 0, 0)
        self._set(_TAIL, tail + (count + 1) * SLOT)

    def _get(self, offset: int) -> int:
        return int(_U64.unpack_from(self._memory, offset)[0])

    def _set(self, offset: int, value: int) -> None:
        _U64.pack_into(self._memory, offset, value)
