"""timerfd_create(2): clock, remaining time, interval and expirations that nobody has read.

A timer goes on with the time that it had left at T0. Only one set to a time of day
(CLOCK_REALTIME with TFD_TIMER_ABSTIME) keeps that time, and has expired when it has passed.
"""

from __future__ import annotations

import errno
import os
import time

from ..kernel import fdcalls
from ..manifest import OpenFile, Record
from .openfile import Captured, Opening, Seen, Table, state_of

NAME = "timerfd"

CLOCKS = {0: "realtime", 1: "monotonic", 7: "boottime", 8: "realtime-alarm", 9: "boottime-alarm"}
TIMES_OF_DAY = (0, 8)


class State(Record, frozen=True):
    clock: int
    flags: int  # of timerfd_settime: TFD_TIMER_ABSTIME 1, TFD_TIMER_CANCEL_ON_SET 2
    remaining_ns: int  # 0: disarmed, or expired and not read yet
    interval_ns: int
    ticks: int
    at_ns: int = 0  # the time of day at which it expires, for a timer set to one


def recognise(seen: Seen, table: Table) -> bool:
    return seen.link == b"anon_inode:[timerfd]"


def capture(seen: Seen, table: Table) -> Captured:
    clock = int(seen.value(b"clockid:"))
    flags = int(seen.value(b"settime flags:"), 8)
    remaining = _nanoseconds(seen.value(b"it_value:"))
    of_day = clock in TIMES_OF_DAY and flags & fdcalls.TFD_TIMER_ABSTIME and remaining
    state = State(
        clock=clock,
        flags=flags,
        remaining_ns=remaining,
        interval_ns=_nanoseconds(seen.value(b"it_interval:")),
        ticks=int(seen.value(b"ticks:")),
        at_ns=time.time_ns() + remaining if of_day else 0,
    )
    return Captured(f"timerfd {CLOCKS.get(clock, clock)}", state)


def _nanoseconds(text: bytes) -> int:
    """`(1, 500)` is 1 s and 500 ns."""
    seconds, nanoseconds = text.strip(b"()").split(b",")
    return int(seconds) * 1_000_000_000 + int(nanoseconds)


def open(file: OpenFile, opening: Opening) -> int:
    state = state_of(file, State)
    try:
        fd = fdcalls.timerfd_create(state.clock, file.flags & os.O_NONBLOCK)
    except PermissionError:  # the alarm clocks need CAP_WAKE_ALARM
        plain = {8: 0, 9: 7}.get(state.clock, state.clock)
        opening.warn(file, "does not wake the machine: no CAP_WAKE_ALARM")
        fd = fdcalls.timerfd_create(plain, file.flags & os.O_NONBLOCK)
    value = state.remaining_ns
    if not value and state.interval_ns:
        value = 1  # expired and not read: the kernel counts on from the first expiration
    flags = 0
    if state.at_ns:
        flags, value = state.flags, state.at_ns
    if value:
        fdcalls.timerfd_settime(fd, flags, value, state.interval_ns)
    if state.ticks:
        try:
            fdcalls.timerfd_set_ticks(fd, state.ticks)
        except OSError as error:
            if error.errno != errno.ENOTTY:
                raise
            opening.warn(file, f"{state.ticks} expirations are lost: no TFD_IOC_SET_TICKS")
    return fd
