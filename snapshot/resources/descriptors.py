"""The descriptor table: which kinds of open file there are, and how a table is taken and rebuilt.

`Capture` looks at a stopped process from outside. `open_all` opens its files in `snap`, `place`
brings them to their numbers in the new process, which has inherited them.
"""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable, Sequence
from itertools import pairwise

from msgspec.structs import replace

from ..errors import KernelError, RestoreError
from ..kernel import fdtable
from ..kernel.arch_x86_64 import NR
from ..kernel.fdtable import Entry, Socket
from ..kernel.reading import Reading
from ..kernel.remote import Remote
from ..manifest import Descriptor, OpenFile, Process, pack
from . import (
    devices,
    directories,
    epoll,
    eventfd,
    files,
    inotify,
    memfd,
    ownership,
    pipes,
    signalfd,
    sockets,
    stdio,
    terminals,
    timerfd,
    unixsockets,
)
from .memfd import SharedMemory, needed
from .openfile import (
    FASYNC,
    O_CLOEXEC,
    STANDARD,
    Cannot,
    Captured,
    Context,
    Kind,
    Opening,
    Placing,
    Problem,
    Seen,
    Table,
)

KINDS: tuple[Kind, ...] = (
    sockets,
    unixsockets,
    pipes,
    eventfd,
    epoll,
    timerfd,
    signalfd,
    inotify,
    memfd,
    directories,
    files,
    terminals,
    devices,
    stdio,
)
"""The first that recognises an open file has it."""
BY_NAME = {kind.NAME: kind for kind in KINDS}

_WHAT = {
    b"anon_inode:[io_uring]": "io_uring",
    b"anon_inode:[perf_event]": "performance counters (perf_event_open)",
    b"anon_inode:[userfaultfd]": "a userfaultfd",
    b"anon_inode:[fanotify]": "fanotify",
    b"anon_inode:[pidfd]": "a pidfd",
}
_FAMILIES = {
    socket.AF_NETLINK: "netlink",
    socket.AF_PACKET: "packet",
    socket.AF_VSOCK: "vsock",
    socket.AF_ALG: "alg",
    socket.AF_CAN: "can",
    44: "xdp",
}
_CLOSE_TO = 0xFFFFFFFF

__all__ = [
    "Capture",
    "SharedMemory",
    "capture",
    "direct_io",
    "examine",
    "needed",
    "open_all",
    "place",
]


# --- capture -------------------------------------------------------------------------------------


class Capture:
    """The open files of a stopped process: listed when this is made, with the memory that they
    lead to, asked by `ask`, put into words by `complete`, which may come when the process runs on.

    Nothing of it is consumed or changed. Of files with a name, and of some others, fdinfo and stat
    tell all; they cost the pause about 20 µs each, sockets as much again, others that have to be
    asked some 60 more.
    """

    def __init__(self, pid: int, pidfd: int, reading: Reading | None = None) -> None:
        """`reading`: with its descriptors since it stands, perhaps. If nothing has to be asked of
        any of them, they are not even listed before `complete`."""
        self._of = pid, pidfd
        self._seen: list[Seen] = []
        self._found: dict[int, tuple[Kind, Captured]] = {}  # by Seen.id
        self._owners: dict[int, tuple[int, int, int] | None] = {}
        self._failed: dict[int, str] = {}
        self._reading = reading if reading is not None and reading.listed else None
        self._listed = False
        if self._reading is None or not self._reading.told:
            self._list()

    def _list(self) -> None:
        pid, pidfd = self._of
        reading = self._reading
        entries = fdtable.entries(pid, grouped=True) if reading is None else reading.entries
        self._listed = True
        self._seen = _by_struct_file(entries)
        self._table = Table(pid, pidfd, self._seen)
        for seen in self._seen:
            if memfd.recognise(seen, self._table):
                self._look(seen)

    def ask(self) -> None:
        """All that `_only_now` can be had."""
        if not self._listed:
            return
        with self._table as table:
            table.ask()
            for seen in self._seen:
                if isinstance(seen.socket, Socket) and not seen.flags & FASYNC:
                    self._ask_queue(seen)
                elif _only_now(seen) and seen.id not in self._found:
                    self._look(seen)

    def _ask_queue(self, seen: Seen) -> None:
        """All that is left to be asked of a socket."""
        try:
            if unixsockets.recognise(seen, self._table):
                unixsockets.queue(seen, self._table)
        except Cannot as reason:
            self._failed[seen.id] = seen.numbered(reason)

    def _look(self, seen: Seen) -> None:
        try:
            self._found[seen.id] = _look(seen, self._table)
            self._owners[seen.id] = ownership.of(seen, self._table)
        except Cannot as reason:
            self._failed[seen.id] = seen.numbered(reason)

    @property
    def problems(self) -> list[str]:
        """All that cannot be handled, as far as it has been looked at."""
        return self.refused + self.lost

    @property
    def refused(self) -> list[str]:
        """Those of what there is only while the process stands still."""
        return self._why_not(_only_now)

    @property
    def lost(self) -> list[str]:
        """Files whose names led elsewhere when `complete` looked at them."""
        return self._why_not(lambda seen: not _only_now(seen))

    def _why_not(self, of: Callable[[Seen], bool]) -> list[str]:
        failed = self._failed
        return [failed[seen.id] for seen in self._seen if seen.id in failed and of(seen)]

    @property
    def direct_io(self) -> bool:
        """Whether a device may write past the page tables to the memory of the process."""
        return any(seen.flags & os.O_DIRECT for seen in self._seen)

    @property
    def needed(self) -> dict[tuple[int, int], SharedMemory]:
        """See memfd.needed."""
        seen = [one for one in self._seen if self._found.get(one.id, (None,))[0] is memfd]
        files = (_open_file(one.id, memfd, one, self._found[one.id][1]) for one in seen)
        return needed(files, (Descriptor(fd=one.fd, file=one.id, cloexec=False) for one in seen))

    def complete(self) -> tuple[tuple[OpenFile, ...], tuple[Descriptor, ...]]:
        """The open files and the descriptors; what became of the others `problems` tells then."""
        opened: list[OpenFile] = []
        numbers: dict[int, int] = {}  # fd -> OpenFile.id
        if not self._listed:
            self._list()
        cloexec = {fd for seen in self._seen for fd in seen.cloexec}
        for seen in self._seen:
            if seen.id not in self._found and seen.id not in self._failed:
                self._look(seen)
            if seen.id not in self._failed:
                found, owner = self._found[seen.id], self._owners[seen.id]
                opened += _open_files(seen, *found, owner, numbers, len(self._seen))
        descriptors = tuple(
            Descriptor(fd=fd, file=numbers[fd], cloexec=fd in cloexec) for fd in sorted(numbers)
        )
        return tuple(opened), descriptors


def capture(pid: int, pidfd: int) -> tuple[tuple[OpenFile, ...], tuple[Descriptor, ...], list[str]]:
    """The open files of a stopped process, its descriptors, and all that cannot be handled."""
    found = Capture(pid, pidfd)
    found.ask()
    return *found.complete(), found.problems


def _only_now(seen: Seen) -> bool:
    """Whether there is more to be asked, while the process stands still, than was read of it."""
    return bool(seen.entry.asks)


def examine(pid: int, pidfd: int) -> list[str]:
    """What of a running process cannot be handled, as `capture` would find it.

    Looks at nothing that a look could disturb (what waits in sockets and pipes), and passes over
    what the process closes meanwhile.
    """
    cannot: list[str] = []
    every = [_seen(entry) for entry in fdtable.entries(pid)]
    with Table(pid, pidfd, every, stopped=False) as table:
        for one in table.files:
            try:
                _look(one, table)
                ownership.of(one, table)
            except Cannot as reason:
                cannot.append(one.numbered(reason))
            except (OSError, KernelError):
                continue  # closed, or another file by now
    return cannot


def direct_io(pid: int) -> bool:
    """Whether the process, which runs, has files open with O_DIRECT: what it reads from them a
    device writes to its memory, past the page tables."""
    entries = fdtable.entries(pid, only_files=True)
    return any(entry.flags & os.O_DIRECT for entry in entries)


def _look(seen: Seen, table: Table) -> tuple[Kind, Captured]:
    kind = next((kind for kind in KINDS if kind.recognise(seen, table)), None)
    if kind is None:
        raise Cannot(_what(seen, table))
    return kind, kind.capture(seen, table)


def _open_files(
    seen: Seen,
    kind: Kind,
    found: Captured,
    owner: tuple[int, int, int] | None,
    numbers: dict[int, int],
    next_id: int,
) -> list[OpenFile]:
    """The OpenFile of a struct file; several when it is a terminal that stdin, stdout and stderr
    share, for each becomes that of `snap restore`."""
    standard = [fd for fd in seen.fds if fd in STANDARD]
    if not (found.outside and standard):
        for fd in seen.fds:
            numbers[fd] = seen.id
        return [replace(_open_file(seen.id, kind, seen, found), owner=owner)]
    streams = {}
    for fd in standard:
        file_id = seen.id if fd == standard[0] else next_id + fd
        streams[fd] = _open_file(
            file_id, stdio, seen, Captured(found.label, stdio.State(stream=fd))
        )
        numbers[fd] = file_id
    for fd in seen.fds:
        numbers.setdefault(fd, streams[stdio.stream_for_others(seen)].id)
    return list(streams.values())


def _what(seen: Seen, table: Table) -> str:
    """An open file of no known kind, in words."""
    if seen.is_socket:
        family = table.look(seen).domain
        return f"a socket of family {_FAMILIES.get(family, family)}"
    return _WHAT.get(seen.link, os.fsdecode(seen.link))


def _open_file(file_id: int, kind: Kind, seen: Seen, found: Captured) -> OpenFile:
    return OpenFile(
        id=file_id,
        kind=kind.NAME,
        label=found.label,
        flags=seen.flags,
        offset=seen.offset,
        closed=found.closed,
        state=pack(found.state),
    )


def _seen(entry: Entry) -> Seen:
    position, _ = entry.info.split(b"\n", 1)  # "pos:\t0\n…": seq_show, fs/proc/fd.c
    return Seen(
        id=entry.fd,
        fds=[entry.fd],
        entry=entry,
        flags=entry.flags & ~O_CLOEXEC,
        offset=int(position[4:]),
        cloexec={entry.fd} if entry.flags & O_CLOEXEC else set(),
    )


def _by_struct_file(entries: Sequence[Entry]) -> list[Seen]:
    """One Seen for each struct file, in the order of their lowest descriptors; its id is its place
    there."""
    files: dict[int, Seen] = {}
    for entry in entries:
        one = _seen(entry)
        seen = files.setdefault(entry.file, one)
        if seen is one:
            seen.id = len(files) - 1
        else:
            seen.fds.append(entry.fd)
            seen.cloexec |= one.cloexec
    return list(files.values())


# --- restore -------------------------------------------------------------------------------------


def open_all(process: Process, ctx: Context) -> dict[int, int]:
    """Open every file of the image: OpenFile.id → descriptor of ours.

    They are inheritable and above all numbers of the image; the caller closes them once the new
    process has them. RestoreError lists everything that could not be opened; then none is left
    open.
    """
    opening = Opening(process, ctx)
    _room_for(opening.floor + 2 * len(process.files) + 64)
    problems: list[str] = []
    try:
        for file in process.files:
            kind = BY_NAME.get(file.kind)
            try:
                if kind is None:
                    raise Problem(f"unknown kind {file.kind!r}")
                opening.keep(file, kind.open(file, opening))
            except Problem as problem:
                problems.append(f"descriptor {_numbers(opening, file)}: {problem}")
            except OSError as error:
                reason = f"{file.label}: {error.strerror}"
                problems.append(f"descriptor {_numbers(opening, file)}: {reason}")
            if file.closed:
                ctx.closed_connections.append(file.label)
    except BaseException:
        _close(opening)
        raise
    finally:
        opening.until_done.close()
    if problems:
        _close(opening)
        raise RestoreError(
            "\n  - ".join(["open files of the image cannot be opened again:", *problems]),
            "snap show IMAGE",
        )
    return opening.opened


def _numbers(opening: Opening, file: OpenFile) -> str:
    return ", ".join(map(str, opening.fds.get(file.id, [])))


def _close(opening: Opening) -> None:
    for fd in opening.opened.values():
        os.close(fd)
    opening.opened.clear()


def _room_for(count: int) -> None:
    """Let this process have descriptors up to `count`; the new process inherits the limit until
    its own is put back."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= count:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, max(hard, count)))
    except (ValueError, OSError):
        raise RestoreError(
            f"the image needs {count} descriptors, the limit is {hard}", f"ulimit -Hn {count}"
        ) from None


def place(process: Process, opened: dict[int, int], remote: Remote, ctx: Context) -> None:
    """Inside the new process: descriptors to their numbers, everything else closed.

    The process has inherited all of `opened` under the same numbers. RLIMIT_NOFILE must not be
    lower than its highest number yet.
    """
    placing = Placing(process, remote, ctx)
    final = sorted(placing.cloexec)
    files = {descriptor.fd: descriptor.file for descriptor in process.descriptors}
    placing.demand("dup3", (placing.dup3(opened[files[fd]], fd) for fd in final))
    edges = [-1, *final, _CLOSE_TO + 1]
    placing.demand(
        "close_range",
        ((NR.close_range, low + 1, high - 1, 0) for low, high in pairwise(edges) if low + 1 < high),
    )
    for file in process.files:
        finish = getattr(BY_NAME[file.kind], "finish", None)
        if finish is not None:
            finish(file, placing)
        ownership.give(file, placing)
