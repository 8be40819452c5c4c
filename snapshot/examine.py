"""What a target is and whether all of it can be handled, found out without touching it."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from . import others
from .errors import DeniedError, TargetError, UnsupportedError
from .kernel import pidfd as pidfds
from .kernel import procfs
from .maps import Line, parse_maps
from .regions import FileFacts, Plan, plan
from .resources import descriptors, preflight
from .resources.memfd import SharedMemory

O_ACCMODE = 3
ELF_X86_64 = 62  # e_machine, elf(5)


@dataclass(frozen=True, slots=True)
class Examination:
    """A target at one moment. The fields but the plan tell whether it has changed since."""

    pid: int
    maps: bytes  # the text of /proc/PID/maps
    needed: dict[tuple[int, int], SharedMemory]
    written: frozenset[tuple[int, int]]
    elsewhere: frozenset[tuple[int, int]]
    plan: Plan

    def holds(self, needed: dict[tuple[int, int], SharedMemory], maps: bytes) -> bool:
        """Whether the plan still fits the target, which is stopped and has these /proc/PID/maps and
        needs `needed`."""
        if maps != self.maps or needed != self.needed:
            return False
        return not self.plan.objects or others.written(self.pid) == self.written


def target(pid: int) -> None:
    """Raises TargetError or DeniedError when `pid` is nothing that can be taken."""
    if pid <= 0:
        raise TargetError(f"{pid} is no process id", "ps -e")
    status = procfs.status(pid)
    comm = procfs.comm(pid).decode("utf-8", "replace")
    if status.state in "ZX":
        raise TargetError(f"process {pid} ({comm}) is a zombie: its memory is gone", f"ps -p {pid}")
    if status.kernel_thread:
        raise TargetError(f"{pid} ({comm}) is a kernel thread: it has no memory of its own", "ps")
    if status.number("Tgid") != pid:
        leader = status.number("Tgid")
        raise TargetError(f"{pid} is a thread of process {leader}", f"snap take {leader}")
    if status.tracer:
        tracer = procfs.comm(status.tracer).decode("utf-8", "replace")
        raise TargetError(
            f"process {pid} ({comm}) is being traced by process {status.tracer} ({tracer})",
            f"ps -p {status.tracer}",
        )
    _machine(pid)


def _machine(pid: int) -> None:
    try:
        with open(f"/proc/{pid}/exe", "rb") as file:
            head = file.read(20)
    except PermissionError:
        raise DeniedError(
            f"process {pid} may not be examined by uid {os.geteuid()}", f"sudo snap take {pid}"
        ) from None
    except OSError:
        return  # a program that is no longer to be read is recognised by its system calls
    if head[:4] == b"\x7fELF" and int.from_bytes(head[18:20], "little") != ELF_X86_64:
        raise UnsupportedError(f"process {pid} is no x86-64 program", [], "snap check")


def examine(
    pid: int,
    needed: dict[tuple[int, int], SharedMemory] | None = None,
    earlier: Examination | None = None,
) -> Examination:
    """Reads what decides how each mapping is treated. Runs before the pause, and again inside it
    when something has changed since `earlier`. The page tables are walked for it (about 1 ms a
    GiB). `needed`: the shared objects that descriptors lead to, where the target is stopped."""
    needed = needed if needed is not None else earlier.needed if earlier else {}
    lines = procfs.smaps(pid)
    written = others.written(pid)
    elsewhere = _elsewhere(pid, lines, earlier)
    tmpfs = _tmpfs_devices(pid)

    def facts(line: Line) -> FileFacts | None:
        found = procfs.mapped_path(pid, line)
        if found is None:
            return None
        key = (found.stat.st_dev, found.stat.st_ino)
        return FileFacts(
            path=found.path,
            named=found.named,
            tmpfs=line.device in tmpfs,
            character=stat.S_ISCHR(found.stat.st_mode),
            device=found.stat.st_dev,
            inode=found.stat.st_ino,
            size=found.stat.st_size,
            mtime_ns=found.stat.st_mtime_ns,
            mode=found.stat.st_mode,
            written=key in written or key in elsewhere,
        )

    made = plan(lines, 0, facts, needed.values(), earlier.plan if earlier else None)
    maps = procfs.read(pid, "maps")
    if _ranges(lines) != _ranges(parse_maps(maps)):
        maps = b""  # it changed in between: the pause will look again
    return Examination(pid, maps, needed, written, elsewhere, made)


def refuse(pid: int, made: Plan, descriptor_problems: list[str] | None = None) -> None:
    """ONE UnsupportedError that lists everything of the process that cannot be handled."""
    if descriptor_problems is None:
        handle = pidfds.open(pid)
        try:
            descriptor_problems = descriptors.examine(pid, handle)
        finally:
            os.close(handle)
    problems = [*made.problems, *descriptor_problems, *preflight.unsupported(pid)]
    if problems:
        raise UnsupportedError(
            f"process {pid} has {len(problems)} thing{'s' * (len(problems) > 1)} "
            "that cannot be taken:",
            problems,
            f"snap check {pid}",
        )


def _elsewhere(
    pid: int, lines: list[Line], earlier: Examination | None
) -> frozenset[tuple[int, int]]:
    """(device, inode) of the shared memory that other processes have too. What was not armed in the
    plan of `earlier` is taken for such: nobody has looked for the others since, for the target may
    stand still now and they are many, nor has an event told of children."""
    mapped = {(line.device, line.inode) for line in lines if line.shared and line.inode}
    if earlier is not None:
        return earlier.elsewhere | (mapped - earlier.plan.armed_objects)
    return others.having(pid, mapped)


def _tmpfs_devices(pid: int) -> frozenset[int]:
    devices = set()
    for row in procfs.read(pid, "mountinfo").split(b"\n"):
        left, _, right = row.partition(b" - ")
        if right.startswith((b"tmpfs ", b"devtmpfs ")):
            major, _, minor = left.split()[2].partition(b":")
            devices.add(os.makedev(int(major), int(minor)))
    return frozenset(devices)


def _ranges(lines: list[Line]) -> list[tuple[int, int, int, bytes]]:
    return [(line.start, line.end, line.prot, line.name) for line in lines]
