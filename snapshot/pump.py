"""Faults first, then the background sweep; saved chunks go to the store beside them.

The fault path is C in a thread of its own (kernel/native/pump.c) that holds no Python lock.
Storing threads take what it has saved, in batches, to a sink that hashes, compresses and writes.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from .errors import KernelError, SnapError, TakeError
from .kernel._native import ffi, lib
from .kernel.errnames import error_text
from .regions import Plan
from .store import RawChunk
from .units import CHUNK, MIB, mib

BATCH = 64
"""Chunks that a storing thread takes at once: one at a time costs 30 % (DESIGN section 6)."""
MEMORY = 256 * MIB
MEMORY_LEAST = 4 * MIB
TOUCHED = 8 * MIB
MADV_POPULATE_WRITE = 23  # Linux 5.14, not in the mmap module
WAIT_MS = 200

REASONS: dict[int, str] = {
    lib.SNAP_LOST_UNMAP: "memory was unmapped before it was saved",
    lib.SNAP_LOST_REMOVE: "memory was discarded (madvise) before it was saved",
    lib.SNAP_LOST_UNARMED: "memory lost its protection before it was saved",
    lib.SNAP_LOST_GONE: "the process ended, or called exec, before its memory was saved",
}


class Counters(NamedTuple):
    """What the pump has done so far; bytes, chunks of 64 KiB, messages (native/pump.h)."""

    armed_bytes: int
    wanted_bytes: int
    saved_bytes: int
    stopped_bytes: int
    faults: int
    fault_chunks: int
    sweep_chunks: int
    spilled_chunks: int
    events: int
    stalls: int
    peak_staging_bytes: int


class LostError(TakeError):
    """Bytes of T0 are gone for good: this T0 is impossible, another may work.

    `gone`: the process ended, so no other will.
    """

    def __init__(self, reason: str, *, gone: bool = False) -> None:
        super().__init__(reason, "snap take PID")
        self.gone = gone


class Staging:
    """The fixed memory that saved chunks wait in: `slots` of 64 KiB, shared with no child."""

    def __init__(self, size: int) -> None:
        self.slots = max(size, MEMORY_LEAST) // CHUNK
        self.memory = mmap.mmap(-1, self.slots * CHUNK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # A fork (a hook's command) must not make every slot copy-on-write.
        self.memory.madvise(mmap.MADV_DONTFORK)
        # What the pause copies goes to the low slots: touched now, it costs no faults then.
        self.memory.madvise(MADV_POPULATE_WRITE, 0, min(len(self.memory), TOUCHED))
        self.view = memoryview(self.memory)

    def close(self) -> None:
        self.view.release()
        self.memory.close()


class Pump:
    """Saves the memory of one process. Use as a context manager; see native/pump.h for the order.

    `uffd` -1: nothing can be armed, everything is saved in the pause. `spill`: directory for the
    file that takes what staging cannot hold.
    """

    def __init__(self, pid: int, uffd: int, staging: Staging, spill: Path) -> None:
        self.pid = pid
        self.staging = staging
        self._fds: list[int] = []
        self._spill = os.open(spill, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        self._fds.append(self._spill)
        pagemap = self._open(f"/proc/{pid}/pagemap")
        memory = self._open(f"/proc/{pid}/mem")
        info = self._open(f"/proc/self/fdinfo/{uffd}") if uffd >= 0 else -1
        made = ffi.new("snap_pump **")
        self._buffer = ffi.from_buffer(staging.memory)
        _check(
            lib.snap_pump_new(
                pid, uffd, info, pagemap, memory, self._spill, self._buffer, staging.slots, made
            ),
            "pump",
        )
        self._pump: Any = made[0]
        self._runner: threading.Thread | None = None
        self._storers: list[threading.Thread] = []
        self._result = 0
        self._failure: BaseException | None = None

    def _open(self, path: str) -> int:
        self._fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        return self._fds[-1]

    # --- before and in the pause --------------------------------------------------------------

    def add(self, plan: Plan, objects: dict[int, int]) -> None:
        """All windows of the plan. `objects`: SharedObject.id → descriptor to read it from."""
        areas = {}
        for space, start, end in plan.areas():
            number = _check(lib.snap_pump_add_area(self._pump, space, start, end), "area")
            areas[space, start] = (end, number)
        ordered = sorted(areas)
        position = 0
        for window in sorted(plan.windows, key=lambda w: (w.space, w.at)):
            while areas[ordered[position]][0] <= window.at or ordered[position][0] != window.space:
                position += 1
            source = -1 if window.object is None else objects[window.object]
            _check(
                lib.snap_pump_add_window(
                    self._pump,
                    areas[ordered[position]][1],
                    window.start,
                    window.end,
                    window.at,
                    window.armed,
                    source,
                    4096,
                ),
                f"window {window.start:#x}-{window.end:#x}",
            )
        _check(lib.snap_pump_ready(self._pump), "ledger")
        for window in plan.windows:
            if window.whole:
                _check(lib.snap_pump_want(self._pump, window.start, window.end), "want")

    def register(self) -> None:
        """Register what will be armed. The target is stopped, and `start` must follow."""
        address = ffi.new("uint64_t *")
        result = lib.snap_pump_register(self._pump, address)
        _check(result, f"registering the memory at {address[0]:#x}", f"snap check {self.pid}")

    def scan(self) -> None:
        """Find the pages that hold something. The target is stopped."""
        _check(lib.snap_pump_scan(self._pump), "PAGEMAP_SCAN", "snap check")

    def save_stopped(self, everything: bool = False) -> None:
        """Copy now what will not be armed. The target is stopped."""
        _check(lib.snap_pump_save_stopped(self._pump, everything), f"copying memory of {self.pid}")

    def arm(self) -> None:
        """Write-protect all armed windows: T0. The target is stopped."""
        _check(lib.snap_pump_arm(self._pump), "UFFDIO_WRITEPROTECT")

    # --- while the target runs ----------------------------------------------------------------

    def store(self, sink: Callable[[Sequence[RawChunk]], None], threads: int) -> None:
        """Start the storing threads. `sink` is called from all of them at once."""
        for number in range(threads):
            thread = threading.Thread(
                target=self._store, args=(sink,), name=f"snap-store-{number}", daemon=True
            )
            self._storers.append(thread)
            thread.start()

    def start(self) -> None:
        """Start the fault thread: before the target runs again."""
        self._runner = threading.Thread(target=self._run, name="snap-faults", daemon=True)
        self._runner.start()

    def end(self) -> None:
        """Nothing was armed: what was saved in the pause is all."""
        lib.snap_pump_end(self._pump)

    def wait(self, seconds: float) -> bool:
        """Whether everything is saved and stored; waits up to `seconds` for it."""
        for thread in (self._runner, *self._storers):
            if thread is not None:
                thread.join(seconds)
                if thread.is_alive():
                    return False
        return True

    def result(self) -> None:
        """After `wait` was true: raises LostError or what went wrong, if anything did."""
        if self._failure is not None:
            raise self._failure
        if self._result == -errno.ENODATA:
            raw = self._raw()
            reason = REASONS.get(raw.lost_reason, f"reason {raw.lost_reason}")
            raise LostError(
                f"{reason} ({mib(raw.lost_bytes)} from {raw.lost_address:#x})",
                gone=raw.lost_reason == lib.SNAP_LOST_GONE,
            )
        _check(self._result, f"saving the memory of process {self.pid}")

    def counters(self) -> Counters:
        raw = self._raw()
        return Counters(
            raw.armed_bytes,
            raw.wanted_bytes,
            raw.saved_bytes,
            raw.stopped_bytes,
            raw.faults,
            raw.fault_chunks,
            raw.sweep_chunks,
            raw.spilled_chunks,
            raw.events,
            raw.stalls,
            raw.peak_slots * CHUNK,
        )

    def _raw(self) -> Any:
        raw = ffi.new("snap_pump_counters *")
        lib.snap_pump_stats(self._pump, raw)
        return raw

    def _run(self) -> None:
        self._result = lib.snap_pump_run(self._pump)

    def _store(self, sink: Callable[[Sequence[RawChunk]], None]) -> None:
        saved = ffi.new("snap_saved[]", BATCH)
        while True:
            count = lib.snap_pump_next(self._pump, saved, BATCH, WAIT_MS)
            if count == -errno.EPIPE:
                return
            if count == 0:
                continue
            try:
                if self._failure is None:
                    sink([self._chunk(saved[i]) for i in range(count)])
            except BaseException as error:  # of any kind: it is raised again by result()
                traceback.clear_frames(error.__traceback__)  # they hold views of the staging
                self._failure = self._failure or error
                lib.snap_pump_stop(self._pump)
            lib.snap_pump_done(self._pump, saved, count)

    def _chunk(self, saved: Any) -> RawChunk:
        place = saved.place
        if place >= 0:
            data = self.staging.view[place * CHUNK : (place + 1) * CHUNK]
        else:
            data = memoryview(os.pread(self._spill, CHUNK, (-place - 1) * CHUNK))
            if len(data) != CHUNK:
                raise KernelError(f"the spill file gave {len(data)} of {CHUNK} bytes", "df -h")
        return RawChunk(saved.space, saved.address, saved.pages, data)

    def __enter__(self) -> Pump:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops the threads if they still run, and frees everything but the uffd."""
        lib.snap_pump_stop(self._pump)
        if self._runner is None:
            lib.snap_pump_end(self._pump)
        for thread in (self._runner, *self._storers):
            if thread is not None:
                thread.join()
        lib.snap_pump_free(self._pump)
        ffi.release(self._buffer)
        for fd in self._fds:
            os.close(fd)


def _check(result: int, what: str, hint: str = "") -> int:
    """A count, or KernelError for -errno."""
    if result >= 0:
        return result
    if result == -errno.ECANCELED:
        raise SnapError(f"{what}: cancelled")
    if result == -errno.ESRCH:
        raise TakeError(f"{what}: the process ended")
    raise KernelError(f"{what}: {error_text(result)}", hint)
