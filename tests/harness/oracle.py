"""What a target's memory was at T0, read by a path of its own: none of the project's code.

`read(pid)` is called while every thread of the target stands still (the `frozen` hook) and takes
the bytes from /proc/PID/mem; which pages hold anything comes from /proc/PID/pagemap, so that empty
ones stay empty. `compare` then asks an image for every byte.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

PAGE = 4096
PIECE = 4 << 20
"""Bytes of one pread and of one question to the image."""
HOLES_READ = 1 << 30
"""Of empty ranges at most so many bytes are asked for; of longer ones, both ends."""
ANON_HUGE = "/anon_hugepage (deleted)"
"""MAP_ANONYMOUS | MAP_HUGETLB."""
SKIPPED = ("[vvar]", "[vvar_vclock]", "[vdso]", "[vsyscall]")

_PRESENT, _SWAPPED, _FILE = 1 << 63, 1 << 62, 1 << 61
_MARKER = 31  # swap type of an empty entry that is only a write-protect marker (SWP_PTE_MARKER)


class Readable(Protocol):
    def read(self, address: int, length: int) -> bytes: ...


@dataclass(frozen=True)
class Line:
    """A line of /proc/PID/maps."""

    start: int
    end: int
    permissions: str
    inode: int
    name: str
    offset: int = 0
    huge: bool = False  # of hugetlbfs

    @property
    def shared(self) -> bool:
        return self.permissions[3] == "s"

    @property
    def writable(self) -> bool:
        return self.permissions[1] == "w"


@dataclass
class Memory:
    """Bytes of T0: `data` holds (address, bytes), `holes` empty [start, end) that are zeros."""

    data: list[tuple[int, bytes]] = field(default_factory=list)
    holes: list[tuple[int, int]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(len(piece) for _, piece in self.data)

    def at(self, address: int, length: int) -> bytes:
        """Bytes of one range that was read in one go, for tests of the oracle itself."""
        for start, piece in self.data:
            if start <= address and address + length <= start + len(piece):
                return piece[address - start : address - start + length]
        raise KeyError(hex(address))


@dataclass(frozen=True)
class Difference:
    address: int  # of the first byte that differs
    length: int  # differing pages that follow each other, in bytes
    expected: bytes  # 16 bytes from there
    found: bytes
    mapping: str

    def __str__(self) -> str:
        return (
            f"{self.address:#x} ({self.mapping}), {self.length // PAGE} pages: T0 had "
            f"{self.expected.hex()}, the image {self.found.hex()}"
        )


def maps(pid: int) -> list[Line]:
    found = []
    text = Path(f"/proc/{pid}/maps").read_text(errors="replace")
    huge = _huge(pid) if ANON_HUGE in text or "/memfd:" in text else set()
    for row in text.splitlines():
        fields = row.split(maxsplit=5)
        start, end = (int(word, 16) for word in fields[0].split("-"))
        name = fields[5] if len(fields) > 5 else ""
        offset = int(fields[2], 16)
        found.append(Line(start, end, fields[1], int(fields[4]), name, offset, start in huge))
    return found


def _huge(pid: int) -> set[int]:
    """Where the mappings of hugetlbfs start."""
    found, start = set(), 0
    for row in Path(f"/proc/{pid}/smaps").read_text(errors="replace").splitlines():
        word = row.split(maxsplit=1)[0]
        if not word.endswith(":"):
            start = int(word.split("-")[0], 16)
        elif word == "VmFlags:" and "ht" in row.split():
            found.add(start)
    return found


def read(pid: int) -> Memory:
    """All memory of `pid` that is its own: writable mappings whole, of others what was changed.

    Every thread must stand still meanwhile. Private mappings of files count (with their bytes from
    the file where the program did not write), shared ones of files on disk do not: the image says
    only which file they are.
    """
    memory = Memory()
    with (
        open(f"/proc/{pid}/mem", "rb", buffering=0) as mem,
        open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap,
    ):
        for line in maps(pid):
            if line.huge:
                _read_huge(pid, line, mem.fileno(), pagemap.fileno(), memory)
                continue
            if line.name in SKIPPED or (line.name.startswith("/dev/") and line.inode == 0):
                continue
            if _on_disk(line):
                continue
            ranges = list(_ranges(line, pagemap.fileno()))
            for start, end, filled in ranges:
                if filled:
                    memory.data += _bytes(mem.fileno(), start, end)
                elif line.inode == 0 or line.shared:
                    memory.holes.append((start, end))
    return memory


def _read_huge(pid: int, line: Line, mem: int, pagemap: int, memory: Memory) -> None:
    """Reading a huge page that is not there would make it: of private memory the page table says
    which are, and an object is read as the file that it is."""
    if line.shared:
        with open(f"/proc/{pid}/map_files/{line.start:x}-{line.end:x}", "rb", buffering=0) as file:
            for at in range(line.start, line.end, PIECE):
                where = line.offset + at - line.start
                memory.data.append((at, os.pread(file.fileno(), min(PIECE, line.end - at), where)))
        return
    for start, end, filled in _runs(line.start, _entries(pagemap, line.start, line.end), False):
        if filled:
            memory.data += _bytes(mem, start, end)
        else:
            memory.holes.append((start, end))


def _entries(pagemap: int, start: int, end: int) -> tuple[int, ...]:
    raw = os.pread(pagemap, (end - start) // PAGE * 8, start // PAGE * 8)
    return struct.unpack(f"<{len(raw) // 8}Q", raw)


def _on_disk(line: Line) -> bool:
    """A shared mapping of a regular file: not memory of the process."""
    if not line.shared or line.inode == 0:
        return False
    memory_only = ("/memfd:", "/dev/zero", "/dev/shm/", "/SYSV")
    return not line.name.startswith(memory_only)


def _ranges(line: Line, pagemap: int) -> Iterator[tuple[int, int, bool]]:
    """[start, end) and whether its bytes are to be read from the process."""
    if line.inode and not line.shared and line.writable:
        yield line.start, line.end, True
        return
    if line.shared:
        # Pages of the object that this process has not mapped in yet are not in its pagemap.
        yield line.start, line.end, True
        return
    own_only = bool(line.inode)  # a mapping of a file that cannot be written: changed pages only
    for begin in range(line.start, line.end, PIECE * 512):
        end = min(begin + PIECE * 512, line.end)
        yield from _runs(begin, _entries(pagemap, begin, end), own_only)


def _runs(begin: int, entries: tuple[int, ...], own_only: bool) -> Iterator[tuple[int, int, bool]]:
    first, state = 0, False
    for index, entry in enumerate(entries):
        filled = bool(entry & _PRESENT) or bool(
            entry & _SWAPPED and entry & 0x1F != _MARKER  # marker: empty, only protected
        )
        if own_only:
            filled = filled and not entry & _FILE
        if filled != state:
            if index > first:
                yield begin + first * PAGE, begin + index * PAGE, state
            first, state = index, filled
    if len(entries) > first:
        yield begin + first * PAGE, begin + len(entries) * PAGE, state


def _bytes(mem: int, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    while start < end:
        try:
            piece = os.pread(mem, min(PIECE, end - start), start)
        except OSError:  # behind the end of a mapped file: no byte to compare
            start += PAGE
            continue
        if not piece:
            return
        yield start, piece
        start += len(piece)


def compare(memory: Memory, image: Readable, pid: int | None = None) -> list[Difference]:
    """Every byte of `memory` against `image.read`; [] when all are equal.

    `pid` only names mappings in what is found: the target, if it still lives.
    """
    lines = maps(pid) if pid and os.path.exists(f"/proc/{pid}/maps") else []
    found: list[Difference] = []
    for start, expected in memory.data:
        got = image.read(start, len(expected))
        if got != expected:
            found += _differences(start, expected, got, lines)
    room = HOLES_READ
    for start, end in memory.holes:
        for begin, stop in _pieces(start, end, room):
            room -= stop - begin
            expected = bytes(stop - begin)
            got = image.read(begin, stop - begin)
            if got != expected:
                found += _differences(begin, expected, got, lines)
    return found


def _pieces(start: int, end: int, room: int) -> Iterator[tuple[int, int]]:
    if end - start > max(room, 2 * PIECE):
        yield start, start + PIECE
        yield end - PIECE, end
        return
    for begin in range(start, end, PIECE):
        yield begin, min(begin + PIECE, end)


def _differences(start: int, expected: bytes, got: bytes, lines: list[Line]) -> list[Difference]:
    if len(got) != len(expected):
        raise AssertionError(f"asked for {len(expected)} bytes at {start:#x}, got {len(got)}")
    pages = [
        offset
        for offset in range(0, len(expected), PAGE)
        if expected[offset : offset + PAGE] != got[offset : offset + PAGE]
    ]
    found: list[list[int]] = []
    for offset in pages:
        if found and found[-1][1] == offset:
            found[-1][1] = offset + PAGE
        else:
            found.append([offset, offset + PAGE])
    return [_describe(start, first, last, expected, got, lines) for first, last in found]


def _describe(
    start: int, first: int, last: int, expected: bytes, got: bytes, lines: list[Line]
) -> Difference:
    at = next(i for i in range(first, last) if expected[i] != got[i])
    names = [
        f"{line.permissions} {line.name or 'anonymous'}"
        for line in lines
        if line.start <= start + at < line.end
    ]
    name = names[0] if names else "?"
    return Difference(start + at, last - first, expected[at : at + 16], got[at : at + 16], name)
