"""What a take that was killed may leave in its target: a scratch mapping, and nothing else."""

from __future__ import annotations

import re

from tests.live.test_harmless import changes

SCRATCH = 64 * 1024
_SIZES = re.compile(r"^Vm(Size|Data):.*\n", re.M)
Piece = tuple[int, int, str]
"""[start, end) and what it is: permissions, offset, device, inode and name."""


def pieces(maps: str) -> list[Piece]:
    """Mappings, neighbours of the same anonymous kind made one: the kernel may do so or not."""
    found: list[Piece] = []
    for line in maps.splitlines():
        place, _, what = line.partition(" ")
        start, end = (int(word, 16) for word in place.split("-"))
        fields = what.split()
        kind = " ".join(fields) if len(fields) > 4 or fields[3] != "0" else fields[0]
        if found and len(fields) == 4 and fields[3] == "0" and found[-1][1:] == (start, kind):
            start = found.pop()[0]
        found.append((start, end, kind))
    return found


def scratch(before: str, after: str) -> int:
    """Where a scratch mapping was left, by two texts of /proc/PID/maps; 0: nowhere."""
    old = {(s, k): e for s, e, k in pieces(before)}
    ends = {(e, k): s for s, e, k in pieces(before)}
    for start, end, kind in pieces(after):
        if kind != "rw-p":
            continue
        if (start, kind) not in old and (end, kind) not in ends and end - start == SCRATCH:
            return start
        if old.get((start, kind), end) == end - SCRATCH:
            return end - SCRATCH
        if ends.get((end, kind), start) == start + SCRATCH:
            return start
    return 0


def without(maps: str, address: int) -> list[Piece]:
    """The pieces but for a scratch at `address`."""
    found = []
    for start, end, kind in pieces(maps):
        if start <= address < end:
            found += [(start, address, kind), (address + SCRATCH, end, kind)]
        else:
            found.append((start, end, kind))
    return [piece for piece in found if piece[0] < piece[1]]


def harm(before: dict[str, str], after: dict[str, str], *, scratch_allowed: bool) -> str:
    """What of `observed` differs and should not; '' is nothing."""
    found = changes(before, after)
    if not found or not scratch_allowed:
        return found
    left = scratch(before["maps"], after["maps"])
    if not left:
        return found
    if without(after["maps"], left) != pieces(before["maps"]):
        return f"more than a scratch at {left:x}: {found}"
    kept = [
        {key: _SIZES.sub("", text) for key, text in seen.items() if key not in ("maps", "flags")}
        for seen in (before, after)
    ]
    armed = re.search(r"^VmFlags:.* u[wmi]\b", after["flags"], re.M)
    return "memory is still armed" if armed else changes(*kept)


def without_device(before: dict[str, str], after: dict[str, str]) -> dict[str, str]:
    """`after` but for two new sockets of ours and a new descriptor of /dev/userfaultfd."""
    kept = dict(after)
    sockets = devices = 0
    for key in sorted(after.keys() - before.keys()):
        text = after[key]
        # close-on-exec, as we make them and hardly anybody else does
        if not key.startswith("fd ") or not re.search(r"^flags:\t02\d{6}$", text, re.M):
            continue
        sockets += text.startswith("socket:")
        devices += text.startswith("/dev/userfaultfd")
        if text.startswith(("socket:", "/dev/userfaultfd")) and sockets <= 2 and devices <= 1:
            del kept[key]
    return kept
