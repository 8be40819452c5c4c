"""epoll(7) and its registrations.

A registration belongs to (struct file, number), so it is made by epoll_ctl inside the new
process, when every descriptor stands at its number. A number may have been closed or given to
another file since it was registered, while a duplicate keeps the file open: kcmp tells which file
is really watched, and at restore that file is put at the number for the moment of epoll_ctl.
"""

from __future__ import annotations

import errno
import os
import select
import struct

from ..kernel import kcmp
from ..kernel.arch_x86_64 import NR
from ..manifest import OpenFile, Record
from .openfile import Captured, Opening, Placing, Seen, Table, state_of

NAME = "epoll"

EPOLL_CTL_ADD = 1
_EVENT = struct.Struct("=IQ")  # struct epoll_event, packed on x86-64
_BATCH = 1024
"""Registrations in one round trip: 12 KiB of the data area."""


class Watch(Record, frozen=True):
    number: int  # the descriptor number of the registration
    events: int
    data: int
    file: int | None = None  # OpenFile.id of what is watched, when it is not what stands there


class State(Record, frozen=True):
    watches: tuple[Watch, ...] = ()
    lost: tuple[int, ...] = ()  # numbers of registrations whose file only other processes have


def recognise(seen: Seen, table: Table) -> bool:
    return seen.link == b"anon_inode:[eventpoll]"


def capture(seen: Seen, table: Table) -> Captured:
    watches: list[Watch] = []
    lost: list[int] = []
    count: dict[int, int] = {}
    for line in seen.lines(b"tfd:"):
        # "5 events: 19 data: 500000005 pos:0 ino:3f sdev:8": ep_show_fdinfo, fs/eventpoll.c
        words = line.replace(b":", b" ").split()
        number = int(words[0])
        fields = dict(zip(words[1::2], words[2::2], strict=False))
        inode = int(fields[b"ino"], 16)
        nth = count.get(number, 0)
        count[number] = nth + 1
        watched = _watched(seen, table, number, nth, inode)
        if watched is None:
            lost.append(number)
            continue
        events, data = int(fields[b"events"], 16), int(fields[b"data"], 16)
        elsewhere = None if number in watched.fds else watched.id
        watches.append(Watch(number=number, events=events, data=data, file=elsewhere))
    state = State(watches=tuple(watches), lost=tuple(lost))
    return Captured(f"epoll of {len(watches)} descriptors", state)


def _watched(seen: Seen, table: Table, number: int, nth: int, inode: int) -> Seen | None:
    """Which of the open files the registration watches; mostly what stands at its number."""
    present = table.by_fd.get(number)
    if present is not None and kcmp.watches(table.pid, number, seen.fd, number, nth):
        return present
    for other in table.files:
        if (
            other is not present
            and int(other.value(b"ino:")) == inode
            and kcmp.watches(table.pid, other.fd, seen.fd, number, nth)
        ):
            return other
    return None


def open(file: OpenFile, opening: Opening) -> int:
    fd = select.epoll(flags=select.EPOLL_CLOEXEC)
    copy = os.dup(fd.fileno())
    fd.close()
    return copy


def finish(file: OpenFile, placing: Placing) -> None:
    state = state_of(file, State)
    if state.lost:
        numbers = ", ".join(map(str, state.lost))
        placing.warn(file, f"what it watched as {numbers} is only open elsewhere")
    plain = [watch for watch in state.watches if watch.file is None]
    epoll = placing.fds[file.id][0]
    size = _EVENT.size
    for start in range(0, len(plain), _BATCH):
        some = plain[start : start + _BATCH]
        events = b"".join(_EVENT.pack(w.events & 0xFFFFFFFF, w.data) for w in some)
        address = placing.remote.put(events)
        results = placing.calls(
            (NR.epoll_ctl, epoll, EPOLL_CTL_ADD, w.number, address + i * size)
            for i, w in enumerate(some)
        )
        for watch, result in zip(some, results, strict=True):
            _check(file, watch, result, placing)
    for watch in state.watches:
        if watch.file is not None:
            _add_elsewhere(file, epoll, watch, placing.fds[watch.file][0], placing)


def _add_elsewhere(file: OpenFile, epoll: int, watch: Watch, source: int, placing: Placing) -> None:
    """A file, now at `source`, that no longer stands at the number it was registered with."""
    address = placing.remote.put(_EVENT.pack(watch.events & 0xFFFFFFFF, watch.data))
    with placing.standing_at(source, watch.number):
        result = placing.call(NR.epoll_ctl, epoll, EPOLL_CTL_ADD, watch.number, address)
    _check(file, watch, result, placing)


def _check(file: OpenFile, watch: Watch, result: int, placing: Placing) -> None:
    if result >= 0:
        return
    if result == -errno.EPERM:
        why = "it cannot be watched any more (its file is of another kind now)"
    else:
        why = os.strerror(-result)
    placing.warn(file, f"descriptor {watch.number} is not watched: {why}")
