"""T0 in one call of C (native/instant.h), for the ordinary process whose writers wait for nobody.

Made step by step it is Python that runs once, after seconds of other work: half of the pause. So
what is ordinary is decided beforehand, C sees that it is so, and all of it is understood when the
target runs on. Whatever is not as expected makes no T0, but a stop of less than a millisecond.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from . import faults
from .freeze import DEFERRED, LATE_SECONDS, RESTARTED, Frozen
from .kernel import arch_x86_64 as arch
from .kernel import procfs, ptrace
from .kernel._native import ffi, lib
from .kernel.closing import Closing
from .kernel.ptrace import STOP_TIMEOUT, LateError, Reaper, Tracee
from .kernel.touched import touched
from .kernel.urgency import urgent
from .pump import Pump
from .resources.capture import Gathered, Preparation

log = logging.getLogger("snap")

_POINTS: dict[int, tuple[faults.Point, ...]] = {
    lib.SNAP_WHEN_STOPPED: ("second-stop",),
    lib.SNAP_WHEN_CAPTURED: ("captured", "clean-again"),
    lib.SNAP_WHEN_HELD: ("held",),
    lib.SNAP_WHEN_SETTLED: ("settled",),
    lib.SNAP_WHEN_GONE: ("let-go",),
}
_STAGES = {
    "freeze": (lib.SNAP_WHEN_TOLD, lib.SNAP_WHEN_STOPPED),
    "capture": (lib.SNAP_WHEN_STOPPED, lib.SNAP_WHEN_CAPTURED),
    "descriptors": (lib.SNAP_WHEN_CAPTURED, lib.SNAP_WHEN_LISTED),
    "maps": (lib.SNAP_WHEN_LISTED, lib.SNAP_WHEN_HELD),
    "settle": (lib.SNAP_WHEN_HELD, lib.SNAP_WHEN_SETTLED),
    "letting go": (lib.SNAP_WHEN_SETTLED, lib.SNAP_WHEN_GONE),
}
_WHY = {
    lib.SNAP_NOT_THREADS: "threads came or ended",
    lib.SNAP_NOT_LATE: "a thread did not stop in time",
    lib.SNAP_NOT_PLACES: "a thread was on its way home",
    lib.SNAP_NOT_ANSWERS: "threads are not alike, or have to be asked",
    lib.SNAP_NOT_STATEMENT: "the process has changed since it was asked",
    lib.SNAP_NOT_FILES: "a signal waits, or a file of /proc is not as it was",
    lib.SNAP_NOT_TABLE: "descriptors have to be asked",
    lib.SNAP_NOT_MAPS: "it has mapped or unmapped memory",
    lib.SNAP_NOT_PUMP: "the fault thread has ended",
}


class Taken(NamedTuple):
    """A T0 that was."""

    taken_at: float
    gathered: Gathered
    stays: bool
    """One thread is seized still: something is unsaved, or has to be proved."""
    stopped_us: int
    stages_us: dict[str, int]


class Instant(Closing):
    """Made while the target runs; `take` once, by the thread that is to be its tracer."""

    def __init__(
        self,
        pump: Pump,
        first: Frozen,
        prepared: Preparation,
        maps: bytes,
        most: int,
        *,
        stay: bool,
    ) -> None:
        """If `is_ordinary`. `maps`: /proc/PID/maps as it has to be; `most`: as of `Pump.settle`;
        `stay`: one thread, if anything is unsaved. TargetError: it is gone."""
        assert prepared.statement is not None
        assert prepared.outside is not None
        assert prepared.record is not None
        assert first.guarded is not None
        pid, most_threads = first.pid, prepared.states.most
        self._pump, self._first, self._prepared = pump, first, prepared
        self.stopped_us = 0
        """Of a stop that was no T0 as well."""
        self.may_do = False
        """It was no T0, and another one may be: something changed just then."""
        self._folder = procfs.open_file(pid, "task")
        made = self._made = ffi.new("snap_instant *")
        self._registers = touched(most_threads * arch.REGISTERS_SIZE)
        self._marks = touched(most_threads)
        self._code = touched(most_threads * ffi.sizeof("snap_code"))
        self._tids = touched(most_threads * ffi.sizeof("int"))
        self._stops = touched(most_threads * ffi.sizeof("int"))
        files = prepared.files
        self._known = maps, files.now("ksm_stat") or b""
        made.pid, made.folder, made.most = pid, self._folder, most_threads
        made.again, made.timeout_us = ptrace.call_set(RESTARTED), int(STOP_TIMEOUT * 1e6)
        made.guard, made.guard_end = first.guarded.start, first.guarded.stop
        made.pump, made.most_bytes, made.stays = pump.handle, most, stay
        prepared.outside.lend(made, prepared.questions.place[0])
        prepared.statement.lend(made, prepared.record)
        made.reading = prepared.reading.handle
        made.status_at = files.place("status")
        names = (made.maps, "maps"), (made.merges, "ksm_stat")
        for (known, name), text in zip(names, self._known, strict=True):
            known.at, known.text, known.length = files.place(name), ffi.from_buffer(text), len(text)
        made.tids = ffi.from_buffer("int[]", self._tids)
        made.stops = ffi.from_buffer("int[]", self._stops)
        made.registers = ffi.from_buffer("unsigned char[]", self._registers)
        made.marks = ffi.from_buffer("unsigned char[]", self._marks)
        made.code = ffi.from_buffer("snap_code[]", self._code)
        prepared.states.lend(made)
        self._point: Any = ffi.NULL
        if faults.ARMED is not None:
            self._point = ffi.callback("void(int)", _at)
        made.point = self._point

    @staticmethod
    def is_ordinary(pump: Pump, first: Frozen, prepared: Preparation, maps: bytes) -> bool:
        """Whether T0 can be made so, as far as can be told while the target runs."""
        if not (maps and pump.passes and pump.has_time and prepared.statement and prepared.record):
            return False
        facts = prepared.questions.facts
        waits = facts.status.mask("SigPnd") | facts.status.mask("ShdPnd")
        merges = procfs.mergeable(facts.pid, prepared.files.now("ksm_stat"))
        return first.guarded is not None and not (waits or facts.nested or merges)

    def take(self) -> Taken | None:
        """None: it is no T0, and the target runs on. OutrunError, LateError, KernelError."""
        made = self._made
        with _undisturbed(), Reaper(made.pid) as reaper, urgent():
            made.reaper = reaper.handle
            why = lib.snap_instant_take(made)
        self._note_stops()
        if made.times_us[lib.SNAP_WHEN_TOLD]:
            self.stopped_us = self._between(lib.SNAP_WHEN_TOLD, lib.SNAP_WHEN_GONE)
        if why:
            log.info("%d: no T0 in one call: %s", made.pid, _WHY[why])
            self.may_do = why in (lib.SNAP_NOT_MAPS, lib.SNAP_NOT_THREADS)
            if made.ordered and why != lib.SNAP_NOT_PUMP:
                self._pump.forget_look()
            return None
        self._pump.settled(made.settled)
        threads = [Tracee(tid, ptrace.TRACESYSGOOD) for tid in made.tids[0 : made.count]]
        threads[0].stop = made.leader_stop  # says whether somebody has stopped the process
        code = {
            one.tid: (code.start, bytes(code.bytes)[: code.length])
            for one, code in zip(threads, made.code[0 : made.count], strict=True)
            if code.length
        }
        registers = bytes(self._registers[: made.count * arch.REGISTERS_SIZE])
        marks = bytes(self._marks[: made.count])
        frozen = Frozen.over(self._first, threads, registers, marks, code)
        return Taken(
            taken_at=made.taken_ns / 1e9,
            gathered=Gathered.over(frozen, self._prepared),
            stays=made.seized >= 0,
            stopped_us=self.stopped_us,
            stages_us={name: self._between(*times) for name, times in _STAGES.items()},
        )

    def _between(self, since: int, until: int) -> int:
        return int(self._made.times_us[until] - self._made.times_us[since])

    def _note_stops(self) -> None:
        """Of threads that have ended while they were ours, or did not stop. Raises LateError."""
        made = self._made
        stops = dict(zip(made.tids[0 : made.count], made.stops[0 : made.count], strict=True))
        ended = [tid for tid, stop in stops.items() if stop == -errno.ESRCH]
        if ended:
            ptrace.reap(ended)
        late = [tid for tid, stop in stops.items() if stop == -errno.ETIMEDOUT]
        if late and not (error := LateError(late, STOP_TIMEOUT)).let_go(LATE_SECONDS):
            raise error

    def close(self) -> None:
        os.close(self._folder)


def _at(time: int) -> None:
    for name in _POINTS.get(time, ()):
        faults.point(name)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No exception comes in between."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, DEFERRED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
