"""Interval timers (setitimer) and POSIX timers (timer_create).

Capture: getitimer and timer_gettime answer only to the process itself; /proc/PID/timers lists the
ids, signals and clocks (CONFIG_CHECKPOINT_RESTORE). Rebuild: a timer goes on with the time it had
left; clocks that count CPU time start at zero in a new process, so that is what they need too.

Not put back: the overrun count of the last delivered signal (timer_getoverrun).
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING

from msgspec.structs import replace

from ..errors import KernelError
from ..kernel.arch_x86_64 import NR
from ..kernel.errnames import error_name
from ..kernel.remote import Call
from ..manifest import Record
from .context import Context, attempt
from .inquiry import Answer, Answers, Inquiry

if TYPE_CHECKING:
    from ..kernel.remote import Remote
    from .facts import Facts

NAME = "timers"

ITIMERS = ("real", "virtual", "prof")
"""By their numbers: ITIMER_REAL 0, ITIMER_VIRTUAL 1, ITIMER_PROF 2."""
PAIR = struct.Struct("<qqqq")
"""struct itimerval (seconds, µs) or itimerspec (seconds, ns): interval, then value."""
SIGEVENT = struct.Struct("<Qiii44x")
"""struct sigevent, 64 bytes: value, signal, notify, thread id."""

SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD, SIGEV_THREAD_ID = 0, 1, 2, 4
PR_TIMER_CREATE_RESTORE_IDS = 77  # Linux 6.16 (ec2d0c04624b): timer_create takes the id it is given
THREAD_CLOCK = -2
"""CLOCK_THREAD_CPUTIME_ID as /proc/PID/timers shows it: of the thread that made the timer, which is
not told. (CLOCK_PROCESS_CPUTIME_ID is -6 there; timer_create takes both.)"""
MANY = 1 << 16
"""Without that prctl ids are counted up to by creating and deleting timers; not further."""


class IntervalTimer(Record, frozen=True):
    which: int  # ITIMER_REAL 0, ITIMER_VIRTUAL 1, ITIMER_PROF 2
    interval_us: int
    value_us: int  # time left; 0 with an interval: expired at T0 and due at once


class PosixTimer(Record, frozen=True):
    id: int
    clock: int
    signal: int
    notify: int  # SIGEV_SIGNAL 0, SIGEV_NONE 1, SIGEV_THREAD 2, SIGEV_THREAD_ID 4
    target: int  # tid for SIGEV_THREAD_ID, else the pid
    value: int  # sigev_value
    interval_ns: int
    value_ns: int  # time left, 0: disarmed unless it has an interval


class State(Record, frozen=True):
    intervals: tuple[IntervalTimer, ...]  # the armed ones
    posix: tuple[PosixTimer, ...]


# --- capture -------------------------------------------------------------------------------------

_LISTED = re.compile(
    rb"ID: (\d+)\nsignal: (\d+)/([0-9a-f]+)\nnotify: (\w+)/(\w+)\.(-?\d+)\nClockID: (-?\d+)\n"
)
_NOTIFY = {b"signal": SIGEV_SIGNAL, b"none": SIGEV_NONE, b"thread": SIGEV_THREAD}


def parse_timers(text: bytes) -> list[PosixTimer]:
    """/proc/PID/timers, times still 0. ValueError when it is no such text."""
    found = [
        PosixTimer(
            id=int(number),
            clock=int(clock),
            signal=int(signal),
            notify=_NOTIFY[notify] | SIGEV_THREAD_ID * (kind == b"tid"),
            target=int(target),
            value=int(value, 16),
            interval_ns=0,
            value_ns=0,
        )
        for number, signal, value, notify, kind, target, clock in _LISTED.findall(text)
    ]
    if len(found) != text.count(b"ID: ") - text.count(b"ClockID: "):
        raise ValueError(f"/proc/PID/timers: {text[:200]!r}")
    return found


def ask(inquiry: Inquiry, facts: Facts) -> Answer[State]:
    intervals = []
    for which in range(len(ITIMERS)):
        slot = inquiry.space(PAIR.size)
        intervals.append((which, inquiry.call(NR.getitimer, which, slot.address), slot))
    posix = []
    for timer in parse_timers(facts.timers_text):
        slot = inquiry.space(PAIR.size)
        posix.append((timer, inquiry.call(NR.timer_gettime, timer.id, slot.address), slot))

    def answer(answers: Answers) -> State:
        for what, call in [(f"itimer {ITIMERS[which]}", call) for which, call, _ in intervals] + [
            (f"POSIX timer {timer.id}", call) for timer, call, _ in posix
        ]:
            if answers.result(call):
                name = error_name(answers.result(call))
                raise KernelError(f"{what} of process {facts.pid}: {name}")
        armed = []
        for which, _, slot in intervals:
            interval, value = _times(answers.bytes(slot), 1_000_000)
            if interval or value:
                armed.append(IntervalTimer(which=which, interval_us=interval, value_us=value))
        timers = []
        for timer, _, slot in posix:
            interval, value = _times(answers.bytes(slot), 1_000_000_000)
            target = facts.inner(timer.target)
            timers.append(replace(timer, interval_ns=interval, value_ns=value, target=target))
        return State(intervals=tuple(armed), posix=tuple(timers))

    return answer


def _times(raw: bytes, unit: int) -> tuple[int, int]:
    """Interval and value in parts of a second, `unit` of which make one."""
    interval, interval_parts, value, value_parts = PAIR.unpack(raw)
    return interval * unit + interval_parts, value * unit + value_parts


# --- rebuild -------------------------------------------------------------------------------------


def rebuild(state: State, remote: Remote, ctx: Context) -> None:
    """Create and arm every timer. The threads that POSIX timers notify exist by now.

    Their time runs from this call on, so it comes as late as possible.
    """
    by_id = sorted(state.posix, key=lambda timer: timer.id)  # `_count_up` goes upwards
    made = [timer for timer in by_id if _create(timer, remote, ctx)]
    data = b"".join(
        [_spec(one.interval_us, one.value_us, 1_000_000) for one in state.intervals]
        + [_spec(timer.interval_ns, timer.value_ns, 1_000_000_000) for timer in made]
    )
    per_round = remote.data_size // PAIR.size
    todo: list[IntervalTimer | PosixTimer] = [*state.intervals, *made]
    for first in range(0, len(todo), per_round):
        address = remote.put(data[first * PAIR.size : (first + per_round) * PAIR.size])
        steps = []
        for i, timer in enumerate(todo[first : first + per_round]):
            spec = address + i * PAIR.size
            if isinstance(timer, IntervalTimer):
                call = Call(NR.setitimer, (timer.which, spec, 0))
                steps.append((f"interval timer ({ITIMERS[timer.which]})", call))
            else:
                call = Call(NR.timer_settime, (timer.id, 0, spec, 0))
                steps.append((f"POSIX timer {timer.id}", call))
        attempt(remote, ctx, steps)


def _spec(interval: int, value: int, unit: int) -> bytes:
    """A value of 0 would disarm the timer: one that expired and repeats gets the smallest time."""
    if interval and not value:
        value = 1
    return PAIR.pack(*divmod(interval, unit), *divmod(value, unit))


def _create(timer: PosixTimer, remote: Remote, ctx: Context) -> bool:
    """timer_create with the id it had; False, with a warning, when that is not possible."""
    event = SIGEVENT.pack(timer.value, timer.signal, timer.notify, timer.target)
    address = remote.put(event + struct.pack("<i", timer.id))
    wanted = address + len(event)
    create = Call(NR.timer_create, (timer.clock, address, wanted))
    on, result, _ = remote.batch(
        [
            Call(NR.prctl, (PR_TIMER_CREATE_RESTORE_IDS, 1, 0, 0, 0)),
            create,
            Call(NR.prctl, (PR_TIMER_CREATE_RESTORE_IDS, 0, 0, 0, 0)),
        ]
    )
    if result < 0:
        ctx.warnings.append(f"POSIX timer {timer.id}: not restored ({error_name(result)})")
        return False
    made = _made(remote, wanted)
    if on < 0:
        made = _count_up(timer.id, made, create, wanted, remote)
    if made != timer.id:
        remote.call(NR.timer_delete, made)
        ctx.warnings.append(
            f"POSIX timer {timer.id}: not restored (this kernel would name it {made})"
        )
        return False
    if timer.clock == THREAD_CLOCK:
        ctx.warnings.append(
            f"POSIX timer {timer.id} counts the CPU time of a thread that the kernel does not name;"
            " it now counts the leader's"
        )
    return True


def _made(remote: Remote, address: int) -> int:
    return int.from_bytes(remote.get(address, 4), "little")


def _count_up(wanted: int, made: int, create: Call, address: int, remote: Remote) -> int:
    """Before Linux 6.16: ids are counted up in each process, so create and delete up to it."""
    if wanted - made > MANY:
        return made
    while made < wanted:
        remote.call(NR.timer_delete, made)
        remote.call(create.nr, *create.args)
        made = _made(remote, address)
    return made
