"""Copying ahead of T0: what an attempt has of its target while it still runs.

Memory is protected and copied in rounds, each only what was written since the round before, until
little is left or it stops shrinking. Then the target is stopped: what is left is settled there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace

from . import examine, faults, others
from .errors import DeniedError
from .examine import Examination
from .kernel import procfs
from .kernel.fault_list import FaultList
from .kernel.task_iterator import TaskProgram
from .kernel.warm import warm_others
from .maps import Line
from .pump import LostError, OutrunError, Pump, Round
from .resources import descriptors
from .resources.memfd import SharedMemory
from .units import CHUNK, KIB, MIB, PAGE, align_up, mib
from .wrprotect import WriteProtection

REMAINDER = 512 * KIB
"""Bytes that may be copied while the target stands still: some 0.1 ms. More is armed and copied
when the target runs on."""
EVERYTHING = 1 << 62
SHORT = 32 * MIB
FEW = 2 * MIB
FEWEST = 64 * KIB
FEWEST_CHUNKS = 16 * CHUNK
MANY_CHUNKS = 128 * CHUNK
"""To protect so many takes half a millisecond of the pause: worth it that writers wait."""
ROUNDS = 12
LAST_ROUNDS = 5
LAST_ARMS = 8
LOOKS = 8
SLOW_LOOKS = 3
LOOK_SECONDS = 0.005
"""About what lies between the last round and T0."""
MOST_WRITTEN = 1 * MIB
"""Bytes that are written in that time; more of them wait, and are not let through."""
MOST_LEFT = 2 * MIB
"""… and of those that are let through, that are written while as many are copied."""
MOST_PASSED = 8 * MIB
"""Bytes that are copied in the pause where writers pass: some 4 ms. It is mostly far less."""
LISTED = 512 * MIB
"""Bytes from which on it takes longer to look at all at T0 (0.15 ms) than at what faults list."""
PAGES_EACH = 1024
"""Of all take as long to look at as one chunk that is listed, about."""
QUIET = 1.0
"""Seconds: who has unmapped nothing for so long will hardly do so before the list is proved."""
VAIN = 4
RUNNING_LOOKS = 2
SHRINKS = 0.7
"""A round that would copy more than this part of the one before gains nothing on the writers."""


class Ahead:
    """The pump of an attempt with what it is to save: examined, and kept up to date."""

    def __init__(
        self,
        pump: Pump,
        stack: ExitStack,
        examination: Examination,
        origin: procfs.Stat,
        lister: TaskProgram | None,
    ) -> None:
        """`stack` is closed after the pump. `lister`: faults may be listed with that, and T0 be
        given up because of it."""
        self.pump = pump
        self.examination = examination
        self.rounds = 0
        self.touched: list[int] = []
        """Addresses that are written to, one in a thread, for going on after a stop."""
        self.direct_io = False
        """It had a file open O_DIRECT: a device may have written past the page tables, and nothing
        that was copied counts."""
        self._dirty = EVERYTHING  # what the next round has to copy
        self._objects: dict[int, int] = {}
        self._planned = False
        self._origin = origin
        self._stack = stack
        self._lister = lister
        self._maps = procfs.open_file(pump.pid, "maps")
        stack.callback(os.close, self._maps)
        self._pagemap = procfs.open_file(pump.pid, "pagemap")
        stack.callback(os.close, self._pagemap)

    def prepare(self) -> None:
        """Before the first stop: what `plan` needs, if nothing changes until then."""
        self._open_objects()
        self.pump.prepare(self.examination.plan, self._objects)

    def copy(self, report: Callable[[], None], *, patient: bool) -> None:
        """All rounds. `report` is called ten times a second. If they are not `patient`, and writers
        undo most of it, memory is only protected, and copied once, after T0. Where writers wait for
        nobody: raises OutrunError."""
        if self.pump.passes:
            self._copy_passing(report)
            return
        while self.rounds < ROUNDS:
            faults.point("round-begun")
            done = self._round(report, patient)
            faults.point("round-ended")
            # One that is opened and closed again between two looks is not seen.
            self.direct_io = self.direct_io or descriptors.direct_io(self.pump.pid)
            if self.direct_io:
                return
            if done.outrun:
                self._dirty = EVERYTHING
                return
            if self._dirty <= FEW or self._dirty > done.copied * SHRINKS:
                return

    def _copy_passing(self, report: Callable[[], None]) -> None:
        """One round at the pace of the store; in the others nothing is stored, so they are short
        and few."""
        self._sample(report)
        faults.point("round-begun")
        self._round(report, patient=True)
        faults.point("round-ended")
        self._list_faults()
        self._gain(report)

    def _list_faults(self) -> None:
        if self._lister is None or self.pump.counters().ahead_bytes < LISTED:
            return
        with suppress(OSError):  # all is looked at then
            listed = self._stack.enter_context(FaultList(self._lister, self.pump.pid))
            self.pump.list_faults(listed, PAGES_EACH, QUIET)

    def _sample(self, report: Callable[[], None]) -> None:
        """How fast do they write? Not right after the stop: then they catch up."""
        slow = 0
        self.pump.written(report)
        for _ in range(LOOKS):
            since = time.monotonic()
            time.sleep(LOOK_SECONDS)
            written = int(self.pump.written(report) * LOOK_SECONDS / (time.monotonic() - since))
            slow += written <= MOST_WRITTEN
            if slow == SLOW_LOOKS:
                return
        raise OutrunError(f"{mib(written)} are written in {LOOK_SECONDS * 1000:.0f} ms")

    def _gain(self, report: Callable[[], None]) -> None:
        """Rounds, until two gain nothing on the writers: one may have had to wait for a
        processor."""
        rounds = (self._last_round(report).copied for _ in range(ROUNDS))
        left = _while_it_shrinks(rounds, FEWEST, enough=MOST_LEFT, patience=1)
        self.direct_io = self.direct_io or descriptors.direct_io(self.pump.pid)
        if self.direct_io:
            raise OutrunError("a file is open O_DIRECT: a device writes past the page tables")
        if left > MOST_LEFT:
            raise OutrunError(f"{mib(left)} are written again while they are copied")

    def protect(self, report: Callable[[], None]) -> None:
        """Where much is left, or nothing may be copied ahead, it is only protected: writers are
        held up by their own faults."""
        if not self._copies and not self.pump.passes:
            self.pump.arm(report)

    @property
    def _copies(self) -> bool:
        return self._dirty <= SHORT and not self.direct_io

    def last_rounds(self, report: Callable[[], None]) -> None:
        """While the storing threads rest: what was written meanwhile, again and again, as long as
        that is getting less. Each is a short one, as nothing competes with it; nobody makes room in
        staging now. What is then still too much to be copied in the pause is only protected; where
        writers wait for nobody OutrunError is raised."""
        if self.pump.passes:
            self._gain(report)
            self.pump.listed_round(report)
            return
        if self._copies and self._left_by_copying(report) <= REMAINDER:
            return
        # What one of them takes, and the pause, depends on chunks, however little of each changed.
        if self._arm(report, throttled=False) > MANY_CHUNKS:
            self._arm(report, throttled=True)

    def _arm(self, report: Callable[[], None], *, throttled: bool) -> int:
        arms = (self.pump.arm(report, throttled=throttled).next_chunks for _ in range(LAST_ARMS))
        return _while_it_shrinks(arms, FEWEST_CHUNKS)

    def _left_by_copying(self, report: Callable[[], None]) -> int:
        rounds = (self._last_round(report).next for _ in range(LAST_ROUNDS))
        return _while_it_shrinks(rounds, FEWEST)

    def _round(self, report: Callable[[], None], patient: bool) -> Round:
        self.rounds += 1
        done = self.pump.round(report, patient=patient)
        # What finds no room in staging has to wait for the store, which takes chunks.
        fits = done.next <= self.pump.staging.size
        self._dirty = done.next if fits else done.next_chunks
        return done

    def _last_round(self, report: Callable[[], None]) -> Round:
        self.rounds += 1
        return self.pump.last_round(report)

    def plan(
        self,
        needed: dict[tuple[int, int], SharedMemory] | None = None,
        problems: Sequence[str] = (),
        maps: bytes | None = None,
    ) -> None:
        """With the target stopped, the fault thread held: what is to be saved is what it has now.
        `needed`, `problems`: what its descriptors lead to, where they have been looked at; `maps`:
        its /proc/PID/maps, if that has been read. Raises UnsupportedError."""
        before = self.examination
        now = procfs.read_again(self._maps) if maps is None else maps
        if problems or not before.holds(before.needed if needed is None else needed, now):
            self._examine_again(needed, problems)
        elif self._planned and not self.pump.stale:
            return
        self._plan()

    def plan_running(self, protection: WriteProtection) -> bool:
        """The same while the target runs, of a process of which only private memory is armed.
        False: it changed too much; it has to be stopped.

        Registered is all that lies between mappings of other kinds, holes included: what grows just
        then does so within that. Then what is mapped is read, and seen to be registered: from then
        on events tell of each change, and nothing can be mapped that looks the same and is not.
        """
        self._planned = False
        if not self._is_current():
            self._examine_again()
        if not protection.register(self.examination.plan.runs()):
            return False
        for _ in range(RUNNING_LOOKS):
            # In this order. Meanwhile who unmaps something waits until that can be told.
            armed = [one.start for one in self.examination.plan.windows if one.armed]
            if self._is_current() and protection.registered(self._pagemap, armed):
                break
            self._examine_again()
        else:
            return False
        self._plan(registered=True)
        return True

    def catch_up(self, protection: WriteProtection) -> None:
        """Shortly before T0, where writers wait for nobody: what was mapped or unmapped since the
        plan, if anything was. Else all would have to be examined in the pause, and what is new be
        copied there."""
        if self._is_current() and not self.pump.stale:
            return
        self._examine_again()  # while nobody waits for us
        with self.pump.held():
            self.plan_running(protection)

    def warm(self) -> None:
        """What is copied in the pause because it cannot be armed is used shortly before."""
        windows = self.examination.plan.windows
        ranges = ((one.start, one.end) for one in windows if not one.armed and one.object is None)
        warm_others(self.pump.pid, self._pagemap, ranges)

    def _is_current(self) -> bool:
        """Whether the target, which runs, still is as it was when it was examined."""
        before = self.examination
        return before.holds(before.needed, procfs.read_again(self._maps))

    def _examine_again(
        self,
        needed: dict[tuple[int, int], SharedMemory] | None = None,
        problems: Sequence[str] = (),
    ) -> None:
        self.examination = examine.examine(self.pump.pid, needed, self.examination)
        examine.refuse(self.pump.pid, self.examination.plan, list(problems))

    def _plan(self, *, registered: bool = False) -> None:
        self._planned = True
        self._open_objects()
        self.pump.plan(self.examination.plan, self._objects, registered=registered)

    @property
    def known_maps(self) -> bytes:
        """/proc/PID/maps as it has to be for the plan to fit at T0, where nothing else decides
        that; nothing: more does."""
        now = self.examination
        simple = self._planned and not (now.needed or now.plan.objects or self.direct_io)
        return now.maps if simple else b""

    def look_for_others(self, *, forks: bool) -> None:
        """While it runs, registered: who can write to its shared memory although nobody could when
        it was examined? From here on children are told of (`forks`; without that nothing is sure).
        What others have is not armed at T0."""
        armed = self.examination.plan.armed_objects
        found = others.having(self.pump.pid, armed) if forks else armed
        if found:
            elsewhere = self.examination.elsewhere | found
            self.examination = replace(self.examination, maps=b"", elsewhere=elsewhere)

    def look_back(self) -> None:
        """Everything is saved. Raises LostError if somebody can write to shared memory that was
        armed who could not before: what he has written meanwhile, nothing told of."""
        plan, pid, done = self.examination.plan, self.pump.pid, self.pump.counters()
        armed = plan.armed_objects
        if not armed or done.forks_ahead:
            return  # with children before T0 it was copied in the pause
        if done.objects_left:
            if others.written(pid, armed):
                raise LostError("shared memory was opened for writing before it was saved")
            for line in others.mapped(pid, armed):
                # Behind the end of the object at T0 there was nothing.
                behind = align_up(plan.objects[line.device, line.inode].size, PAGE) - line.offset
                if not self.pump.shows(line.start, min(line.end, line.start + behind)):
                    raise LostError(f"shared memory was mapped once more ({line.start:#x})")
        before = others.Before(
            self._origin, plan.mappings, self.pump.t0_ticks, done.forks > 0, done.objects_left > 0
        )
        for other, how in others.new(before, armed):
            raise LostError(f"process {other} {how} shared memory that it did not when it began")

    def _open_objects(self) -> None:
        for number, source in self.examination.plan.object_source.items():
            if number not in self._objects:
                self._objects[number] = _open_object(self.pump.pid, source, self._stack)


def _while_it_shrinks(
    rounds: Iterable[int], few: int, *, enough: int = EVERYTHING, patience: int = 0
) -> int:
    """Rounds, each of which says how much was written meanwhile, as long as that gets less, and is
    not yet `few` -> how much it was in the last one. More than `patience` that gain nothing end it,
    if it is `enough`; more than VAIN in any case."""
    least = left = EVERYTHING
    vain = 0
    for left in rounds:
        vain += left > least * SHRINKS
        if left <= few or (vain > patience and left <= enough) or vain > VAIN:
            break
        least = min(least, left)
    return left


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
