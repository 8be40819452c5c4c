"""uffd_msg bytes -> typed events."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshot import events
from snapshot.events import Fault, Fork, Remap, Remove, Unknown, Unmap

U64 = st.integers(0, 2**64 - 1)


def message(number: int, first: int = 0, second: int = 0, third: int = 0) -> bytes:
    return events.MESSAGE.pack(number, 0, 0, 0, first, second, third)


def test_message_is_32_bytes() -> None:
    assert events.MESSAGE.size == 32


def test_each_kind() -> None:
    data = b"".join(
        [
            message(0x12, 3, 0x7000, 0xFFFF_FFFF_0000_0021),
            message(0x12, 0, 0x8000),
            message(0x12, 4, 0x8000),
            message(0x13, 0xDEAD_0000_0000_0009),
            message(0x14, 0x1000, 0x9000, 0x2000),
            message(0x15, 0x1000, 0x3000),
            message(0x16, 0x1000, 0x4000),
            message(0x77),
        ]
    )
    assert list(events.parse(data)) == [
        Fault(0x7000, write=True, protect=True, minor=False, tid=0x21),
        Fault(0x8000, write=False, protect=False, minor=False),
        Fault(0x8000, write=False, protect=False, minor=True),
        Fork(9),
        Remap(0x1000, 0x9000, 0x2000),
        Remove(0x1000, 0x3000),
        Unmap(0x1000, 0x4000),
        Unknown(0x77),
    ]


def test_nothing() -> None:
    assert list(events.parse(b"")) == []


def test_a_torn_message_is_refused() -> None:
    with pytest.raises(ValueError, match="33 bytes"):
        list(events.parse(message(0x12) + b"x"))


@given(st.lists(st.tuples(st.integers(0, 255), U64, U64, U64)))
def test_any_bytes_give_one_event_each(messages: list[tuple[int, int, int, int]]) -> None:
    data = b"".join(message(*each) for each in messages)
    assert len(list(events.parse(data))) == len(messages)
