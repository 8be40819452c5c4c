"""What the modules of the kinds of open file share: the view of a target's descriptors at
capture, and the way back to open descriptors at restore.

A kind is a module (`Kind`): it says which open files are its own, records one, opens it again in
`snap`, and, if it must, finishes it inside the new process. `descriptors.py` is the table.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeVar

from msgspec import Struct

from ..errors import RestoreError
from ..kernel import fdtable
from ..kernel import pidfd as pidfds
from ..kernel.arch_x86_64 import NR
from ..kernel.fdtable import Entry, Socket
from ..kernel.remote import Call, Remote
from ..kernel.sockdiag import Diag, UnixSocket, parse_unix
from ..manifest import Manifest, OpenFile, Process, Record, unpack
from . import sockopts

T = TypeVar("T", bound=Record)
Any_ = TypeVar("Any_")

O_CLOEXEC = 0o2000000
O_LARGEFILE = 0o100000
"""Always set in a 64-bit process; glibc and Python define it as 0."""
O_TMPFILE = 0o20000000
"""Without the O_DIRECTORY that glibc's O_TMPFILE includes."""
O_PATH = 0o10000000
FASYNC = 0o20000
"""O_ASYNC: signals when the file becomes ready."""
SETFL = os.O_APPEND | os.O_NONBLOCK | os.O_DIRECT | os.O_NOATIME
"""What F_SETFL can change, but for O_ASYNC, which needs an owner first."""
OPEN_ONCE = os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_NOCTTY | os.O_NOFOLLOW | O_TMPFILE
"""Flags that meant something only when the file was opened the first time."""
STANDARD = (0, 1, 2)
LARGEST = 256 * 1024
"""Bytes of a message that waits, at most."""
AT_FDCWD = -100


class Cannot(Exception):
    """At capture: this open file cannot be handled; the text says what it is."""


class Problem(Exception):
    """At restore: this open file cannot be opened again; the text says why."""


# --- capture -------------------------------------------------------------------------------------


class Seen(Struct, eq=False):
    """One struct file of the target, with all descriptors that share it (lowest first)."""

    id: int
    fds: list[int]
    entry: Entry  # of the lowest
    flags: int  # open(2) flags without O_CLOEXEC
    offset: int
    cloexec: set[int]  # those of `fds` that exec closes
    # When it is a socket, what it was asked:
    socket: Socket | OSError | None = None  # how it looks
    unix: bytes | None = None  # sockdiag.parse_unix
    queue: tuple[bytes, ...] | None = None  # the messages that wait in a unix socket

    @property
    def link(self) -> bytes:
        """Of /proc/PID/fd/N."""
        return self.entry.link

    @property
    def fd(self) -> int:
        return self.fds[0]

    @property
    def key(self) -> tuple[int, int]:
        """Names the inode: (device, inode)."""
        return self.entry.device, self.entry.inode

    @property
    def is_socket(self) -> bool:
        return self.entry.link.startswith(b"socket:[")

    @property
    def access(self) -> int:
        """O_RDONLY, O_WRONLY or O_RDWR."""
        return self.flags & os.O_ACCMODE

    def numbered(self, text: object) -> str:
        return f"descriptor {', '.join(map(str, self.fds))}: {text}"

    def lines(self, name: bytes) -> Iterator[bytes]:
        """The values of each line `name: value` of fdinfo."""
        for line in self.entry.info.split(b"\n"):
            if line.startswith(name):
                yield line[len(name) + 1 :].strip()

    def value(self, name: bytes) -> bytes:
        """The first of them; Cannot when the kernel does not show it."""
        for value in self.lines(name):
            return value
        raise Cannot(f"{os.fsdecode(self.link)}: this kernel's fdinfo has no {name.decode()}")


class Captured(NamedTuple):
    """What a kind says of one open file."""

    label: str
    state: Record
    outside: bool = False  # its other end is not in this process
    closed: bool = False  # and was connected at T0: it comes back as an ended connection


class Table:
    """All descriptors of a process while they are captured.

    In one that is not `stopped` nothing may be looked at that a look could disturb.
    """

    def __init__(self, pid: int, pidfd: int, files: list[Seen], *, stopped: bool = True) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.stopped = stopped
        self.files = files
        self.by_inode: dict[tuple[int, int], list[Seen]] = {}
        for seen in files:
            self.by_inode.setdefault(seen.key, []).append(seen)
        self.by_fd = {fd: seen for seen in files for fd in seen.fds}
        self._diag: Diag | None = None

    def path(self, seen: Seen) -> str:
        """Opening this path opens the file anew; stat() of it needs no open."""
        return f"/proc/{self.pid}/fd/{seen.fd}"

    @contextmanager
    def borrowed(self, seen: Seen) -> Iterator[int]:
        """A copy of the descriptor in `snap`: it shares offset and flags with the target's."""
        with pidfds.borrowed(self.pidfd, seen.fd) as copy:
            yield copy

    @contextmanager
    def socket(self, seen: Seen) -> Iterator[socket.socket]:
        """The same as a socket object; its flags stay what they are."""
        with socket.socket(fileno=pidfds.getfd(self.pidfd, seen.fd)) as sock:
            yield sock

    def ask(self) -> None:
        """All sockets, for `look` and `unix`: at once that is a fifth of what it costs one by one.
        """
        self._look([seen for seen in self.files if seen.is_socket])
        looks = [seen for seen in self.files if isinstance(seen.socket, Socket)]
        self._ask_unix([seen for seen in looks if self.look(seen).domain == socket.AF_UNIX])

    def look(self, seen: Seen) -> Socket:
        """How a socket looks; OSError when it is none."""
        if seen.socket is None:
            self._look([seen])
        assert seen.socket is not None
        if isinstance(seen.socket, OSError):
            raise seen.socket
        return seen.socket

    def unix(self, seen: Seen) -> UnixSocket | None:
        """See sockdiag.parse_unix."""
        if seen.unix is None:
            self._ask_unix([seen])
        assert seen.unix is not None
        return parse_unix(seen.unix)

    @cached_property
    def room(self) -> bytearray:
        """For what waits somewhere."""
        return bytearray(LARGEST)

    def _look(self, files: Sequence[Seen]) -> None:
        if files:
            found = fdtable.look(self.pidfd, [seen.fd for seen in files], sockopts.asked())
            for seen, look in zip(files, found, strict=True):
                seen.socket = look

    def _ask_unix(self, files: Sequence[Seen]) -> None:
        if files:
            self._diag = self._diag or Diag()
            answers = self._diag.unix([seen.entry.inode for seen in files])
            for seen, answer in zip(files, answers, strict=True):
                seen.unix = answer

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *_: object) -> None:
        if self._diag is not None:
            self._diag.close()


# --- restore -------------------------------------------------------------------------------------


class Context(Protocol):
    """The part of rebuild.Context that descriptors need."""

    @property
    def manifest(self) -> Manifest: ...
    @property
    def warnings(self) -> list[str]: ...
    @property
    def closed_connections(self) -> list[str]: ...
    @property
    def objects(self) -> Mapping[int, int]: ...  # SharedObject.id -> fd in snap
    @property
    def stdio(self) -> Sequence[int]: ...  # stdin, stdout, stderr of `snap restore`


class Opening:
    """The files of one process while they are opened again in `snap`.

    Every descriptor that a kind returns is moved above all numbers that the process will have, so
    that no dup3 in the new process overwrites one that is still needed.
    """

    def __init__(self, process: Process, ctx: Context) -> None:
        self.process = process
        self.ctx = ctx
        self.fds: dict[int, list[int]] = {}
        for descriptor in process.descriptors:
            self.fds.setdefault(descriptor.file, []).append(descriptor.fd)
        self.opened: dict[int, int] = {}
        self.together: dict[Any, Any] = {}  # what several files share, by a key of the kind's own
        self.until_done = ExitStack()  # what is closed when all files are open
        highest = max((descriptor.fd for descriptor in process.descriptors), default=0)
        self.floor = max(highest, *STANDARD) + 1

    def of_kind(self, name: str) -> list[OpenFile]:
        return [file for file in self.process.files if file.kind == name]

    def shared(self, key: Any, make: Callable[[], Any_]) -> Any_:
        """What `make` returned the first time that this key was asked for."""
        if key not in self.together:
            self.together[key] = make()
        found: Any_ = self.together[key]
        return found

    def keep(self, file: OpenFile, fd: int) -> None:
        """`fd` (of ours; closed here) is this open file, for the new process to inherit."""
        self.opened[file.id] = fcntl.fcntl(fd, fcntl.F_DUPFD, self.floor)
        os.close(fd)

    def temporary(self, fd: int) -> int:
        """Close `fd` only when all files of the process are open."""
        self.until_done.callback(os.close, fd)
        return fd

    def warn(self, file: OpenFile, text: str) -> None:
        self.ctx.warnings.append(f"{_numbers(self.fds, file)}: {text}")


class Placing:
    """The new process while its descriptors stand at their final numbers."""

    def __init__(self, process: Process, remote: Remote, ctx: Context) -> None:
        self.process = process
        self.remote = remote
        self.ctx = ctx
        self.fds: dict[int, list[int]] = {}  # OpenFile.id -> its numbers, ascending
        self.cloexec: dict[int, bool] = {}  # by number: every descriptor that is open
        for descriptor in sorted(process.descriptors, key=lambda d: d.fd):
            self.fds.setdefault(descriptor.file, []).append(descriptor.fd)
            self.cloexec[descriptor.fd] = descriptor.cloexec

    def calls(self, calls: Iterable[tuple[int, ...]]) -> list[int]:
        """Make system calls (number, arguments …) inside; raw results, -errno on failure."""
        return self.remote.batch([Call(nr, tuple(args)) for nr, *args in calls])

    def call(self, nr: int, *args: int) -> int:
        return self.calls([(nr, *args)])[0]

    def demand(self, what: str, calls: Iterable[tuple[int, ...]]) -> list[int]:
        """The same for calls that must not fail: RestoreError names the first that did."""
        every = list(calls)
        results = self.calls(every)
        for (_, *args), result in zip(every, results, strict=True):
            if result < 0:
                raise RestoreError(
                    f"{what}{tuple(args)} in the new process: {os.strerror(-result)}",
                    "snap show IMAGE",
                )
        return results

    def dup3(self, source: int, number: int) -> tuple[int, ...]:
        """The call that puts a copy of `source` at `number`."""
        return NR.dup3, source, number, O_CLOEXEC if self.cloexec.get(number) else 0

    @contextmanager
    def standing_at(self, source: int, number: int) -> Iterator[None]:
        """A copy of descriptor `source` stands at `number`; afterwards what stood there again."""
        taken = number in self.cloexec
        aside = 0
        if taken:
            aside = self.demand("fcntl", [(NR.fcntl, number, fcntl.F_DUPFD, 0)])[0]
        try:
            self.demand("dup3", [(NR.dup3, source, number, 0)])
            yield
        finally:
            if taken:
                self.demand("dup3", [self.dup3(aside, number), (NR.close, aside)])
            else:
                self.call(NR.close, number)

    def replace(self, file: OpenFile, path: bytes, flags: int, offset: int) -> None:
        """Open `path` inside the process and put it at the numbers of `file`; a warning if it
        cannot be opened."""
        address = self.remote.put(path + b"\0")
        fd = self.call(NR.openat, AT_FDCWD, address, flags, 0)
        if fd < 0:
            self.warn(file, f"cannot be opened in the new process: {os.strerror(-fd)}")
            return
        steps = [self.dup3(fd, number) for number in self.fds[file.id]]
        self.demand("dup3", [*steps, (NR.lseek, fd, offset, os.SEEK_SET), (NR.close, fd)])

    def warn(self, file: OpenFile, text: str) -> None:
        self.ctx.warnings.append(f"{_numbers(self.fds, file)}: {text}")


def _numbers(fds: Mapping[int, list[int]], file: OpenFile) -> str:
    numbers = fds.get(file.id, [])
    return f"descriptor {', '.join(map(str, numbers))} ({file.label})"


class Kind(Protocol):
    """A module of snapshot/resources for one kind of open file.

    It may also have `finish(file: OpenFile, placing: Placing) -> None`, run when all descriptors
    stand at their numbers inside the new process.
    """

    @property
    def NAME(self) -> str: ...
    def recognise(self, seen: Seen, table: Table) -> bool: ...
    def capture(self, seen: Seen, table: Table) -> Captured: ...
    def open(self, file: OpenFile, opening: Opening) -> int:
        """-> a descriptor of ours, which the caller owns. Raises Problem or OSError."""
        ...


def state_of(file: OpenFile, kind: type[T]) -> T:
    return unpack(file.state, kind)


def set_flags(fd: int, flags: int) -> None:
    """Give a descriptor of ours the status flags of the target's."""
    now = fcntl.fcntl(fd, fcntl.F_GETFL)
    if now & SETFL != flags & SETFL:
        fcntl.fcntl(fd, fcntl.F_SETFL, (now & ~SETFL) | (flags & SETFL))


def reopen(fd: int, flags: int) -> int:
    """A new struct file for what a descriptor of ours leads to, with an offset of its own."""
    return os.open(f"/proc/self/fd/{fd}", (flags & ~OPEN_ONCE) | os.O_CLOEXEC | os.O_NOCTTY)
