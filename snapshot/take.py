"""Taking a snapshot: freeze → arm → pump → store.

The target stops twice, each time for about a millisecond: once to make its userfaultfd, once for
T0. Nothing here waits for the target, and whatever goes wrong it runs on: the last close of its
userfaultfd, wherever this process ends, releases all that was armed.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from . import examine
from .errors import DeniedError, TakeError
from .examine import Examination
from .freeze import Frozen, freeze
from .hooks import Hooks
from .image import Image
from .kernel import procfs, vdso
from .manifest import Host, Manifest, Process, TakeStats
from .maps import Line
from .pump import MEMORY, Counters, LostError, Pump, Staging
from .records import ProcessIdentity
from .regions import Plan
from .resources import Gathered, descriptors, gather
from .resources.memfd import SharedMemory
from .stats import Progress, ProgressCallback, Stopwatch
from .store import Store
from .writer import ImageWriter
from .wrprotect import WriteProtection

ATTEMPTS = 3
"""The last one copies everything in the pause: it cannot lose anything, at the cost of the pause
following the size."""
PROGRESS_SECONDS = 0.1

log = logging.getLogger("snap")


@dataclass(slots=True)
class _Take:
    """One `take`, all its attempts."""

    pid: int
    name: str
    store: Store
    staging: Staging
    hooks: Hooks
    progress: ProgressCallback | None
    clock: Stopwatch = field(default_factory=Stopwatch)
    reasons: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Instant:
    """What the pause yields."""

    taken_at: float
    process: Process
    plan: Plan
    gathered: Gathered
    pause_us: int
    stages_us: dict[str, int]


def take(
    pid: int,
    *,
    store: Store | Path | None = None,
    name: str | None = None,
    memory: int = MEMORY,
    hooks: Hooks | None = None,
    progress: ProgressCallback | None = None,
    attempts: int = ATTEMPTS,
) -> Image:
    """Take an image of the running process `pid` and return it, committed.

    `memory`: bytes of staging. `attempts`: how often a new T0 is tried when memory of the last one
    was lost (unmapped before it was saved); the last copies everything in the pause.
    Raises TargetError, DeniedError, UnsupportedError (before anything is touched), StoreError,
    HookError (a hook failed before T0), TakeError. The target runs on in every case.
    """
    hooks = hooks or Hooks(installed=False)
    with ExitStack() as stack:
        if not isinstance(store, Store):
            store = Store.open(store, create=True)
            stack.callback(store.close)
        examine.target(pid)
        name = name or default_name(pid)
        staging = Staging(memory)
        stack.callback(staging.close)
        job = _Take(pid, name, store, staging, hooks, progress)
        with _reported(job):
            hooks.run("before-freeze", pid=pid, image=name)
            for attempt in range(1, attempts + 1):
                if _attempt(job, everything=attempt > 1 and attempt == attempts):
                    break
            else:
                raise TakeError(
                    f"no exact image of process {pid} in {attempts} attempts: "
                    + "; ".join(job.reasons),
                    f"snap take {pid} --attempts {attempts + 1}",
                )
        hooks.run("committed", pid=pid, image=name)
        return store.image(name)


def default_name(pid: int) -> str:
    """`redis-server-4711-20261123-141503`: what, which, when (local time)."""
    comm = procfs.comm(pid).decode("utf-8", "replace")
    readable = "".join(c if c.isalnum() or c in "._-" else "-" for c in comm).strip("-.") or "pid"
    return f"{readable}-{pid}-{time.strftime('%Y%m%d-%H%M%S')}"


@contextmanager
def _reported(job: _Take) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        job.hooks.run("failed", pid=job.pid, image=job.name, error=error)
        raise


def _attempt(job: _Take, *, everything: bool) -> bool:
    """One T0. False when its memory could not all be saved but another T0 may do."""
    before = examine.examine(job.pid)
    examine.refuse(job.pid, before.plan)
    identity = ProcessIdentity(procfs.boot_id(), job.pid, procfs.stat(job.pid).start_ticks)
    with ExitStack() as stack:
        writer = stack.enter_context(job.store.begin(job.name, identity))
        protection, first, stops = None, None, []
        if not everything:
            with freeze(job.pid) as first:
                protection = stack.enter_context(WriteProtection.create(first))
            stops.append(first.stopped_us)
        pumping = _Pumping(job, stack, protection, writer)
        try:
            pumping.prepare(before)
            instant = _instant(job, pumping, before, first)
            stops.append(instant.pause_us)
            if not everything:
                pumping.store()
            job.hooks.run("resumed", pid=job.pid, image=job.name)
            _wait(job, pumping.pump)
        except LostError as error:
            log.info("%d: %s", job.pid, error.message)
            if error.gone:
                raise
            job.reasons.append(error.message)
            return False
        stats = _stats(job, pumping.pump.counters(), instant, stops, writer)
        writer.commit(_manifest(job, instant, stats))
    return True


class _Pumping:
    """The pump of an attempt. It is made for a plan, and made anew when the plan has changed."""

    def __init__(
        self,
        job: _Take,
        stack: ExitStack,
        protection: WriteProtection | None,
        writer: ImageWriter,
    ) -> None:
        self.job = job
        self.uffd = -1 if protection is None else protection.uffd.fd
        self.writer = writer
        self._stack = stack.enter_context(ExitStack())
        self.pump: Pump

    def prepare(self, examination: Examination) -> None:
        """A pump for this plan; nothing is touched yet."""
        self._stack.close()
        plan, pid = examination.plan, self.job.pid
        objects = {
            number: _open_object(pid, source, self._stack)
            for number, source in plan.object_source.items()
        }
        pump = Pump(pid, self.uffd, self.job.staging, self.job.store.path)
        self.pump = self._stack.enter_context(pump)
        pump.add(plan, objects)

    def store(self) -> None:
        """Let saved chunks go to the store, with all cores."""
        self.pump.store(self.writer.put, os.cpu_count() or 1)


def _open_object(pid: int, source: Line | SharedMemory, stack: ExitStack) -> int:
    """A shared object, opened anew: the target's own descriptor would share its offset."""
    if isinstance(source, Line):
        path = f"/proc/{pid}/map_files/{source.start:x}-{source.end:x}"
    else:
        path = f"/proc/{pid}/fd/{source.fd}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        raise DeniedError(
            f"shared memory of process {pid} may not be opened ({path})", f"sudo snap take {pid}"
        ) from None
    except FileNotFoundError:
        raise LostError(f"{path} was unmapped or closed before the pause") from None
    stack.callback(os.close, fd)
    return fd


def _instant(
    job: _Take, pumping: _Pumping, examination: Examination, first: Frozen | None
) -> _Instant:
    """The pause. Injected calls come first: once armed, nothing may run in the target until the
    fault thread does. `first` is the stop that made the userfaultfd; without one all is copied."""
    clock = Stopwatch()
    everything = first is None
    with freeze(job.pid, earlier=first) as frozen:
        clock.stages_us["freeze"] = frozen.freeze_us
        with clock.stage("capture"):
            gathered = gather(frozen)
            frozen.close_remote()
        with clock.stage("descriptors"):
            files, table, problems = descriptors.capture(frozen.pid, frozen.pidfd)
        with clock.stage("maps"):
            needed = descriptors.needed(files, table)
            if problems or not examination.holds(needed):
                examination = examine.examine(job.pid, needed)
                examine.refuse(job.pid, examination.plan, problems)
                pumping.prepare(examination)
        pump = pumping.pump
        if everything:
            pumping.store()  # else after the pause: compressors would take its processor
        with clock.stage("scan"):
            pump.scan()
        with clock.stage("copy"):
            pump.save_stopped(everything)
        with clock.stage("arm"):
            if everything:
                pump.end()
            else:
                pump.register()
                pump.arm()
                pump.start()
        taken_at = time.time()
        with clock.stage("hooks"):
            job.hooks.run("frozen", pid=job.pid, image=job.name)
    process = gathered.process(
        0, mappings=tuple(examination.plan.mappings), files=files, descriptors=table
    )
    return _Instant(
        taken_at, process, examination.plan, gathered, frozen.stopped_us, clock.stages_us
    )


def _wait(job: _Take, pump: Pump) -> None:
    """Until all is saved and stored; the target runs. Raises what went wrong."""
    while not pump.wait(PROGRESS_SECONDS):
        if job.progress is not None:
            job.progress(_progress(job, pump))
    if job.progress is not None:
        job.progress(_progress(job, pump))
    pump.result()


def _progress(job: _Take, pump: Pump) -> Progress:
    now = pump.counters()
    return Progress("saving", now.saved_bytes, now.wanted_bytes, now.faults, job.clock.seconds)


def _stats(
    job: _Take, done: Counters, instant: _Instant, stops: list[int], writer: ImageWriter
) -> TakeStats:
    return TakeStats(
        threads=len(instant.process.threads),
        regions=len(instant.plan.windows),
        pause_us=sum(stops),
        longest_stop_us=max(stops),
        armed_bytes=done.armed_bytes,
        saved_bytes=writer.saved_bytes,
        stored_bytes=writer.stored_bytes,
        faults=done.faults,
        fault_chunks=done.fault_chunks,
        sweep_chunks=done.sweep_chunks,
        spilled_chunks=done.spilled_chunks,
        events=done.events,
        attempts=len(job.reasons) + 1,
        retry_reasons=tuple(job.reasons),
        seconds=job.clock.seconds,
        peak_staging_bytes=done.peak_staging_bytes,
        stages_us=instant.stages_us,
    )


def _manifest(job: _Take, instant: _Instant, stats: TakeStats) -> Manifest:
    plan = instant.plan
    return Manifest(
        image=job.name,
        taken_at=instant.taken_at,
        host=Host(
            boot_id=procfs.boot_id(),
            kernel=platform.release(),
            machine=platform.machine(),
            vdso=vdso.digest(),
        ),
        processes=(instant.process,),
        files=tuple(plan.files.values()),
        objects=tuple(plan.objects.values()),
        stats=stats,
        warnings=(*plan.warnings, *instant.gathered.warnings()),
    )
