"""What /proc says of a stopped process, read to memory that is there: understood when it runs on.

Its descriptors another thread can read meanwhile, one that is not its tracer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import fdtable
from ._native import ffi, lib
from .closing import Closing
from .touched import touched

_LINKS = 3


class Reading(Closing):
    """Made before the process is stopped: where all of it will be. `files`: descriptors of ours, of
    files of /proc that stay open as long as this may be read; `size`: bytes that they may have.
    What has been read stays when this is closed."""

    def __init__(self, pid: int, files: Sequence[int], size: int) -> None:
        """TargetError (gone) or DeniedError."""
        count = len(files)
        self._room = touched(size)
        self._table = touched(fdtable.room_for(pid))
        self._links = touched(_LINKS * lib.SNAP_LINK_MAX)
        self._kept = ffi.new("int[]", files), ffi.new("int64_t[]", count)
        made: Any = ffi.new("snap_reading *")
        self.handle = made
        """For C: snap_reading *."""
        made.pid, made.count, made.size = pid, count, len(self._room)
        made.files, made.ends = self._kept
        made.room = ffi.from_buffer("char[]", self._room)
        made.table, made.table_size = ffi.from_buffer("char[]", self._table), len(self._table)
        made.links = ffi.from_buffer("char[]", self._links)

    def close(self) -> None:
        """Of what was opened for its descriptors."""
        lib.snap_forget_table(self.handle)

    # --- files and links ----------------------------------------------------------------------

    def read(self) -> bool:
        """Reads the files, and the links exe, cwd and root. Whether all could be read."""
        made = self.handle
        lib.snap_read_outline(made)
        ends = made.ends[0 : made.count]
        return bool(made.error == 0 and min(ends) >= 0 and min(made.link_lengths) >= 0)

    def file(self, i: int) -> bytes:
        """Of the i-th, all that was in it."""
        ends = self.handle.ends
        return bytes(self._room[ends[i - 1] if i else 0 : ends[i]])

    @property
    def links(self) -> tuple[bytes, bytes, bytes]:
        """exe, cwd, root."""
        starts, lengths = range(0, len(self._links), lib.SNAP_LINK_MAX), self.handle.link_lengths
        exe, cwd, root = (
            bytes(self._links[at : at + n]) for at, n in zip(starts, lengths, strict=True)
        )
        return exe, cwd, root

    # --- descriptors --------------------------------------------------------------------------

    def look_ahead(self) -> bool:
        """Before the process is stopped: `told`, as it would be now."""
        lib.snap_read_table(self.handle)
        self.handle.listed = 0
        lib.snap_know_table(self.handle)  # it takes longer where that fails
        return self.told

    @property
    def errand(self) -> tuple[Any, Any]:
        """The function of C that reads the descriptors, and its argument."""
        return ffi.addressof(lib, "snap_read_table"), self.handle

    @property
    def listed(self) -> bool:
        """Whether they have been read."""
        return bool(self.handle.listed and self.handle.table_used >= 0)

    @property
    def told(self) -> bool:
        """Whether nobody has to be asked for any of them while the process stands still, and none
        is O_DIRECT."""
        return bool(self.handle.told)

    @property
    def entries(self) -> list[fdtable.Entry]:
        """As of `fdtable.entries`, grouped."""
        return sorted(fdtable.parse(memoryview(self._table)[: self.handle.table_used]))
