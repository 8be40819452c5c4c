"""What this machine allows, found out by doing it: reasons to skip a test, or None."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from fcntl import ioctl
from functools import cache

NR_USERFAULTFD = 323  # x86-64
UFFDIO_API, UFFDIO_REGISTER, UFFDIO_WRITEPROTECT = 0xC018AA3F, 0xC020AA00, 0xC018AA06
FEATURES = 1 << 0 | 1 << 13  # PAGEFAULT_FLAG_WP, WP_UNPOPULATED
UFFD_WP_BIT = 1 << 57  # of a pagemap entry


@cache
def why_no_root() -> str | None:
    return None if os.geteuid() == 0 else "not root: sudo -E make test"


@cache
def why_no_write_protect() -> str | None:
    """Write-protects an empty page of our own and looks whether it is."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(NR_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        return f"userfaultfd(2): {os.strerror(ctypes.get_errno())}; snap check says more"
    area = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        page = ctypes.c_char.from_buffer(area)
        start = ctypes.addressof(page)
        ioctl(fd, UFFDIO_API, bytearray(struct.pack("QQQ", 0xAA, FEATURES, 0)))
        ioctl(fd, UFFDIO_REGISTER, bytearray(struct.pack("QQQQ", start, mmap.PAGESIZE, 2, 0)))
        ioctl(fd, UFFDIO_WRITEPROTECT, bytearray(struct.pack("QQQ", start, mmap.PAGESIZE, 1)))
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            raw = os.pread(pagemap.fileno(), 8, start // mmap.PAGESIZE * 8)
            entry = int.from_bytes(raw, "little")
        del page
    except OSError as error:
        return f"no userfaultfd write-protect here ({error}); snap check says more"
    finally:
        os.close(fd)
        area.close()
    return None if entry & UFFD_WP_BIT else "write-protect of an empty page does not stick"
