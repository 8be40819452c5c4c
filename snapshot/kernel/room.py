"""Where in a target a system call can be made, and where the guard of remote.py can lie."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterable
from typing import NamedTuple

from ..errors import KernelError, TargetError, UnsupportedError
from ..units import align_up
from . import arch_x86_64 as arch
from ._native import ffi, lib
from .ptrace import Tracee

_VDSO_MAX = 1 << 20
_INSTRUCTION_BYTES = len(arch.SYSCALL_INSTRUCTION)
_PROCMAP_QUERY = 0xC0686611  # _IOWR('f', 17, struct procmap_query), Linux 6.11
_PROCMAP_EXECUTABLE = 0x4


class Room(NamedTuple):
    """Addresses: of the vdso, as the auxiliary vector has it (0: of none), of a `syscall`
    instruction and, in the padding behind the vdso, of room for the guard (0: there is none)."""

    vdso: int
    instruction: int
    guard: int

    @property
    def guarded(self) -> range:
        """Where the guard lies, ours or one that was left."""
        return range(self.guard, self.guard + lib.snap_guard_size()) if self.guard else range(0)


def find_room(tracee: Tracee) -> Room:
    """The thread need not be stopped for this: see `is_still`."""
    vdso, data = _read_vdso(tracee)
    found = data.find(arch.SYSCALL_INSTRUCTION)
    if found < 0 or not data.startswith(b"\x7fELF"):
        return Room(vdso, find_syscall(tracee), 0)
    return Room(vdso, vdso + found, vdso + room if (room := _padding(data)) else 0)


def is_still(tracee: Tracee, room: Room) -> bool:
    """Whether there is room where it was found before, and nothing of ours in it."""
    try:
        if tracee.read(room.instruction, _INSTRUCTION_BYTES) != arch.SYSCALL_INSTRUCTION:
            return False
        return not room.guard or not any(tracee.read(room.guard, lib.snap_guard_size()))
    except KernelError:  # not mapped any more
        return False


def guard_left(tracee: Tracee, addresses: Iterable[int]) -> range:
    """Where a guard lies that was left by one who died, if any of the addresses is near; else an
    empty range."""
    vdso = _vdso_address(tracee.tid)
    if not vdso or not any(vdso <= address < vdso + _VDSO_MAX for address in addresses):
        return range(0)
    vdso, data = _read_vdso(tracee)
    left = data.find(_guard_code())
    return range(vdso + left, vdso + left + lib.snap_guard_size()) if left >= 0 else range(0)


def _read_vdso(tracee: Tracee) -> tuple[int, bytes]:
    """Its address and its bytes; none, where it is not known."""
    tid = tracee.tid
    try:
        with open(f"/proc/{tid}/maps", "rb", buffering=0) as maps:
            vdso, end = _vdso(tid, maps.fileno())
        return vdso, tracee.read(vdso, min(end - vdso, _VDSO_MAX)) if end else b""
    except OSError as error:
        raise TargetError(f"process {tid}: {error.strerror}", f"ps -p {tid}") from None


def _guard_code() -> bytes:
    length = ffi.new("uint64_t *")
    code = lib.snap_guard_code(length)
    return bytes(ffi.buffer(code, length[0]))


def _padding(vdso: bytes) -> int:
    """Offset of zeros at the end that hold the guard, or of a guard that was left by one who died;
    0: there is no such place."""
    left = vdso.find(_guard_code())
    if left >= 0:
        return left
    start = align_up(len(vdso.rstrip(b"\0")) + 8, 16)
    return start if start + lib.snap_guard_size() <= len(vdso) else 0


def find_syscall(tracee: Tracee) -> int:
    """Address of a `syscall` instruction in executable memory of the target: in its vdso, which
    the auxiliary vector names, or else in any executable mapping."""
    tid = tracee.tid
    try:
        with open(f"/proc/{tid}/maps", "rb", buffering=0) as maps:
            vdso, end = _vdso(tid, maps.fileno())
            if end and (found := _scan(tracee, vdso, end)):
                return found
            ranges = _executable_ranges(maps.readall())
    except OSError as error:
        raise TargetError(f"process {tid}: {error.strerror}", f"ps -p {tid}") from None
    if not ranges and not os.path.exists(f"/proc/{tid}/exe"):
        raise TargetError(f"process {tid} has ended", f"ps -p {tid}")
    for start, stop in ranges:
        if found := _scan(tracee, start, stop):
            return found
    raise UnsupportedError(
        f"process {tid} has no `syscall` instruction to borrow",
        [f"{len(ranges)} executable mappings, vdso at {vdso:#x}"],
        f"cat /proc/{tid}/maps",
    )


def _vdso(tid: int, maps: int) -> tuple[int, int]:
    """Where the vdso begins, as the auxiliary vector says, and ends; 0 for what is not known."""
    vdso = _vdso_address(tid)
    return vdso, _executable_end(maps, vdso) if vdso else 0


def _vdso_address(tid: int) -> int:
    with open(f"/proc/{tid}/auxv", "rb", buffering=0) as file:
        auxv = file.readall()
    words = struct.iter_unpack("QQ", auxv[: len(auxv) & ~15])
    return next((value for key, value in words if key == arch.AT_SYSINFO_EHDR), 0)


def _executable_end(maps: int, address: int) -> int:
    """End of the executable mapping that starts at or holds `address`; 0 if there is none, or the
    kernel cannot tell (PROCMAP_QUERY, Linux 6.11: one mapping without reading all of maps)."""
    query = bytearray(struct.pack("13Q", 13 * 8, _PROCMAP_EXECUTABLE, address, *([0] * 10)))
    try:
        fcntl.ioctl(maps, _PROCMAP_QUERY, query)
    except OSError:
        return 0
    end: int = struct.unpack_from("13Q", query)[4]
    return end


def _executable_ranges(text: bytes) -> list[tuple[int, int]]:
    """Executable mappings of a /proc/PID/maps, the vdso first, vsyscall left out."""
    found: list[tuple[int, int]] = []
    for line in text.splitlines():
        fields = line.split(None, 5)
        name = fields[5] if len(fields) > 5 else b""
        if fields[1][2:3] != b"x" or name == b"[vsyscall]":
            continue
        start, _, end = fields[0].partition(b"-")
        found.insert(0 if name == b"[vdso]" else len(found), (int(start, 16), int(end, 16)))
    return found


def _scan(tracee: Tracee, start: int, end: int) -> int:
    """Address of the first `syscall` instruction of [start, end); 0 when there is none."""
    step = 1 << 20
    for address in range(start, end, step):
        length = min(step + 1, end - address)  # one more: an instruction across the seam
        offset = tracee.read(address, length).find(arch.SYSCALL_INSTRUCTION)
        if offset >= 0:
            return address + offset
    return 0
