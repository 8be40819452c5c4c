"""The text of /proc/PID/maps and smaps as typed lines.

Pure: no I/O. Addresses, offsets and sizes are bytes; ranges are half open: [start, end). The format
is that of proc_pid_maps(5) and fs/proc/task_mmu.c of Linux.

`parse_maps` runs in the pause, where every µs counts: one pass over the text, and every field that
repeats from line to line (permissions, device, name) is converted once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import msgspec

from .units import PAGE, align_up

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
DELETED = b" (deleted)"
LOWEST, HIGHEST = 0x10000, (1 << 47) - PAGE
"""Where user mappings may lie: vm.mmap_min_addr, and the end of 47 bits (x86-64)."""
_GAPS_FROM = 0x200000
"""Below this lies the program of a process that is being rebuilt (kernel/spawn.py)."""


class Line(msgspec.Struct, frozen=True, gc=False):
    """One mapping. What only smaps tells is empty or zero in a line of maps."""

    start: int
    end: int
    prot: int  # PROT_READ 1 | PROT_WRITE 2 | PROT_EXEC 4
    shared: bool  # MAP_SHARED
    offset: int
    device: int  # st_dev, as os.makedev; 0 without a file
    inode: int
    name: bytes  # a path, "[heap]", "[anon:…]" or nothing; without " (deleted)"
    deleted: bool = False
    """The printed name ends in " (deleted)". The text cannot tell a file that has lost its name
    from one that is really called so: compare the inode of `printed` (procfs.mapped_path does)."""
    vm_flags: tuple[str, ...] = ()  # VmFlags, e.g. ("rd", "wr", "mr", "mw", "me", "ac")
    rss: int = 0
    swap: int = 0
    anonymous: int = 0  # present pages that are anonymous (dirty pages of a private file mapping)
    huge: int = 0  # of `anonymous`: in transparent huge pages
    page_size: int = 4096  # KernelPageSize
    thp_eligible: bool = False
    lazy_free: int = 0  # present pages that the kernel may take at any time (MADV_FREE)

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def printed(self) -> bytes:
        """The name as the kernel printed it, escapes undone."""
        return self.name + DELETED if self.deleted else self.name


class _Fields:
    """Converted fields by their text: most lines repeat those of other lines."""

    def __init__(self) -> None:
        self.permissions: dict[str, tuple[int, bool]] = {}
        self.devices: dict[str, int] = {}
        self.names: dict[str, tuple[bytes, bool]] = {}

    def permission(self, text: str) -> tuple[int, bool]:
        prot = PROT_READ * (text[0] == "r") | PROT_WRITE * (text[1] == "w")
        value = prot | PROT_EXEC * (text[2] == "x"), text[3] == "s"
        self.permissions[text] = value
        return value

    def device(self, text: str) -> int:
        major, minor = text.split(":")
        value = self.devices[text] = os.makedev(int(major, 16), int(minor, 16))
        return value

    def name(self, text: str) -> tuple[bytes, bool]:
        # seq_path escapes the newline alone: a backslash in a name is printed as it is, so a file
        # that has the four characters \012 in its name cannot be told from one with a newline.
        name = text.encode("latin-1").replace(b"\\012", b"\n")
        deleted = name.endswith(DELETED)
        value = self.names[text] = (name[: -len(DELETED)] if deleted else name), deleted
        return value


def parse_maps(text: bytes) -> list[Line]:
    """The lines of /proc/PID/maps, in order. ValueError when it is no such text."""
    fields = _Fields()
    permissions, devices, names = fields.permissions, fields.devices, fields.names
    lines = []
    # latin-1 keeps every byte of a name; str is faster to split and convert than bytes.
    rows = text.decode("latin-1").split("\n")
    if rows[-1]:
        raise ValueError(f"maps: no newline at the end: {rows[-1][:80]!r}")
    rows.pop()
    for row in rows:
        parts = row.split(None, 5)
        start, _, end = parts[0].partition("-")
        permission = parts[1]
        prot, shared = permissions.get(permission) or fields.permission(permission)
        offset = parts[2]
        inode = parts[4]
        if len(parts) == 6:
            printed = parts[5]
            name, deleted = names.get(printed) or fields.name(printed)
        else:
            name, deleted = b"", False
        device = parts[3]
        lines.append(
            Line(
                int(start, 16),
                int(end, 16),
                prot,
                shared,
                int(offset, 16),
                0 if inode == "0" else devices.get(device) or fields.device(device),
                int(inode),
                name,
                deleted,
            )
        )
    return lines


def parse_smaps(text: bytes) -> list[Line]:
    """The lines of /proc/PID/smaps, in order. ValueError when it is no such text.

    Every block ends with its VmFlags line (kernels built with CONFIG_PROC_PAGE_MONITOR).
    """
    heads, bodies = [], []
    for head, body in _blocks(text):
        heads.append(head)
        bodies.append(body)
    lines = parse_maps(b"".join(heads))
    return [_with_details(line, body) for line, body in zip(lines, bodies, strict=True)]


_VM_FLAGS = b"\nVmFlags:"


def _blocks(text: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Each mapping's first line (with its newline) and the lines that follow it."""
    at = 0
    while at < len(text):
        head_end = text.index(b"\n", at) + 1
        end = text.index(b"\n", text.index(_VM_FLAGS, head_end - 1) + 1) + 1
        yield text[at:head_end], text[head_end:end]
        at = end


_SIZES = {
    b"Rss",
    b"Swap",
    b"Anonymous",
    b"AnonHugePages",
    b"KernelPageSize",
    b"THPeligible",
    b"LazyFree",
}


def _with_details(line: Line, body: bytes) -> Line:
    values = dict.fromkeys(_SIZES, 0)
    flags: tuple[str, ...] = ()
    for row in body.split(b"\n"):
        name, _, value = row.partition(b":")
        if name in _SIZES:
            values[name] = int(value.split()[0])
        elif name == b"VmFlags":
            flags = tuple(value.decode("ascii").split())
    return Line(
        line.start,
        line.end,
        line.prot,
        line.shared,
        line.offset,
        line.device,
        line.inode,
        line.name,
        line.deleted,
        flags,
        values[b"Rss"] * 1024,
        values[b"Swap"] * 1024,
        values[b"Anonymous"] * 1024,
        values[b"AnonHugePages"] * 1024,
        values[b"KernelPageSize"] * 1024,
        bool(values[b"THPeligible"]),
        values[b"LazyFree"] * 1024,
    )


def gap(taken: Iterable[tuple[int, int]], size: int) -> int:
    """The lowest address at which `size` bytes lie outside all [start, end) of `taken`, a page free
    on both sides; 0: there is none."""
    at = _GAPS_FROM
    for start, end in sorted(taken):
        if start >= at + size + 2 * PAGE:
            break
        # A stack may grow down into what is free below it: keep away from the end of a gap.
        at = max(at, align_up(end, PAGE))
    return at + PAGE if at + size + 2 * PAGE <= HIGHEST else 0
