"""Reading /proc of another process, errno turned into the errors of snapshot/errors.py.

Formats: proc(5) and Documentation/filesystems/proc.rst of Linux. Every function takes a pid and an
optional tid; a pid that is gone is a TargetError, one that may not be read a DeniedError.
"""

from __future__ import annotations

import errno
import os
import stat as stat_bits
from contextlib import suppress
from typing import NamedTuple, NoReturn

from .. import maps as maps_text
from ..errors import DeniedError, KernelError, TargetError
from .errnames import error_name

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
"""Ticks a second of the times in /proc/PID/stat."""


def path(pid: int, name: str, tid: int | None = None) -> str:
    """`/proc/PID/NAME`, or `/proc/PID/task/TID/NAME`."""
    return f"/proc/{pid}/{name}" if tid is None else f"/proc/{pid}/task/{tid}/{name}"


def read(pid: int, name: str, tid: int | None = None) -> bytes:
    """All of a file of /proc/PID, e.g. `read(pid, "status")`, `read(pid, "fdinfo/3")`.

    Raises TargetError (gone), DeniedError (not allowed), KernelError (anything else).
    """
    try:
        with open(path(pid, name, tid), "rb", buffering=0) as file:
            return file.readall()
    except OSError as error:
        fail(error, pid, name, tid)


def open_file(pid: int, name: str, tid: int | None = None) -> int:
    """A descriptor to read it from, again and again (`read_again`): it stays that process's."""
    try:
        return os.open(path(pid, name, tid), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        fail(error, pid, name, tid)


def read_again(fd: int) -> bytes:
    """All that is in such a file now; nothing when the process has ended."""
    found = b""
    try:
        while part := os.pread(fd, 65536, len(found)):
            found += part
    except ProcessLookupError:
        return b""
    return found


def write(pid: int, name: str, data: bytes, tid: int | None = None) -> None:
    """Write a setting, e.g. `write(pid, "oom_score_adj", b"0")`; OSError is left to the caller,
    who knows which refusals matter."""
    with open(path(pid, name, tid), "wb", buffering=0) as file:
        file.write(data)


def link(pid: int, name: str, tid: int | None = None) -> bytes:
    """Where a link of /proc/PID leads, as the kernel prints it: "exe", "cwd", "root", "fd/3"."""
    try:
        return os.readlink(os.fsencode(path(pid, name, tid)))
    except OSError as error:
        fail(error, pid, name, tid)


def names(pid: int, name: str) -> list[str]:
    """The entries of a directory of /proc/PID, e.g. "fd", "task"."""
    try:
        return os.listdir(path(pid, name))
    except OSError as error:
        fail(error, pid, name, None)


def fail(error: OSError, pid: int, name: str, tid: int | None = None) -> NoReturn:
    """Raise what `error` means for a file of /proc/PID."""
    where = path(pid, name, tid)
    code = error.errno
    if code in (errno.ENOENT, errno.ESRCH):
        if code == errno.ENOENT and os.path.isdir(f"/proc/{pid}"):
            raise TargetError(
                f"process {pid} has no {where} (a kernel thread, a zombie, or a thread that ended)",
                f"ps -o pid,stat,comm -p {pid}",
            ) from None
        raise TargetError(f"no process {pid} ({where})", f"ps -p {pid}") from None
    if code in (errno.EACCES, errno.EPERM):
        raise DeniedError(f"{where}: not allowed to uid {os.geteuid()}", f"sudo snap check {pid}")
    raise KernelError(f"{where}: {error_name(code or 0)}", f"snap check {pid}")


# --- threads, names, arguments -------------------------------------------------------------------


def threads(pid: int) -> list[int]:
    """Thread ids, the leader first, the others ascending."""
    tids = sorted(int(name) for name in names(pid, "task"))
    return sorted(tids, key=lambda tid: (tid != pid, tid))


def inner_tids(pid: int) -> dict[int, int]:
    """Thread ids of the process in its own pid namespace -> as seen from here."""
    return {status(pid, tid).numbers("NSpid")[-1]: tid for tid in threads(pid)}


def outer_tid(pid: int, inner: int) -> int:
    """The same of one thread, while others may end; 0: there is no such thread."""
    for tid in (inner, *threads(pid)):  # mostly there is one namespace
        with suppress(TargetError):
            if status(pid, tid).numbers("NSpid")[-1] == inner:
                return tid
    return 0


def comm(pid: int, tid: int | None = None) -> bytes:
    """The name, up to 15 bytes; it may hold anything but a NUL, newlines included."""
    return read(pid, "comm", tid).removesuffix(b"\n")


def cmdline(pid: int) -> tuple[bytes, ...]:
    """The arguments; empty for a kernel thread or a zombie."""
    return split_cmdline(read(pid, "cmdline"))


def split_cmdline(text: bytes) -> tuple[bytes, ...]:
    return tuple(text.removesuffix(b"\0").split(b"\0")) if text else ()


def auxv(pid: int) -> bytes:
    """The auxiliary vector as the kernel keeps it, AT_NULL included."""
    return read(pid, "auxv")


def mergeable(pid: int, text: bytes | None = None) -> bool:
    """Whether KSM may merge pages of the process: it takes their protection without an event.
    `text`: its ksm_stat, if that has been read."""
    try:
        text = read(pid, "ksm_stat") if text is None else text
    except KernelError:
        return True
    except TargetError:  # a kernel without KSM has no such file
        return os.path.exists("/sys/kernel/mm/ksm")
    return b"ksm_mergeable: yes" in text or not text.startswith(b"ksm_rmap_items 0\n")


def boot_id() -> str:
    """Names this boot; with pid and start time it names a process."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


# --- /proc/PID/stat ------------------------------------------------------------------------------


class Stat(NamedTuple):
    """Named fields of proc_pid_stat(5), numbered there from 1.

    Without ptrace access the addresses (26-28, 45-51) read as 0 or 1.
    """

    pid: int
    comm: bytes
    state: str
    ppid: int
    pgid: int
    sid: int
    tty: int
    priority: int  # 18
    nice: int  # 19
    start_ticks: int  # 22
    start_code: int  # 26
    end_code: int  # 27
    start_stack: int  # 28
    processor: int  # 39
    rt_priority: int  # 40
    policy: int  # 41
    start_data: int  # 45
    end_data: int  # 46
    start_brk: int  # 47
    arg_start: int  # 48
    arg_end: int  # 49
    env_start: int  # 50
    env_end: int  # 51


def parse_stat(text: bytes) -> Stat:
    """The comm stands in parentheses and may itself hold spaces, newlines and parentheses: it ends
    at the LAST closing one. ValueError when it is no such text."""
    opening, closing = text.index(b"("), text.rindex(b")")
    rest = text[closing + 1 :].split()
    number = [0, 0, 0, 0, *map(int, rest[1:])]  # number[n] is field n of the manual page
    return Stat(
        pid=int(text[:opening]),
        comm=text[opening + 1 : closing],
        state=rest[0].decode("ascii"),
        ppid=number[4],
        pgid=number[5],
        sid=number[6],
        tty=number[7],
        priority=number[18],
        nice=number[19],
        start_ticks=number[22],
        start_code=number[26],
        end_code=number[27],
        start_stack=number[28],
        processor=number[39],
        rt_priority=number[40],
        policy=number[41],
        start_data=number[45],
        end_data=number[46],
        start_brk=number[47],
        arg_start=number[48],
        arg_end=number[49],
        env_start=number[50],
        env_end=number[51],
    )


def stat(pid: int, tid: int | None = None) -> Stat:
    return parse_stat(read(pid, "stat", tid))


# --- /proc/PID/status ----------------------------------------------------------------------------


class Status:
    """/proc/PID/status; a field is looked up when it is asked for, for the text is parsed in the
    pause. KeyError: not in this kernel."""

    def __init__(self, text: bytes) -> None:
        self._text = text

    def __contains__(self, name: str) -> bool:
        return self._find(name) >= 0

    def __getitem__(self, name: str) -> str:
        start = self._find(name)
        if start < 0:
            raise KeyError(name)
        # Name may hold any byte (newlines escaped), nothing else is anything but ASCII.
        return self._text[start : self._text.index(b"\n", start)].decode("latin-1")

    def _find(self, name: str) -> int:
        """Where its value starts, or a negative number."""
        label = b"\n" + name.encode("ascii") + b":\t"
        at = self._text.find(label)
        if at < 0:  # the first line, or none
            return len(label) - 1 if self._text.startswith(label[1:]) else -1
        return at + len(label)

    def number(self, name: str, base: int = 10) -> int:
        return int(self[name].split()[0], base)

    def numbers(self, name: str) -> tuple[int, ...]:
        return tuple(int(value) for value in self[name].split())

    def mask(self, name: str) -> int:
        """A set: SigCgt, ShdPnd, CapEff, … (bit 0 is signal 1, or capability 0)."""
        return int(self[name], 16)

    @property
    def state(self) -> str:
        """One letter: R, S, D, T, t, Z, X, …"""
        return self["State"][0]

    @property
    def tracer(self) -> int:
        """Who traces it; 0 for nobody."""
        return self.number("TracerPid")

    @property
    def uids(self) -> tuple[int, ...]:
        """Real, effective, saved, file system."""
        return self.numbers("Uid")

    @property
    def gids(self) -> tuple[int, ...]:
        return self.numbers("Gid")

    @property
    def groups(self) -> tuple[int, ...]:
        return self.numbers("Groups")

    @property
    def umask(self) -> int:
        return self.number("Umask", 8)

    @property
    def namespace_pids(self) -> tuple[int, ...]:
        """Its pid in each pid namespace, the reader's own first, its innermost last."""
        return self.numbers("NSpid")

    @property
    def kernel_thread(self) -> bool:
        """Only a process without memory of its own has no VmSize; a zombie has none either."""
        return "VmSize" not in self and self.state not in "ZX"


def status(pid: int, tid: int | None = None) -> Status:
    return Status(read(pid, "status", tid))


# --- /proc/PID/limits ----------------------------------------------------------------------------

LIMITS = {
    "Max cpu time": 0,
    "Max file size": 1,
    "Max data size": 2,
    "Max stack size": 3,
    "Max core file size": 4,
    "Max resident set": 5,
    "Max processes": 6,
    "Max open files": 7,
    "Max locked memory": 8,
    "Max address space": 9,
    "Max file locks": 10,
    "Max pending signals": 11,
    "Max msgqueue size": 12,
    "Max nice priority": 13,
    "Max realtime priority": 14,
    "Max realtime timeout": 15,
}
"""RLIMIT_* numbers by the names in /proc/PID/limits."""

INFINITY = (1 << 64) - 1
"""RLIM_INFINITY, "unlimited"."""


def limits(pid: int) -> dict[int, tuple[int, int]]:
    """RLIMIT_* number → (soft, hard)."""
    return parse_limits(read(pid, "limits"))


def parse_limits(text: bytes) -> dict[int, tuple[int, int]]:
    found = {}
    for row in text.decode("ascii").split("\n")[1:]:
        name, values = row[:25].rstrip(), row[25:].split()
        if name in LIMITS:
            soft, hard = (INFINITY if v == "unlimited" else int(v) for v in values[:2])
            found[LIMITS[name]] = (soft, hard)
    return found


# --- mappings ------------------------------------------------------------------------------------


def maps(pid: int) -> list[maps_text.Line]:
    """The mappings now; empty for a kernel thread or a zombie."""
    return maps_text.parse_maps(read(pid, "maps"))


def smaps(pid: int) -> list[maps_text.Line]:
    """The mappings with VmFlags and sizes. The kernel walks every page table for it (about 1 ms a
    GiB of 4 KiB pages, [vsyscall] included): not for the pause."""
    return maps_text.parse_smaps(read(pid, "smaps"))


class MappedPath(NamedTuple):
    path: bytes  # in the target's root
    named: bool  # the file is still there under this name
    stat: os.stat_result  # of the very file that is mapped


def mapped_path(pid: int, line: maps_text.Line) -> MappedPath | None:
    """The file behind a mapping and whether it still has the name that maps shows; None when the
    process, which runs, has no such mapping any more.

    Through /proc/PID/map_files (needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN), whose link is not
    escaped, so that every name is exact. " (deleted)" is believed only when no file of that very
    name and inode exists.
    """
    name = f"map_files/{line.start:x}-{line.end:x}"
    try:
        printed = os.readlink(os.fsencode(path(pid, name)))
        actual = os.stat(path(pid, name))
    except OSError as error:
        if error.errno == errno.ENOENT and os.path.isdir(path(pid, "map_files")):
            return None
        fail(error, pid, name)
    # The kernel prints names as seen from our own root (which tells of a chroot); of a mount that
    # cannot be reached from there, as seen from the target's.
    roots = (b"", os.fsencode(path(pid, "root")))
    if any(_same_file(root + printed, actual) for root in roots):
        return MappedPath(printed, True, actual)
    bare = printed.removesuffix(maps_text.DELETED)
    named = bare != printed and any(_same_file(root + bare, actual) for root in roots)
    return MappedPath(bare, named, actual)


def _same_file(name: bytes, actual: os.stat_result) -> bool:
    try:
        found = os.stat(name)
    except OSError:
        return False
    return (
        found.st_ino == actual.st_ino
        and found.st_dev == actual.st_dev
        and stat_bits.S_IFMT(found.st_mode) == stat_bits.S_IFMT(actual.st_mode)
    )
