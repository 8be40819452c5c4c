"""Taking a snapshot: freeze → ahead → T0 → pump → store.

One thread of the target stops for an instant, and a thread of ours makes its userfaultfd; where
that does not do, all stop for it. At T0 all stop, for about a millisecond. Between the two its
memory is copied ahead while it runs; after T0 what is left is saved at its first write or by the
sweep. Nothing here waits for the target, and whatever goes wrong it runs on:
the last close of its userfaultfd, wherever this process ends, releases all that was armed.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from . import examine, faults
from .ahead import EVERYTHING, MOST_PASSED, REMAINDER, Ahead
from .errors import TakeError, TargetError
from .freeze import RESTARTED, Frozen, freeze
from .hooks import Hooks
from .image import Image
from .instant import Instant
from .kernel import procfs, vdso
from .kernel.awake import awake
from .kernel.background import Background
from .kernel.exits import Exits
from .kernel.fdcalls import reserve
from .kernel.ptrace import Tracee, child_signals, rseq_addresses
from .kernel.refusal import capable
from .kernel.remote import NOTHING, SCRATCH_SIZE, Interview, data_area
from .kernel.room import Room, find_room
from .kernel.task_iterator import TaskProgram
from .kernel.warm import warm_ours
from .kernel.watchdog import Watchdog
from .manifest import Host, Manifest, Process, TakeStats
from .maps import gap
from .pace import ANY, Pace
from .pump import MEMORY, LostError, OutrunError, Pump, Staging
from .records import ProcessIdentity
from .regions import Plan
from .resources import descriptors, preflight
from .resources.capture import Gathered, Preparation, gather
from .resources.inquiry import Answers
from .resources.statement import Statement
from .stats import Progress, ProgressCallback, Stopwatch
from .store import Store, check_name
from .tracer import Tracer
from .units import PAGE
from .visit import visiting
from .writer import ImageWriter
from .wrprotect import MAKING, WriteProtection, shows_empty_pages

ATTEMPTS = 3
STALL = 10.0
GATE_SECONDS = 0.05
PROGRESS_SECONDS = 0.1
QUICK_TRIES = 2
"""In one call; then T0 is made step by step."""
DESCRIPTORS = 1024
"""More than a take has open: not in the pause must their table grow."""

log = logging.getLogger("snap")


Guard = Literal["auto", "always", "never"]
Writers = Literal["auto", "wait", "pass"]


@dataclass(slots=True)
class _Take:
    """One `take`, all its attempts."""

    pid: int
    name: str
    store: Store
    staging: Staging
    hooks: Hooks
    progress: ProgressCallback | None
    now: bool
    stall: float
    pace: Pace
    writers: Writers
    program: TaskProgram
    outrun: bool = False
    """Writers were let through, and were too fast."""
    clock: Stopwatch = field(default_factory=Stopwatch)
    reasons: list[str] = field(default_factory=list)
    stops_us: list[int] = field(default_factory=list)


class _Place(NamedTuple):
    """Where calls can be made in the target, and memory for them be mapped."""

    room: Room
    scratch: int


class _Pause(NamedTuple):
    """What was found while the target stood still."""

    taken_at: float
    gathered: Gathered
    table: descriptors.Capture
    stopped_us: int


@dataclass(slots=True)
class _Instant:
    """What the pause yields."""

    taken_at: float
    process: Process
    plan: Plan
    gathered: Gathered
    stages_us: dict[str, int]


def take(
    pid: int,
    *,
    store: Store | Path | None = None,
    name: str | None = None,
    memory: int = MEMORY,
    hooks: Hooks | None = None,
    progress: ProgressCallback | None = None,
    now: bool = False,
    guard: Guard = "auto",
    writers: Writers = "auto",
    stall: float = STALL,
    pace: Pace = ANY,
    attempts: int = ATTEMPTS,
) -> Image:
    """Take an image of the running process `pid` and return it, committed.

    `memory`: bytes of staging. `now`: T0 at once and everything copied after it; otherwise memory
    is copied ahead, and T0 is when little is left to be copied. What is left may be lost, if the
    target unmaps it before it is saved. `guard`: "always" copies it while the target stands still,
    so that nothing can be lost; "auto" does so when another T0 has to be tried, at most `attempts`
    times in all; "never" raises TakeError instead. `writers`: what a first write does. "pass": it
    waits for nobody; what was written is copied again until little is left, and that in the pause,
    after which nothing can be lost (with much memory, and unless `guard` is "always", after some
    milliseconds more), or TakeError is raised. "wait": for its page to be saved.
    "auto" lets pass who is slow enough for that. `stall`: seconds that the target waits at most
    for a store that makes no progress, or at its end for what is unsaved (TakeError), or for this
    process, which is ended when it stands still for so long. `pace` limits what is copied that
    nobody waits for; memory stays protected, and can be lost, for longer then.
    Raises TargetError, DeniedError, UnsupportedError (before anything is touched), StoreError,
    HookError (a hook failed before T0), TakeError. The target runs on in every case.
    """
    hooks = hooks or Hooks(installed=False)
    with ExitStack() as stack:
        stack.enter_context(child_signals())
        reserve(DESCRIPTORS)
        program = stack.enter_context(TaskProgram())  # loads while the rest is prepared
        if not isinstance(store, Store):
            store = Store.open(store, create=True)
            stack.callback(store.close)
        examine.target(pid)
        name = name or store.free_name(default_name(pid))
        check_name(name)
        staging = Staging(memory, store.path)
        stack.callback(staging.close)
        if now and writers == "pass":
            raise ValueError("with `now` writers have to wait")
        job = _Take(pid, name, store, staging, hooks, progress, now, stall, pace, writers, program)
        with _reported(job):
            hooks.run("before-freeze", pid=pid, image=name)
            if guard == "never":
                attempts = 1
            while not _attempt(
                job, guarded=guard == "always" or bool(job.reasons), last=attempts == 1
            ):
                if len(job.reasons) == attempts:
                    raise TakeError(
                        f"no exact image of process {pid} in {attempts} attempts: "
                        + "; ".join(job.reasons),
                        f"snap take {pid} --guard always",
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


def _attempt(job: _Take, *, guarded: bool, last: bool) -> bool:
    """One T0. False when its memory could not all be saved but another T0 may do, or writers are
    not to be let through any more. What is proved only after T0 is relied on if it is neither
    `guarded` nor the `last`."""
    before = examine.examine(job.pid)
    examine.refuse(job.pid, before.plan)
    foreign = preflight.namespaces(job.pid)
    shares = bool(before.plan.armed_objects)
    origin = procfs.stat(job.pid)
    identity = ProcessIdentity(procfs.boot_id(), job.pid, origin.start_ticks)
    background = Background()
    scratch = gap([(one.start, one.end) for one in before.plan.mappings], SCRATCH_SIZE)
    with ExitStack() as stack:
        writer = stack.enter_context(job.store.begin(job.name, identity, background))
        watchdog = stack.enter_context(Watchdog(job.pid, job.stall))
        exits = stack.enter_context(Exits(job.pid, job.stall, RESTARTED))
        tracer = stack.enter_context(Tracer(exits, job.pid))
        after_pump = stack.enter_context(ExitStack())  # what is closed when it has ended
        pump = stack.enter_context(
            Pump(job.pid, job.staging, watchdog, tracer, job.stall, background)
        )
        pump.pace(job.pace)
        waited_for = stack.enter_context(ExitStack())  # while the target may wait for us
        if job.pace == ANY:
            waited_for.enter_context(awake())
        lister = None if guarded or last else job.program
        ahead = Ahead(pump, after_pump, before, origin, lister)
        pump.start()
        # A device writes past the page tables to memory that it was given before.
        copying = (bool(job.reasons) or not job.now) and not descriptors.direct_io(job.pid)
        passes = _passes(job, before.plan, copying)
        try:
            faults.point("begun")
            ahead.prepare()
            statement = _statement(job, scratch, after_pump)
            room = find_room(Tracee(job.pid, 0))
            place = _Place(room, scratch)
            first, protection = None, None
            if passes:
                warm_ours()
                first, protection = _visit(job, ahead, statement, place, after_pump)
            if first is None or protection is None:
                first, protection = _stop(
                    job, ahead, statement, place, after_pump, first, forks=shares, passes=passes
                )
            faults.point("first-resumed")
            pump.store(writer.put, os.cpu_count() or 1)
            ahead.look_for_others(forks=protection.forks)
            if copying:
                ahead.copy(lambda: _report(job, pump, "copying ahead"), patient=guarded)
            most = MOST_PASSED if protection.passes else EVERYTHING if guarded else REMAINDER
            instant = _instant(job, ahead, first, protection, most, tracer, statement)
            faults.point("resumed")
            job.hooks.run("resumed", pid=job.pid, image=job.name)
            _await_saved(job, ahead)
            waited_for.close()
            _await_stored(job, ahead)
            faults.point("saved")
        except OutrunError as error:
            log.info("%d: %s", job.pid, error.message)
            if job.writers == "pass":
                raise
            job.outrun = True
            return False
        except LostError as error:
            log.info("%d: %s", job.pid, error.message)
            if error.final:
                raise
            job.reasons.append(error.message)
            return False
        stats = _stats(job, ahead, guarded and not protection.passes, instant, writer)
        writer.commit(_manifest(job, instant, stats, foreign))
    return True


def _passes(job: _Take, plan: Plan, copying: bool) -> bool:
    """Whether writers are let through: what is copied ahead can be relied on, nothing is armed of
    which only a fault tells, and little is copied in the pause whatever it is."""
    if job.writers == "wait" or job.outrun:
        return False
    others = [one for one in plan.windows if one.object is not None or one.whole]
    armed = any(one.armed for one in others) or any(one.huge for one in plan.windows)
    allowed = copying and shows_empty_pages() and not armed
    if allowed and sum(one.end - one.start for one in others) <= MOST_PASSED // 2:
        return True
    if job.writers == "pass":
        raise TakeError(
            f"process {job.pid} has memory (shared, huge pages, or written by a device) whose "
            "writers have to wait, or CAP_SYS_ADMIN is missing",
            f"snap take {job.pid}",
        )
    return False


def _visit(
    job: _Take,
    ahead: Ahead,
    statement: Statement | None,
    place: _Place,
    held: ExitStack,
) -> tuple[Frozen | None, WriteProtection | None]:
    """The userfaultfd, and what it is to tell of, with one thread stopped in place of all -> the
    last stop, if there was any, and None where that is all that came of it."""
    pump = ahead.pump
    host: Frozen | None = None
    with ExitStack() as made:
        try:
            with visiting(job.pid, *place) as visit:
                host = visit.host
                if host is not None:
                    job.stops_us.append(host.stopped_us)
                if visit.guest is None:
                    return host, None
                protection = made.enter_context(
                    WriteProtection.create(visit.guest, passes=True, empties=True)
                )
                faults.point("created")
                if statement is not None:
                    statement.make_running(visit.guest)
        except TargetError:
            # Our thread was killed: so was the process, or it is another program now.
            return host, None
        held.enter_context(made.pop_all())
    faults.point("clean")
    pump.attach(protection)
    if ahead.plan_running(protection):
        faults.point("registered")
        pump.release()
        return host, protection
    pump.release()
    with freeze(job.pid, earlier=host) as frozen, pump.held():
        ahead.plan()
    job.stops_us.append(frozen.stopped_us)
    return frozen, protection


def _stop(
    job: _Take,
    ahead: Ahead,
    statement: Statement | None,
    place: _Place,
    held: ExitStack,
    earlier: Frozen | None,
    *,
    forks: bool,
    passes: bool,
) -> tuple[Frozen, WriteProtection]:
    """The same with all of it stopped."""
    pump = ahead.pump
    with freeze(job.pid, earlier=earlier, room=place.room, scratch=place.scratch) as first:
        faults.point("first-stop")
        made = _make(first, statement)
        protection = held.enter_context(
            WriteProtection.create(
                first,
                forks=forks,
                passes=passes,
                empties=shows_empty_pages(),
                fetched=made.fetched if made is not None else None,
            )
        )
        faults.point("created")
        if statement is not None:
            _state(first, statement, made)
        first.close_remote()
        faults.point("clean")
        if not passes:
            ahead.touched = rseq_addresses(first.threads)
        pump.attach(protection)
        ahead.plan()  # what is registered tells of its events
        faults.point("registered")
        pump.release()
    job.stops_us.append(first.stopped_us)
    return first, protection


def _statement(job: _Take, scratch: int, held: ExitStack) -> Statement | None:
    """None: this kernel does not tell whether it holds."""
    if job.program.error == 0:
        with suppress(OSError):
            return held.enter_context(Statement(job.pid, job.program, data_area(scratch)))
    return None


def _make(first: Frozen, statement: Statement | None) -> Interview | None:
    """The userfaultfd, and what the statement needs, in one go; None: step by step."""
    asked = statement.look(first) if statement is not None else NOTHING
    if asked is None:
        return None
    return first.make(MAKING, asked, statement.status_text if statement is not None else b"")


def _state(first: Frozen, statement: Statement, made: Interview | None) -> None:
    """`made`: what has been answered when the userfaultfd was made, if anything has."""
    if made is None:
        statement.make(first)
        return
    (_, *results), data = made.of(0)
    statement.note(Answers.single(results, data))


def _instant(
    job: _Take,
    ahead: Ahead,
    first: Frozen,
    protection: WriteProtection,
    most: int,
    tracer: Tracer,
    statement: Statement | None,
) -> _Instant:
    """`first` is the stop that made the userfaultfd, and `statement` was made in it."""
    pump = ahead.pump
    ahead.protect(lambda: _report(job, pump, "protecting"))
    pump.rest(GATE_SECONDS)
    most += len(ahead.touched) * PAGE
    clock = Stopwatch()

    with ExitStack() as held:

        def ready(
            quickly: bool, report: Callable[[], None]
        ) -> tuple[Preparation, Instant | None]:
            """What is needed in a stop, and last what changes all the time."""
            prepared = held.enter_context(Preparation(job.pid, first.data, statement))
            pump.forget_reading()
            pump.read_beside(prepared.reading)
            held.callback(pump.forget_reading)
            warm_ours()
            if pump.passes:
                ahead.catch_up(protection)
                ahead.warm()
            quick = _quick(job, ahead, first, prepared, most) if quickly else None
            if quick is not None:
                held.enter_context(quick)
            ahead.last_rounds(report)
            # A thread that goes on, also from one injected call to the next, would wait for its
            # page.
            if not pump.passes:
                pump.open(ahead.touched)
            return prepared, quick

        def stop() -> _Pause:
            (prepared, quick), tries = made, 1
            pump.listed_round(lambda: None)
            while quick is not None:
                taken = quick.take()
                if taken is not None:
                    clock.stages_us |= taken.stages_us
                    if taken.stays:
                        faults.point("stays")
                    # Of none of them anything is asked, so there is no pidfd.
                    table = descriptors.Capture(job.pid, -1, prepared.reading)
                    return _Pause(taken.taken_at, taken.gathered, table, taken.stopped_us)
                job.stops_us.append(quick.stopped_us)
                # Nothing of the caller's runs in this thread.
                prepared, quick = ready(quick.may_do and tries < QUICK_TRIES, lambda: None)
                tries += 1
            return _pause(job, ahead, first, prepared, most, tracer, clock)

        made = ready(True, lambda: _report(job, pump, "protecting"))
        pause = tracer.run(stop)
    job.stops_us.append(pause.stopped_us)
    pump.rested()
    plan = ahead.examination.plan
    files, table = pause.table.complete()
    if pause.table.refused:
        examine.refuse(job.pid, plan, pause.table.refused)
    if pause.table.lost:  # a file was renamed or deleted just then
        raise LostError("; ".join(pause.table.lost))
    process = pause.gathered.process(
        0, mappings=tuple(plan.mappings), files=files, descriptors=table
    )
    return _Instant(pause.taken_at, process, plan, pause.gathered, clock.stages_us)


def _quick(
    job: _Take, ahead: Ahead, first: Frozen, prepared: Preparation, most: int
) -> Instant | None:
    """None: T0 has to be made step by step."""
    pump, maps = ahead.pump, ahead.known_maps
    if job.hooks.wants("frozen") or not Instant.is_ordinary(pump, first, prepared, maps):
        return None
    return Instant(pump, first, prepared, maps, most, stay=capable())


def _pause(
    job: _Take,
    ahead: Ahead,
    first: Frozen,
    prepared: Preparation,
    most: int,
    tracer: Tracer,
    clock: Stopwatch,
) -> _Pause:
    """Made by the tracer, which stays when something is unsaved at the end: threads that end then
    wait for that. Injected calls come first, while the fault thread still serves: the kernel writes
    to the target's memory for them."""
    pump = ahead.pump
    files = prepared.files
    # With a tracer that lacks the capability an execve of the target would not be setuid.
    allowed = capable()
    watched = job.hooks.wants("frozen")
    with freeze(job.pid, earlier=first) as frozen:
        faults.point("second-stop")
        pump.order_look(most)
        clock.stages_us["freeze"] = frozen.freeze_us
        with clock.stage("capture"):
            gathered = gather(frozen, prepared)
            faults.point("captured")
            frozen.close_remote()
            faults.point("clean-again")
            pump.order_hold()
            gathered.read_states()
            pump.assist()
            touched = rseq_addresses(frozen.threads) if gathered.asked else []
            files.look()
        with clock.stage("descriptors"):
            pump.await_reading()
            table = descriptors.Capture(frozen.pid, frozen.pidfd, prepared.reading)
            if pump.passes:  # it still looks; else it has more to do when it settles
                table.ask()
        with clock.stage("maps"):
            pump.await_hold()
            ahead.plan(table.needed, table.problems, files.beside("maps"))
            faults.point("held")
        with clock.stage("settle"):

            def meanwhile() -> None:
                if not pump.passes:
                    table.ask()
                gathered.complete()

            direct_io = ahead.direct_io or table.direct_io
            cover = not procfs.mergeable(job.pid, files.beside("ksm_stat"))
            unsaved = pump.settle(
                most,
                copies=not direct_io,
                cover=cover,
                touched=touched,
                meanwhile=meanwhile,
            )
        taken_at = time.time()
        faults.point("settled")
        if watched:
            with clock.stage("hooks"):
                tracer.elsewhere(lambda: job.hooks.run("frozen", pid=job.pid, image=job.name))
        stays = unsaved and allowed
        if stays:
            frozen.stay()
        pump.go()
        faults.point("let-go")
    if stays:
        faults.point("stays")
    return _Pause(taken_at, gathered, table, frozen.stopped_us)


def _await_saved(job: _Take, ahead: Ahead) -> None:
    """The target runs on meanwhile. Raises what went wrong."""
    pump = ahead.pump
    while not pump.saved(PROGRESS_SECONDS):
        _report(job, pump, "saving")
    if pump.complete:
        ahead.look_back()


def _await_stored(job: _Take, ahead: Ahead) -> None:
    """The target has nothing to do with it any more. Raises what went wrong."""
    pump = ahead.pump
    while not pump.wait(PROGRESS_SECONDS):
        _report(job, pump, "storing")
    _report(job, pump, "storing")
    pump.result()


def _report(job: _Take, pump: Pump, phase: str) -> None:
    pump.make_way()
    if job.progress is not None:
        now = pump.counters()
        whole = max(now.wanted_bytes, now.saved_bytes)
        job.progress(Progress(phase, now.saved_bytes, whole, now.faults, job.clock.seconds))


def _stats(
    job: _Take,
    ahead: Ahead,
    guarded: bool,
    instant: _Instant,
    writer: ImageWriter,
) -> TakeStats:
    done = ahead.pump.counters()
    return TakeStats(
        threads=len(instant.process.threads),
        regions=len(instant.plan.windows),
        pause_us=sum(job.stops_us),
        longest_stop_us=max(job.stops_us),
        armed_bytes=done.armed_bytes,
        rounds=ahead.rounds,
        ahead_bytes=done.ahead_bytes,
        remainder_bytes=done.remainder_bytes,
        guarded=guarded,
        writers="pass" if ahead.pump.passes else "wait",
        listed=bool(done.listed),
        saved_bytes=writer.saved_bytes,
        stored_bytes=writer.stored_bytes,
        faults=done.faults,
        fault_chunks=done.fault_chunks,
        fault_pages=done.fault_pages,
        sweep_chunks=done.sweep_chunks,
        spilled_chunks=done.spilled_chunks,
        events=done.events,
        attempts=len(job.reasons) + 1,
        retry_reasons=tuple(job.reasons),
        seconds=job.clock.seconds,
        peak_staging_bytes=done.peak_staging_bytes,
        stages_us=instant.stages_us,
    )


def _manifest(job: _Take, instant: _Instant, stats: TakeStats, foreign: list[str]) -> Manifest:
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
        warnings=(*plan.warnings, *plan.costs, *instant.gathered.warnings(), *foreign),
    )
