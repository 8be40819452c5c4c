"""What /proc says of a stopped process: read in the pause, understood after it.

To open a file of /proc/PID costs 20-90 µs, to read an open one 2-10 µs (measured, Linux 6.18): a
caller who opens them before the pause (`Open`) makes the pause shorter.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

from ..errors import SnapError
from ..kernel import procfs
from ..kernel._native import ffi, lib
from ..kernel.closing import Closing
from ..kernel.reading import Reading

_NAMES = (
    "stat",
    "timers",
    "limits",
    "personality",
    "oom_score_adj",
    "coredump_filter",
    "auxv",
    "cmdline",
)
_OPTIONAL = ("timers", "coredump_filter", "ksm_stat")
"""Files that a kernel may be built without (CONFIG_POSIX_TIMERS, CONFIG_ELF_CORE, CONFIG_KSM)."""
_BESIDE = ("maps", "ksm_stat")
"""No part of Facts, read at the same time."""
_STATUS = "status"
"""Of the leader."""
_FLAGS = os.O_RDONLY | os.O_CLOEXEC
_BYTES = 64 * 1024
_THREAD_BYTES = 4096
_MOST = 400
"""Threads whose files are kept open: we may have 1,024 descriptors in all."""


class Open(Closing):
    """The files of /proc/PID that Facts are read from, and of those threads that are there now."""

    def __init__(self, pid: int, tids: Sequence[int] | None = None) -> None:
        """`tids`: of these threads only. TargetError (gone) or DeniedError, as procfs.read."""
        self.pid = pid
        self._files: dict[str, int] = {}
        self._threads: dict[int, int] = {}
        self._reading: Reading | None = None
        self._there: Reading | None = None
        """The same, when it has been read."""
        self._places: dict[str, int] = {}  # in it
        try:
            for name in _NAMES:
                self._open(name)
            for tid in (procfs.threads(pid) if tids is None else tids)[:_MOST]:
                self._open_thread(tid)
            self._room = bytearray(_BYTES + _THREAD_BYTES * len(self._threads))
        except BaseException:
            self.close()
            raise

    def _open(self, name: str) -> None:
        try:
            self._files[name] = os.open(procfs.path(self.pid, name), _FLAGS)
        except OSError as error:
            if name not in _OPTIONAL:
                procfs.fail(error, self.pid, name)

    def _open_thread(self, tid: int) -> None:
        with suppress(OSError):  # it has ended
            self._threads[tid] = os.open(procfs.path(self.pid, "status", tid), _FLAGS)

    def prepare(self) -> Reading:
        """For `look`, and for a thread that is to read the descriptors."""
        for name in _BESIDE:
            self._open(name)
        if self.pid not in self._threads:
            self._threads[self.pid] = procfs.open_file(self.pid, "status", self.pid)
        files = {**self._files, _STATUS: self._threads[self.pid]}
        maps = len(procfs.read_again(self._files["maps"]))
        self._reading = Reading(self.pid, [*files.values()], _BYTES + 2 * maps)
        self._places = {name: i for i, name in enumerate(files)}
        return self._reading

    def look(self) -> None:
        """In the pause, after `prepare`: reads all but the statuses of other threads. From then on
        that is what there is."""
        assert self._reading is not None
        self._there = self._reading if self._reading.read() else None

    def looked(self) -> None:
        """The same, where it has been read by somebody else."""
        self._there = self._reading

    def now(self, name: str) -> bytes | None:
        """One of those of `prepare`, while the process runs; None: this kernel does not have it."""
        fd = self._files.get(name)
        return procfs.read_again(fd) if fd is not None else None

    def place(self, name: str) -> int:
        """Of a file among those of `prepare`; -1: this kernel does not have it."""
        return self._places.get(name, -1)

    def beside(self, name: str) -> bytes | None:
        """maps or ksm_stat, as `look` has found it; None: it has not."""
        there = self._there
        return there.file(self._places[name]) if there and name in self._places else None

    @property
    def status(self) -> bytes | None:
        """Of the leader, as `look` has found it; None: it has not."""
        return self._there.file(self._places[_STATUS]) if self._there else None

    @property
    def links(self) -> tuple[bytes, bytes, bytes]:
        """exe, cwd and root. TargetError (gone) or DeniedError."""
        there = self._there
        return there.links if there else links(self.pid)

    def read(
        self, tids: Sequence[int], names: Collection[str] = _NAMES
    ) -> tuple[dict[str, bytes], dict[int, bytes]] | None:
        """Texts by name, and statuses by tid: of those threads that were there then. None: it did
        not work, the files have to be read one by one."""
        texts: dict[str, bytes] = {}
        statuses: dict[int, bytes] = {}
        if there := self._there:
            places = self._places
            texts = {name: there.file(places[name]) for name in names if name in places}
            statuses[self.pid] = there.file(places[_STATUS])
        rest = set(names) - texts.keys()
        files = {name: fd for name, fd in self._files.items() if name in rest}
        known = [tid for tid in tids if tid in self._threads and tid not in statuses]
        found = self._read([*files.values(), *(self._threads[tid] for tid in known)])
        if found is None:
            return None
        texts |= zip(files, found, strict=False)
        statuses |= zip(known, found[len(files) :], strict=True)
        return texts, statuses

    def _read(self, fds: Sequence[int]) -> list[bytes] | None:
        if not fds:
            return []
        ends = ffi.new("int64_t[]", len(fds))
        room = ffi.from_buffer("char[]", self._room)
        if lib.snap_read_files(fds, len(fds), room, len(self._room), ends) < 0 or min(ends) < 0:
            return None
        marks = [0, *ends]
        return [bytes(self._room[marks[i] : marks[i + 1]]) for i in range(len(fds))]

    def close(self) -> None:
        if self._reading is not None:
            self._reading.close()
        for fd in (*self._files.values(), *self._threads.values()):
            os.close(fd)
        self._files.clear()
        self._threads.clear()


@dataclass
class Facts:
    """Texts of /proc/PID at T0."""

    pid: int
    status_texts: dict[int, bytes]  # /proc/PID/task/TID/status by tid, of those that were read
    timers_text: bytes
    stat_text: bytes = b""
    limits_text: bytes = b""
    personality_text: bytes = b""
    oom_score_adj_text: bytes = b""
    coredump_filter_text: bytes = b""  # empty: a kernel that has none
    auxv: bytes = b""
    cmdline: tuple[bytes, ...] = ()
    exe: bytes = b""
    cwd: bytes = b""
    root: bytes = b""

    @classmethod
    def first(cls, pid: int, files: Open | None = None) -> Facts:
        """What has to be known before the threads are asked; the rest is to be read before the
        target runs on, and to take the place of these (`renew`)."""
        found = files.read([pid], ["timers"]) if files is not None else None
        texts, statuses = found or ({"timers": _optional(pid, "timers")}, {})
        status = statuses.get(pid) or procfs.read(pid, "status", pid)
        return cls(pid, {pid: status}, texts.get("timers", b""))

    @classmethod
    def read(cls, pid: int, tids: Sequence[int], files: Open | None = None) -> Facts:
        """TargetError (gone, a kernel thread, a zombie) or DeniedError, as procfs.read."""
        found = files.read(tids) if files is not None else None
        if found is None:
            texts = {name: procfs.read(pid, name) for name in _NAMES if name not in _OPTIONAL}
            texts |= {name: _optional(pid, name) for name in _OPTIONAL}
            found = texts, {}
        texts, statuses = found
        exe, cwd, root = files.links if files is not None else links(pid)
        return cls(
            pid=pid,
            status_texts={
                tid: statuses.get(tid) or procfs.read(pid, "status", tid) for tid in tids
            },
            stat_text=texts["stat"],
            timers_text=texts.get("timers", b""),
            limits_text=texts["limits"],
            personality_text=texts["personality"],
            oom_score_adj_text=texts["oom_score_adj"],
            coredump_filter_text=texts.get("coredump_filter", b""),
            auxv=texts["auxv"],
            cmdline=procfs.split_cmdline(texts["cmdline"]),
            exe=exe,
            cwd=cwd,
            root=root,
        )

    def renew(self, newer: Facts) -> None:
        """These are the newer ones, for all who hold them."""
        self.__dict__ = newer.__dict__

    @property
    def status(self) -> procfs.Status:
        """Of the leader, whose signal masks and limits are those of the process."""
        return self.statuses[self.pid]

    @cached_property
    def statuses(self) -> dict[int, procfs.Status]:
        return {tid: procfs.Status(text) for tid, text in self.status_texts.items()}

    @property
    def nested(self) -> bool:
        """Whether the process has numbers of its own, in a pid namespace that is not ours."""
        return len(self.status.namespace_pids) > 1

    def inner(self, tid: int) -> int:
        """The id that a thread has for itself: in a pid namespace of its own it is another one
        than ours, and the one that its memory and a new process need."""
        if tid not in self.statuses:
            return tid
        return self.statuses[tid].namespace_pids[-1]

    @cached_property
    def stat(self) -> procfs.Stat:
        return procfs.parse_stat(self.stat_text)

    @property
    def personality(self) -> int:
        return int(self.personality_text, 16)


def links(pid: int) -> tuple[bytes, bytes, bytes]:
    """exe, cwd and root of a process. TargetError (gone) or DeniedError."""
    return procfs.link(pid, "exe"), procfs.link(pid, "cwd"), procfs.link(pid, "root")


def _optional(pid: int, name: str) -> bytes:
    """A file that a kernel may be built without (CONFIG_POSIX_TIMERS, CONFIG_ELF_CORE)."""
    try:
        return procfs.read(pid, name)
    except SnapError:
        procfs.read(pid, "stat")  # the process is there and may be read
        return b""
