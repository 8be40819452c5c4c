"""What comes next when nobody waits: the working set first, in runs where it has some."""

from __future__ import annotations

from collections.abc import Sequence

from snapshot.kernel.uffd import Uffd
from snapshot.lazy import Client, Content
from snapshot.missing import Missing
from snapshot.streaming import Next, Streaming
from snapshot.units import CHUNK

BASE = 0x7F0000000000


def at(number: int) -> int:
    return BASE + number * CHUNK


class Source:
    """An image that has the chunks 0 to 39 but for 20."""

    def chunk(self, space: int, address: int) -> Content | None:
        raise AssertionError("nothing is decoded here")

    def addresses(self, space: int) -> Sequence[int]:
        return [at(number) for number in range(40) if number != 20]


def client(number: int = 0) -> Client:
    return Client(number, Uffd(-1), Missing.of([(at(0), at(40))]))


def test_a_working_set_comes_first_and_in_runs() -> None:
    streaming = Streaming(Source(), 0)
    streaming.first([at(9), at(10), at(11), at(3)])
    process = client()
    assert streaming.next(process, 16) == Next(at(9), at(9), 3)
    assert streaming.next(process, 16) == Next(at(3), at(3), 1)
    assert streaming.next(process, 16) == Next(at(0), at(0), 16)


def test_a_run_has_no_more_than_was_asked_for() -> None:
    streaming = Streaming(Source(), 0)
    streaming.first([at(number) for number in range(5)])
    process = client()
    assert streaming.next(process, 4) == Next(at(0), at(0), 4)
    assert streaming.next(process, 4) == Next(at(4), at(4), 1)


def test_of_a_working_set_only_what_is_missing() -> None:
    streaming = Streaming(Source(), 0)
    streaming.first([at(5), at(30)])
    process = client()
    process.missing.take(at(5), at(6))
    assert streaming.next(process, 16) == Next(at(30), at(30), 1)


def test_a_working_set_is_that_of_the_first_process() -> None:
    streaming = Streaming(Source(), 0)
    streaming.first([at(9)])
    assert streaming.next(client(1), 2) == Next(at(0), at(0), 2)


def test_a_run_ends_where_the_image_has_nothing() -> None:
    streaming = Streaming(Source(), 0)
    process = client()
    process.cursor = at(18)
    assert streaming.next(process, 16) == Next(at(18), at(18), 2)
    assert streaming.next(process, 16) == Next(at(21), at(21), 16)
