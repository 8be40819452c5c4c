"""A file that is mapped here, as memory that others count as ours (native/forget.c)."""

from __future__ import annotations

import os

from ._native import lib


def forget_file(fd: int) -> int:
    """Takes what is mapped, shared and read only, of the file out of our page tables: it stays in
    the page cache, and can be read as before. Nobody may map or unmap it meanwhile. Returns how
    many mappings there were; a file system may hide its own numbers, then it is none."""
    wanted = str(os.fstat(fd).st_ino).encode()
    path = os.readlink(f"/proc/self/fd/{fd}").encode()
    count = 0
    with open("/proc/self/maps", "rb") as maps:
        for line in maps:
            place, permissions, _, _, inode, *name = line.split(None, 5)
            if inode == wanted and permissions == b"r--s" and name and name[0].rstrip() == path:
                start, end = (int(part, 16) for part in place.split(b"-"))
                count += lib.snap_forget(start, end) == 0
    return count
