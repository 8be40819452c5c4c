"""The pure parts of the state resources: texts of /proc, queues, masks."""

import os

import pytest

from snapshot.resources import limits, pending, scheduling, timers


def listed(number: int, notify: str, clock: int, value: int = 0) -> str:
    return f"ID: {number}\nsignal: 38/{value:016x}\nnotify: {notify}\nClockID: {clock}\n"


def test_timers() -> None:
    text = (
        listed(152, "signal/pid.77", 1, 0xABCDEF98)
        + listed(3, "signal/tid.79", -6)
        + listed(0, "none/pid.77", 7)
    )
    first, second, third = timers.parse_timers(text.encode())
    assert (first.id, first.signal, first.clock, first.target) == (152, 38, 1, 77)
    assert first.value == 0xABCDEF98
    assert first.notify == timers.SIGEV_SIGNAL
    assert (second.notify, second.target, second.clock) == (timers.SIGEV_THREAD_ID, 79, -6)
    assert third.notify == timers.SIGEV_NONE
    assert timers.parse_timers(b"") == []


@pytest.mark.parametrize("damage", [("signal:", "sig:"), ("none", "n0ne!"), ("ClockID", "CockID")])
def test_not_timers(damage: tuple[str, str]) -> None:
    text = listed(1, "none/pid.5", 0) + listed(2, "none/pid.5", 0).replace(*damage)
    with pytest.raises((ValueError, KeyError)):
        timers.parse_timers(text.encode())


def test_an_expired_interval_timer_stays_armed() -> None:
    assert timers.PAIR.unpack(timers._spec(5_250_000, 0, 1_000_000)) == (5, 250000, 0, 1)
    assert timers.PAIR.unpack(timers._spec(0, 0, 1_000_000)) == (0, 0, 0, 0)
    assert timers.PAIR.unpack(timers._spec(0, 1_000_000_001, 10**9)) == (0, 0, 1, 1)


def test_signals_that_lost_their_entry() -> None:
    queue = [(10).to_bytes(4, "little").ljust(128, b"x")]
    found = pending.complete(queue, 1 << 9 | 1 << 63)
    assert found[0] == queue[0]
    assert [pending.number(info) for info in found] == [10, 64]
    assert found[1] == (64).to_bytes(4, "little") + bytes(124)
    assert pending.complete([], 0) == ()


def test_every_cpu_is_no_restriction() -> None:
    count = os.cpu_count() or 1
    every = (1 << count) - 1
    assert scheduling._cpus(every.to_bytes(128, "little")) == b""
    assert scheduling._cpus(((1 << 300) - 1).to_bytes(128, "little")) == b""
    if count > 1:
        restricted = (every - 1).to_bytes(128, "little")
        assert scheduling._cpus(restricted) == restricted.rstrip(b"\0")


@pytest.mark.parametrize(
    ("effective", "policy", "nice", "own"),
    [
        (2 << 13 | 4, scheduling.NORMAL, 0, 0),
        (2 << 13 | 7, scheduling.BATCH, 19, 0),
        (1 << 13 | 4, scheduling.FIFO, 0, 0),
        (2 << 13 | 4, scheduling.NORMAL, 19, 2 << 13 | 4),
        (3 << 13, scheduling.NORMAL, 0, 3 << 13),
        (0, scheduling.NORMAL, 0, 0),
    ],
)
def test_io_priority(effective: int, policy: int, nice: int, own: int) -> None:
    assert scheduling._own_ioprio(effective, policy, nice) == own


def test_limits_for_people() -> None:
    assert limits._name(7) == "open files"
    assert limits._name(99) == "RLIMIT 99"
    assert limits._text((5, (1 << 64) - 1)) == "5 (hard unlimited)"
