"""Memory with a descriptor: memfds, and files on tmpfs that have no name any more.

The bytes are those of a SharedObject, whether the process maps it or only has it open; this
module opens the object again. `needed` tells the take which objects descriptors alone need.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterable
from typing import Literal, NamedTuple

from ..kernel import filesystem
from ..manifest import Descriptor, OpenFile, Record
from ..units import HUGE, PAGE, mib
from .openfile import (
    O_PATH,
    OPEN_ONCE,
    Cannot,
    Captured,
    Opening,
    Problem,
    Seen,
    Table,
    reopen,
    set_flags,
    state_of,
)

NAME = "memfd"
PREFIX = b"/memfd:"
DELETED = b" (deleted)"


class State(Record, frozen=True):
    kind: Literal["memfd", "tmpfs"]
    name: bytes  # of the memfd, or the path that the tmpfs file had
    device: int
    inode: int
    size: int
    mode: int
    seals: int = 0
    page_size: int = PAGE  # a larger one: of hugetlbfs


class SharedMemory(NamedTuple):
    """An object that a descriptor of the target needs. `fd` is the target's, for pidfd_getfd."""

    device: int
    inode: int
    size: int
    fd: int
    kind: Literal["memfd", "tmpfs"]
    name: bytes
    seals: int
    mode: int
    page_size: int = PAGE


def needed(
    files: Iterable[OpenFile], descriptors: Iterable[Descriptor]
) -> dict[tuple[int, int], SharedMemory]:
    """(device, inode) → what the take must save as a SharedObject so that `files` can be opened
    again: every memfd and unnamed tmpfs file, mapped or not."""
    numbers = {descriptor.file: descriptor.fd for descriptor in descriptors}
    found: dict[tuple[int, int], SharedMemory] = {}
    for file in files:
        if file.kind != NAME:
            continue
        state = state_of(file, State)
        found[state.device, state.inode] = SharedMemory(
            device=state.device,
            inode=state.inode,
            size=state.size,
            fd=numbers[file.id],
            kind=state.kind,
            name=state.name,
            seals=state.seals,
            mode=state.mode,
            page_size=state.page_size,
        )
    return found


def recognise(seen: Seen, table: Table) -> bool:
    if not stat.S_ISREG(seen.entry.mode) or seen.flags & O_PATH or seen.entry.links:
        return False
    if seen.link.startswith(PREFIX):
        return True
    if not seen.link.startswith(b"/"):
        return False
    with table.borrowed(seen) as fd:
        return filesystem.type_of(fd) == filesystem.TMPFS_MAGIC


def capture(seen: Seen, table: Table) -> Captured:
    with table.borrowed(seen) as fd:
        kind = filesystem.type_of(fd)
        huge = os.fstat(fd).st_blksize if kind == filesystem.HUGETLBFS_MAGIC else 0
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError:
            seals = 0
    if huge > HUGE:
        raise Cannot(f"{os.fsdecode(seen.link)}: memory in huge pages of {mib(huge)}")
    if kind != filesystem.TMPFS_MAGIC and not huge:
        raise Cannot(f"{os.fsdecode(seen.link)}: memory of type {kind:#x}")
    memory = seen.link.startswith(PREFIX)
    name = seen.link.removesuffix(DELETED)
    state = State(
        kind="memfd" if memory else "tmpfs",
        name=name.removeprefix(PREFIX) if memory else name,
        device=seen.entry.device,
        inode=seen.entry.inode,
        size=seen.entry.size,
        mode=stat.S_IMODE(seen.entry.mode),
        seals=seals,
        page_size=huge or PAGE,
    )
    return Captured(os.fsdecode(seen.link), state)


def object_of(device: int, inode: int, opening: Opening) -> int | None:
    """A descriptor of ours for the object of the image that was this file; None without one."""
    for shared in opening.ctx.manifest.objects:
        if (shared.device, shared.inode) == (device, inode):
            return opening.ctx.objects.get(shared.id)
    return None


def open(file: OpenFile, opening: Opening) -> int:
    state = state_of(file, State)
    memory = object_of(state.device, state.inode, opening)
    if memory is None:
        raise Problem(f"{file.label}: its memory is not in the image")
    fd = reopen(memory, file.flags & ~OPEN_ONCE)
    os.lseek(fd, file.offset, os.SEEK_SET)
    set_flags(fd, file.flags)
    return fd
