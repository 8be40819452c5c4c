"""Two static programs of a few bytes, for x86-64: what a restored process is before it is rebuilt,
and pid 1 of its own pid namespace. Pure: bytes.

They are ELF files with one segment, loaded at the lowest address that a process may use, so that
nothing of an image is in their way. No library, no data, no writable memory but the stack.
"""

from __future__ import annotations

import struct

BASE = 0x10000
"""vm.mmap_min_addr of every distribution: programs do not lie there."""

EHDR, PHDR = 64, 56

_PAUSE = bytes.fromhex(
    "b822000000"  # again: mov eax, 34 (pause)
    "0f05"  # syscall
    "ebf7"  # jmp again
)

_REAP = (
    "b83d000000"  # again: mov eax, 61 (wait4)
    "bfffffffff"  # mov edi, -1
    "488d7424f8"  # lea rsi, [rsp - 8]
    "31d2"  # xor edx, edx
    "4531d2"  # xor r10d, r10d
    "0f05"  # syscall
    "3d{pid}"  # cmp eax, pid
    "740c"  # je ended
    "83f8f6"  # cmp eax, -ECHILD
    "75de"  # jne again
    "bfff000000"  # mov edi, 255
    "eb18"  # jmp exit
    "8b7c24f8"  # ended: mov edi, [rsp - 8]
    "40f6c77f"  # test dil, 127: the signal that ended it
    "7505"  # jne signalled
    "c1ef08"  # shr edi, 8: the exit status
    "eb09"  # jmp exit
    "83e77f"  # signalled: and edi, 127
    "81c780000000"  # add edi, 128
    "b8e7000000"  # exit: mov eax, 231 (exit_group)
    "0f05"  # syscall
)


def _elf(code: bytes) -> bytes:
    size = EHDR + PHDR * 2 + len(code)
    entry = BASE + size - len(code)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01", 2, 62, 1, entry, EHDR, 0, 0, EHDR, PHDR, 2, 0, 0, 0,
    )  # fmt: skip
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, BASE, BASE, size, size, 0x1000)  # PT_LOAD, r-x
    stack = struct.pack("<IIQQQQQQ", 0x6474E551, 6, 0, 0, 0, 0, 0, 16)  # PT_GNU_STACK, rw-
    return header + load + stack + code


def pause() -> bytes:
    """A program that sleeps for ever."""
    return _elf(_PAUSE)


def init(pid: int) -> bytes:
    """A program that reaps its children until `pid` ends, and ends with its exit status (128 + n
    when signal n killed it), 255 when it has no child at all."""
    return _elf(bytes.fromhex(_REAP.format(pid=struct.pack("<i", pid).hex())))
