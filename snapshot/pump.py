"""Faults first, then the background sweep; saved chunks go to the store beside them.

The fault path is C in a thread of its own (kernel/native/pump.c) that holds no Python lock.
Storing threads take what it has saved, in batches, to a sink that hashes, compresses and writes.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from .errors import KernelError, SnapError, TakeError
from .gate import Gate
from .kernel import procfs
from .kernel._native import ffi, lib
from .kernel.background import Background
from .kernel.busy import Busy
from .kernel.closing import Closing
from .kernel.errnames import error_text
from .kernel.fault_list import FaultList
from .kernel.reading import Reading
from .kernel.urgency import urgent
from .kernel.watchdog import Watchdog
from .pace import Pace
from .regions import Plan
from .tracer import Tracer
from .units import CHUNK, MIB, mib
from .worker import Worker, clear_frames
from .writer import RawChunk
from .wrprotect import WriteProtection

BATCH = 64
"""Chunks that a storing thread takes at once: one at a time costs 30 % (DESIGN section 6)."""
MEMORY = 192 * MIB
MEMORY_LEAST = 4 * MIB
TOUCHED = 8 * MIB
MADV_POPULATE_WRITE = 23  # Linux 5.14, not in the mmap module
NEXT_MS = 200
AWAIT_MS = 100
BEAT_SECONDS = 0.1
MANY_FAULTS = 100
"""Between two calls of `make_way`: the target waits for us, and feels what else we do."""
EMPTY = memoryview(b"")
VERIFY = "SNAP_VERIFY" in os.environ
"""For tests: at T0 what need not be looked at is looked at all the same."""

REASONS: dict[int, str] = {
    lib.SNAP_LOST_UNMAP: "memory was unmapped before it was saved",
    lib.SNAP_LOST_REMOVE: "memory was discarded (madvise) before it was saved",
    lib.SNAP_LOST_UNARMED: "memory lost its protection before it was saved",
    lib.SNAP_LOST_GONE: "the process ended, or called exec, before its memory was saved",
    lib.SNAP_LOST_SHARED: "shared memory was mapped once more (mremap) before it was saved",
    lib.SNAP_LOST_GROWN: "a mapping of shared memory grew over what another shows",
    lib.SNAP_LOST_UNLISTED: "memory was written, and no page fault told of it",
    lib.SNAP_LOST_STALLED: "the store took nothing for so long that the process was let go",
}


class Counters(NamedTuple):
    """What the pump has done so far; bytes, chunks of 64 KiB, messages (native/pump.h)."""

    armed_bytes: int
    wanted_bytes: int
    saved_bytes: int
    ahead_bytes: int
    stopped_bytes: int
    remainder_bytes: int
    faults: int
    fault_chunks: int
    fault_pages: int
    sweep_chunks: int
    spilled_chunks: int
    events: int
    forks: int
    forks_ahead: int
    objects_left: int
    looked_chunks: int
    listed: int
    stalls: int
    peak_staging_bytes: int


class Round(NamedTuple):
    """What a round ahead of T0 did, in bytes. `next`: pages of which is known that they were
    written meanwhile, and `next_chunks` the chunks that they are in, each of which costs the store
    as much as it did the first time. `outrun`: it was given up, writers were faster. `written`:
    where writers wait for nobody, pages that had been written since the last look."""

    copied: int
    next: int
    next_chunks: int
    outrun: bool
    written: int


class LostError(TakeError):
    """Bytes of T0 are gone for good: this T0 is impossible, another may work.

    `final`: no other will (the process ended, the store stands still).
    """

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason, "snap take PID")
        self.final = final


class OutrunError(TakeError):
    """Writers that wait for nobody are too fast for what has to be copied in the pause."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, "snap take PID --writers wait")


class Staging:
    """The fixed memory that saved chunks wait in: `slots` of 64 KiB, shared with no child.

    `spill`: directory for the file, without a name, that takes what the memory cannot hold.
    """

    def __init__(self, size: int, spill: Path) -> None:
        self.slots = max(size, MEMORY_LEAST) // CHUNK
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        try:
            self.memory = mmap.mmap(-1, self.slots * CHUNK, flags=flags)
        except (OSError, OverflowError, ValueError):
            raise KernelError(
                f"{mib(size)} of staging memory are not to be had", "snap take PID --memory 256M"
            ) from None
        # A fork (a hook's command) must not make every slot copy-on-write.
        self.memory.madvise(mmap.MADV_DONTFORK)
        # What the pause copies goes to the low slots: touched now, it costs no faults then.
        self.memory.madvise(MADV_POPULATE_WRITE, 0, min(len(self.memory), TOUCHED))
        self.view = memoryview(self.memory)
        self.spill = os.open(spill, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.slots * CHUNK

    def close(self) -> None:
        os.close(self.spill)
        self.view.release()
        self.memory.close()


class Pump(Closing):
    """Saves the memory of one process. Use as a context manager; see native/pump.h for the order.

    `watchdog` is told that the fault thread goes on, `tracer` when everything is saved; `stall`:
    seconds that a writer of the target waits at most for the store to make room, before the take is
    given up. The fault thread runs before ordinary threads, where that is allowed, and those that
    store after them, in `background`.
    """

    def __init__(
        self,
        pid: int,
        staging: Staging,
        watchdog: Watchdog,
        tracer: Tracer,
        stall: float,
        background: Background,
    ) -> None:
        self.pid = pid
        self._background = background
        self._busy = Busy(pid)
        self._faults = 0  # until the last `make_way`
        self.staging = staging
        self._fds: list[int] = []
        pagemap = self._open(f"/proc/{pid}/pagemap")
        memory = self._open(f"/proc/{pid}/mem")
        made = ffi.new("snap_pump **")
        self._buffer = ffi.from_buffer(staging.memory)
        _check(
            lib.snap_pump_new(
                pid, pagemap, memory, staging.spill, self._buffer, staging.slots, made
            ),
            "pump",
        )
        self._pump: Any = made[0]
        self._protection: WriteProtection | None = None
        self._watchdog = watchdog
        self._tracer = tracer
        lib.snap_pump_watch(
            self._pump, watchdog.handle, tracer.exits.handle, max(1, int(stall * 1000))
        )
        self._runner: Worker | None = None
        self._storers: list[Worker] = []
        self._fault_list: FaultList | None = None
        self._prepared: tuple[Plan, tuple[Any, int]] | None = None
        self.has_time = False
        """Of no descriptor anything has to be asked, as far as is known (`read_beside`)."""
        self.storing = Gate()
        self.passes = False
        """Writers wait for nobody: WriteProtection.passes."""
        self.t0_ticks = 0
        """T0 as the start of a process is counted (proc_pid_stat(5), starttime)."""
        self._result = 0
        self._failure: BaseException | None = None

    def _open(self, path: str) -> int:
        self._fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        return self._fds[-1]

    def rest(self, seconds: float) -> None:
        """Storing pauses, for the target is to stand still and compressors would take processors
        from the stop; waits up to `seconds` for that. Until `rested` no storing thread runs after
        all others: it may hold the interpreter lock."""
        self.storing.close(seconds)  # not hurried yet: its target would feel what they finish
        self._background.hurry()

    def rested(self) -> None:
        self.storing.open()
        self._background.calm()

    def make_way(self) -> None:
        """Ten times a second: while writers wait for us nothing runs where they do, and who of the
        target wakes up does not wait for those that store."""
        busy = self._busy.processors()
        faults, before = self._raw().faults, self._faults
        self._faults = faults
        self._background.keep_off(busy if faults - before >= MANY_FAULTS else frozenset())
        self._background.nudge(busy)

    def store(self, sink: Callable[[Sequence[RawChunk]], None], threads: int) -> None:
        """Start the storing threads. `sink` is called from all of them at once."""
        for number in range(threads):
            self._storers.append(Worker(f"snap-store-{number}", partial(self._store, sink)))

    def pace(self, pace: Pace) -> None:
        """Before `start`: the limit of rounds and of the sweep; a fault is served at once."""
        lib.snap_pump_pace(self._pump, pace.bytes_per_second, pace.percent)

    def start(self) -> None:
        """Start the fault thread, which is held until `release`."""
        self._runner = Worker("snap-faults", self._run)

    # --- ahead of T0 --------------------------------------------------------------------------

    def round(self, report: Callable[[], None], *, patient: bool) -> Round:
        """Protect and copy what has no good copy. `report` is called ten times a second. If it is
        not `patient`, it is given up when writers undo most of it."""
        return self._round(lambda pump: lib.snap_pump_order_round(pump, patient), report)

    def last_round(self, report: Callable[[], None]) -> Round:
        """The same, whatever the pace: T0 waits for it."""
        return self._round(lib.snap_pump_order_last_round, report)

    def listed_round(self, report: Callable[[], None]) -> None:
        """The same of what `list_faults` lists, if that does: some 0.3 ms, whatever the size."""
        if self._fault_list is not None:
            self._round(lib.snap_pump_order_listed_round, report)

    def written(self, report: Callable[[], None]) -> int:
        """Where writers wait for nobody: protect what is not -> bytes that were written since the
        last look."""
        return self._round(lib.snap_pump_order_written, report).written

    def arm(self, report: Callable[[], None], *, throttled: bool = False) -> Round:
        """Protect what is not. What is not copied yet, or not any more, is saved after T0.
        `throttled`: who writes meanwhile waits for up to a millisecond each time."""
        return self._round(lambda pump: lib.snap_pump_order_arm(pump, throttled), report)

    def _round(self, order: Callable[[Any], int], report: Callable[[], None]) -> Round:
        self._order(order)
        done = self._await(report)
        chunks = done.next_chunks * CHUNK
        return Round(
            done.copied_bytes, done.next_bytes, chunks, bool(done.outrun), done.written_bytes
        )

    def _order(self, order: Callable[[Any], int]) -> None:
        self._answered(order(self._pump), "order to the fault thread")

    def _await(self, report: Callable[[], None]) -> Any:
        """Waits until the order is done -> snap_pump_round."""
        done = ffi.new("snap_pump_round *")
        result = 0
        while result == 0:
            result = lib.snap_pump_await(self._pump, AWAIT_MS, done)
            if result == 0:
                return done
            if result == -errno.ETIMEDOUT:
                report()
                result = 0
        return self._answered(result, "order to the fault thread")

    def _answered(self, result: int, what: str, hint: str = "") -> int:
        """`_check` of what the fault thread was to do."""
        if result == -errno.EPIPE:
            self._ended()
        return _check(result, what, hint)

    def _ended(self) -> NoReturn:
        """The fault thread has ended before its time."""
        assert self._runner is not None
        self._runner.join()
        self.result()
        raise SnapError("saving was cancelled")

    def list_faults(self, faults: FaultList, pages_each: int, quiet: float) -> None:
        """Where writers wait for nobody: two looks later (`last_round`, `written`) T0 looks at what
        is listed, and not at all, if that is at most a chunk for `pages_each` pages, and no event
        has come for `quiet` seconds; after it that is proved. `faults` is closed after this
        pump."""
        lib.snap_pump_list(self._pump, faults.ring, pages_each, int(quiet * 1000))
        self._fault_list = faults

    def open(self, addresses: Sequence[int]) -> None:
        """What is written to the pages at these addresses waits for nobody."""
        array = ffi.new("uint64_t[]", list(addresses))
        self._order(lambda pump: lib.snap_pump_order_open(pump, array, len(addresses)))
        self._await(lambda: None)

    # --- the target is stopped ----------------------------------------------------------------

    def attach(self, protection: WriteProtection) -> None:
        """Before the first plan, once. `protection` is closed with the end of the fault thread."""
        uffd = protection.uffd.fd
        info = self._open(f"/proc/self/fdinfo/{uffd}")
        self._protection = protection
        self._watchdog.know(uffd)
        lib.snap_pump_attach(self._pump, uffd, info)
        lib.snap_pump_clears(self._pump, protection.clear_child_tid)
        if protection.empties:
            lib.snap_pump_cover(self._pump, VERIFY)
        if protection.passes:
            lib.snap_pump_pass(self._pump)
        self.passes = protection.passes

    def read_beside(self, reading: Reading) -> None:
        """Where writers wait for nobody: the fault thread is to read the descriptors when it has
        looked. Before that is ordered; `forget_reading` afterwards. (Elsewhere it must serve
        writers: fdinfo of an epoll waits for who waits for his page.)"""
        if self.passes:
            self.has_time = reading.look_ahead()
            lib.snap_pump_errand(self._pump, *reading.errand)

    def order_look(self, most: int) -> None:
        """Where writers wait for nobody: the fault thread shall look at what they have written, and
        copy it if it is at most `most` bytes. This is T0 for them: what is written from here on is
        so on behalf of the caller."""
        if self.passes:
            self._order(lambda pump: lib.snap_pump_order_look(pump, most))

    def await_reading(self) -> None:
        """It has read, if it was to, or the caller has: `Reading.listed`."""
        lib.snap_pump_await_errand(self._pump)

    def forget_reading(self) -> None:
        """Its memory may go."""
        lib.snap_pump_forget_errand(self._pump)

    def assist(self) -> None:
        """The caller takes his share of that look, if it goes on, and there are no descriptors that
        he will have to ask."""
        if self.has_time:
            lib.snap_pump_assist(self._pump)

    @property
    def handle(self) -> Any:
        """For C: snap_pump *."""
        return self._pump

    def forget_look(self) -> None:
        """A look was ordered for a T0 that was none, and the target runs: none is good any more."""
        lib.snap_pump_order_hold(self._pump)  # if it is not held, or about to be
        self.await_hold()
        self.release()

    def order_hold(self) -> None:
        """The fault thread shall answer what waits, and stand still until `release` or `go`."""
        self._order(lib.snap_pump_order_hold)

    def await_hold(self) -> None:
        """It stands still."""
        self._await(lambda: None)

    def release(self) -> None:
        """The fault thread goes on, still ahead of T0."""
        lib.snap_pump_release(self._pump)

    @contextmanager
    def held(self) -> Iterator[None]:
        """It stands still for the length of the block."""
        self.order_hold()
        self.await_hold()
        try:
            yield
        finally:
            self.release()

    @property
    def stale(self) -> bool:
        """Whether memory was unmapped or moved since the plan: another is due."""
        return bool(self._raw().stale)

    def prepare(self, plan: Plan, objects: dict[int, int]) -> None:
        """Before the target is stopped: for this plan."""
        self._prepared = plan, _windows(plan, objects)

    def plan(self, plan: Plan, objects: dict[int, int], *, registered: bool = False) -> None:
        """What to save, in place of an earlier plan; registers what can be armed, if that is not
        `registered`. `objects`: SharedObject.id → descriptor to read it from, open until the
        end."""
        ready = self._prepared if self._prepared and self._prepared[0] is plan else None
        windows, count = ready[1] if ready else _windows(plan, objects)
        address = ffi.new("uint64_t *")
        result = lib.snap_pump_plan(self._pump, windows, count, registered, address)
        _check(result, f"registering the memory at {address[0]:#x}", f"snap check {self.pid}")

    def settle(
        self,
        most: int,
        *,
        copies: bool,
        cover: bool,
        touched: Sequence[int],
        meanwhile: Callable[[], None],
    ) -> bool:
        """This is T0. Finds what has no good copy: copies it if it is at most `most` bytes, else
        what of it cannot be armed, and arms the rest. `copies`: whether those of before count;
        `cover`: whether nothing can have taken protection off without an event, so that not all
        need be looked at; `touched`: addresses that may have been written since `order_look`.
        `meanwhile` is called while the fault thread does it. -> whether anything
        is unsaved now, or to be proved. Where writers wait for nobody all is copied now;
        OutrunError: that is more than `most`."""
        trust = lib.SNAP_TRUST_COPIES * copies | lib.SNAP_TRUST_COVER * cover
        if self.passes:
            array = ffi.new("uint64_t[]", touched)
            _check(lib.snap_pump_touched(self._pump, array, len(touched)), self._copying)
        self._order(lambda pump: lib.snap_pump_order_settle(pump, most, trust))
        try:
            meanwhile()
        finally:
            result = lib.snap_pump_await_settled(self._pump)
        return self.settled(result)

    def settled(self, result: int) -> bool:
        """As `settle`, where the fault thread was told to by somebody else, and came to `result`;
        the target may run on already."""
        if result == -errno.E2BIG:
            raise OutrunError(f"{mib(self._raw().remainder_bytes)} had been written again at T0")
        unsaved = self._answered(result, self._copying, "snap check") > 0
        if VERIFY and (raw := self._raw()).missed_pages:
            raise SnapError(
                f"{raw.missed_pages} pages have changed and nothing told of it: at "
                f"{raw.missed_address:#x} found {raw.missed_found:#x} known {raw.missed_known:#x}"
            )
        self.t0_ticks = int(time.clock_gettime(time.CLOCK_BOOTTIME) * procfs.CLOCK_TICKS)
        return unsaved

    @property
    def _copying(self) -> str:
        return f"copying memory of process {self.pid}"

    def go(self) -> None:
        """From here on first writes are waited for: before the target runs on."""
        lib.snap_pump_go(self._pump)

    # --- while the target runs ----------------------------------------------------------------

    def saved(self, seconds: float) -> bool:
        """Whether the fault thread has ended, and the target been let go; waits up to `seconds`."""
        assert self._runner is not None
        return self._runner.wait(seconds)

    @property
    def complete(self) -> bool:
        """After `saved` was true: whether everything is."""
        return self._result == 0

    def shows(self, start: int, end: int) -> bool:
        """After `saved` was true: whether [start, end) of the target is known as mapping a shared
        object. What is not has come, or grown, after T0, and no event told of it."""
        return bool(lib.snap_pump_shows(self._pump, start, end))

    def wait(self, seconds: float) -> bool:
        """Whether everything is saved and stored; waits up to `seconds` for it."""
        return all(one.wait(seconds) for one in (self._runner, *self._storers) if one is not None)

    def result(self) -> None:
        """After `wait` was true: raises LostError or what went wrong, if anything did."""
        if self._failure is not None:
            raise self._failure
        if self._result == -errno.ENODATA:
            raw = self._raw()
            reason = REASONS.get(raw.lost_reason, f"reason {raw.lost_reason}")
            raise LostError(
                f"{reason} ({mib(raw.lost_bytes)} from {raw.lost_address:#x})",
                final=raw.lost_reason in (lib.SNAP_LOST_GONE, lib.SNAP_LOST_STALLED),
            )
        _check(self._result, f"saving the memory of process {self.pid}")

    def counters(self) -> Counters:
        raw = self._raw()
        values = {name: getattr(raw, name) for name in Counters._fields[:-1]}
        return Counters(**values, peak_staging_bytes=raw.peak_slots * CHUNK)

    def _raw(self) -> Any:
        raw = ffi.new("snap_pump_counters *")
        lib.snap_pump_stats(self._pump, raw)
        return raw

    def _run(self) -> None:
        """The target is let go as soon as the fault thread ends: the store may still take long."""
        try:
            with urgent(), self._background.beside():
                self._result = lib.snap_pump_run(self._pump)
        finally:
            if self._protection is not None:
                self._protection.close()
            if self._fault_list is not None:
                self._fault_list.end()
            while not self._tracer.let_go(BEAT_SECONDS):
                self._watchdog.beat()
            self._watchdog.rest()

    def _store(self, sink: Callable[[Sequence[RawChunk]], None]) -> None:
        with self._background:
            self._store_all(sink)

    def _store_all(self, sink: Callable[[Sequence[RawChunk]], None]) -> None:
        saved = ffi.new("snap_saved[]", BATCH)
        while True:
            count = lib.snap_pump_next(self._pump, saved, BATCH, NEXT_MS)
            if count == -errno.EPIPE:
                return
            if count == 0:
                continue
            try:
                with self.storing:
                    if self._failure is None:
                        sink([self._chunk(saved[i]) for i in range(count)])
            except BaseException as error:  # of any kind: it is raised again by result()
                clear_frames(error)
                self._failure = self._failure or error
                lib.snap_pump_stop(self._pump)
            lib.snap_pump_done(self._pump, saved, count)

    def _chunk(self, saved: Any) -> RawChunk:
        place = saved.place
        if not saved.pages:
            data = EMPTY
        elif place >= 0:
            data = self.staging.view[place * CHUNK : (place + 1) * CHUNK]
        else:
            data = memoryview(os.pread(self.staging.spill, CHUNK, (-place - 1) * CHUNK))
            if len(data) != CHUNK:
                raise KernelError(f"the spill file gave {len(data)} of {CHUNK} bytes", "df -h")
        patch = saved.patch & ~lib.SNAP_PATCH if saved.patch else None
        return RawChunk(saved.space, saved.address, saved.pages, data, patch)

    def close(self) -> None:
        """Stops the threads if they still run, and frees everything but the uffd."""
        lib.snap_pump_stop(self._pump)
        if self._runner is None:
            lib.snap_pump_end(self._pump)
        self.storing.open()
        with ExitStack() as stack:  # whatever Ctrl-C does, nothing is freed under a thread
            for fd in self._fds:
                stack.callback(os.close, fd)
            stack.callback(ffi.release, self._buffer)
            stack.callback(lib.snap_pump_free, self._pump)
            stack.callback(lambda: clear_frames(self._failure))  # of all threads, now
            for one in (self._runner, *self._storers):
                if one is not None:
                    stack.callback(one.join)


_WINDOW = struct.Struct("=QQQIiIIII")


def _windows(plan: Plan, objects: dict[int, int]) -> tuple[Any, int]:
    """An array of snap_window."""
    packed = b"".join(
        _WINDOW.pack(
            one.start,
            one.end,
            one.at,
            one.space,
            -1 if one.object is None else objects[one.object],
            one.armed,
            one.whole,
            one.huge,
            one.fickle,
        )
        for one in plan.windows
    )
    array = ffi.new("snap_window[]", max(1, len(plan.windows)))
    ffi.memmove(array, packed, len(packed))
    return array, len(plan.windows)


def _check(result: int, what: str, hint: str = "") -> int:
    """A count, or KernelError for -errno."""
    if result >= 0:
        return result
    if result == -errno.ECANCELED:
        raise SnapError(f"{what}: cancelled")
    if result == -errno.ESRCH:
        raise TakeError(f"{what}: the process ended")
    raise KernelError(f"{what}: {error_text(result)}", hint)
