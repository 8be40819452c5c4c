"""Who else can write to the shared memory of a process: whoever maps it, or has a descriptor of it
that can write. What they write, no fault of the process tells.

A look at every process of the machine, some 0.1 ms for each: not for the pause. It is no instant:
who comes and goes meanwhile may be missed. An object is named by (device, inode).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from .errors import SnapError
from .kernel import procfs
from .kernel.kcmp import same_memory
from .manifest import Mapping
from .maps import Line, parse_maps

Key = tuple[int, int]


def having(pid: int, keys: Collection[Key]) -> frozenset[Key]:
    """Those of the objects that other processes map or can write to."""
    found: set[Key] = set()
    for _, lines, opened in _others(pid, keys):
        found |= opened.union((line.device, line.inode) for line in lines)
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class Before:
    """What tells those who had an object at T0, and children, from those who came to it."""

    origin: procfs.Stat  # of the process itself
    mappings: Sequence[Mapping]  # that a child inherits
    ticks: int  # T0, as the start of a process is counted
    forks: bool  # there were children since
    left: bool  # something was not saved at T0


def new(before: Before, keys: Collection[Key]) -> Iterator[tuple[int, str]]:
    """Other processes that may have written to one of the objects unseen since, and how they came
    to. Not children since T0, who waited, nor who began after T0 when all was saved."""
    for other, lines, opened in _others(before.origin.pid, keys):
        if _later(before, other):
            continue
        if opened:
            yield other, "has opened"
        elif not (before.forks and all(_inherited(before, line) for line in lines)):
            yield other, "maps"


def _later(before: Before, pid: int) -> bool:
    """Whether it began after T0 and can have done no harm: never, if something was left then,
    unless it is a descendant that still has the address space it was forked with."""
    try:
        stat = procfs.stat(pid)
    except SnapError:
        return False
    same = stat.start_stack > 1 and _layout(stat) == _layout(before.origin)
    return stat.start_ticks > before.ticks and (not before.left or (before.forks and same))


def _layout(stat: procfs.Stat) -> tuple[int, ...]:
    """Where an execve(2) has put things, at random: a fork copies it."""
    return stat.start_code, stat.start_stack, stat.arg_start, stat.env_start


def _inherited(before: Before, line: Line) -> bool:
    return any(_part_of(line, one) for one in before.mappings)


def _part_of(line: Line, one: Mapping) -> bool:
    same = (one.device, one.inode) == (line.device, line.inode)
    inside = same and one.start <= line.start and line.end <= one.end
    return inside and line.offset - line.start == one.offset - one.start


def _others(pid: int, keys: Collection[Key]) -> Iterator[tuple[int, list[Line], frozenset[Key]]]:
    """What each process but `pid`, and those that share its memory, has of the objects."""
    for name in os.listdir("/proc") if keys else ():
        if not name.isdecimal() or int(name) == pid:
            continue
        lines, opened = mapped(int(name), keys), written(int(name), keys)
        if (lines or opened) and not same_memory(pid, int(name)):
            yield int(name), lines, opened


def mapped(pid: int, keys: Collection[Key]) -> list[Line]:
    """The shared mappings of these objects that a process has; of one that has ended, none."""
    texts = [b" %02x:%02x %d " % (os.major(key[0]), os.minor(key[0]), key[1]) for key in keys]
    try:
        text = procfs.read(pid, "maps")
    except SnapError:
        return []  # or it is not ours to look at, nor then likely the target's
    if not any(one in text for one in texts):
        return []
    return [one for one in parse_maps(text) if one.shared and (one.device, one.inode) in keys]


def written(pid: int, keys: Collection[Key] | None = None) -> frozenset[Key]:
    """The files of these that a descriptor of the process can write to; None: all that have a
    name, or had one."""
    inodes = None if keys is None else {inode for _, inode in keys}
    found = set()
    try:
        names = procfs.names(pid, "fd")
    except SnapError:
        return frozenset()
    for name in names:
        link = f"/proc/{pid}/fd/{name}"
        try:
            if not os.lstat(link).st_mode & stat.S_IWUSR or not os.readlink(link).startswith("/"):
                continue
            # Its number first: a stat(2) of a file on dead storage may never return.
            if inodes is not None and _inode(pid, name) not in inodes:
                continue
            info = os.stat(link)
        except (OSError, SnapError):
            continue  # closed meanwhile
        if keys is None or (info.st_dev, info.st_ino) in keys:
            found.add((info.st_dev, info.st_ino))
    return frozenset(found)


def _inode(pid: int, name: str) -> int:
    """Of an open file: "ino:" of fdinfo, Linux 5.14."""
    _, _, after = procfs.read(pid, f"fdinfo/{name}").partition(b"\nino:")
    return int(after.split(maxsplit=1)[0])
