"""Processors that stay awake while somebody may have to wait for one.

An idle processor sleeps, and takes 10 us or more to wake up, a virtual one 60 to 80 (measured: its
host has to run it again). Who waits at a write fault, or stops threads, waits for that each time.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_PATH = "/dev/cpu_dma_latency"
_NONE = struct.pack("i", 0)
"""No latency is allowed, in us: the idle loop polls (Documentation/power/pm_qos_interface.rst)."""


@contextmanager
def awake() -> Iterator[None]:
    """For the length of the block no processor sleeps, where this process may ask for that (root)
    and the kernel can (CPU_IDLE). It ends with this process, too."""
    asked = None
    with suppress(OSError):
        asked = os.open(_PATH, os.O_WRONLY | os.O_CLOEXEC)
        os.write(asked, _NONE)
    try:
        yield
    finally:
        if asked is not None:
            os.close(asked)
