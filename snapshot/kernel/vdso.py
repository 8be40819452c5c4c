"""The vdso: code of the kernel in every process. An image can only go back to the same one, since
threads may stand in it and the program has its addresses."""

from __future__ import annotations

from blake3 import blake3

from ..maps import parse_maps
from .arch_x86_64 import VDSO_NAME

DIGEST_BYTES = 16


def digest() -> bytes:
    """BLAKE3 (16 bytes) of this kernel's vdso, the same in all processes; b"" when there is none
    (vdso=0 on the kernel's command line)."""
    with open("/proc/self/maps", "rb") as maps:
        lines = [line for line in parse_maps(maps.read()) if line.name == VDSO_NAME]
    if not lines:
        return b""
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        memory.seek(lines[0].start)
        return blake3(memory.read(lines[0].size)).digest(DIGEST_BYTES)
