"""The writes of a process that fault, listed by the kernel: native/fault_list.h."""

from __future__ import annotations

import os
from typing import Any

from ._native import ffi, lib
from .closing import Closing
from .task_iterator import TaskProgram


class FaultList(Closing):
    """Of `pid`, from here on until `end`. OSError: this kernel lists none, or not for us."""

    def __init__(self, program: TaskProgram, pid: int) -> None:
        self._made = ffi.new("snap_fault_list **")
        result = program.list_faults(pid, self._made)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        self.ring: Any = lib.snap_fault_list_ring(self._made[0])
        """For C: snap_fault_ring *, until `close`."""

    def end(self) -> None:
        """Nothing more is listed."""
        lib.snap_fault_list_end(self._made[0])

    def close(self) -> None:
        lib.snap_fault_list_close(self._made[0])
