"""Ranges against the plainest model there is: a set of integers."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshot.ranges import Ranges

LIMIT = 40
bounds = st.tuples(st.integers(0, LIMIT), st.integers(0, LIMIT)).map(sorted).map(tuple)
steps = st.lists(st.tuples(st.booleans(), bounds), max_size=30)


def build(made: list[tuple[bool, tuple[int, int]]]) -> tuple[Ranges, set[int]]:
    ranges, model = Ranges(), set()
    for adds, (start, end) in made:
        if adds:
            ranges.add(start, end)
            model |= set(range(start, end))
        else:
            ranges.remove(start, end)
            model -= set(range(start, end))
    return ranges, model


def members(ranges: Ranges) -> set[int]:
    return {value for start, end in ranges for value in range(start, end)}


@given(steps)
def test_add_and_remove(made: list[tuple[bool, tuple[int, int]]]) -> None:
    ranges, model = build(made)
    assert members(ranges) == model
    assert ranges.size == len(model)
    found = list(ranges)
    assert len(ranges) == len(found)
    assert all(start < end for start, end in found)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(found))


@given(steps, bounds)
def test_questions(made: list[tuple[bool, tuple[int, int]]], where: tuple[int, int]) -> None:
    ranges, model = build(made)
    start, end = where
    inside = set(range(start, end))
    assert ranges.covers(start, end) == (inside <= model)
    assert ranges.overlaps(start, end) == bool(inside & model)
    assert {
        v for low, high in ranges.within(start, end) for v in range(low, high)
    } == inside & model
    assert {v for low, high in ranges.gaps(start, end) for v in range(low, high)} == inside - model
    assert (start in ranges) == (start in model)
    found = ranges.range_at(start)
    assert (found is not None) == (start in model)
    if found:
        assert set(range(*found)) <= model
        assert found[0] - 1 not in model
        assert found[1] not in model


@given(steps, steps)
def test_set_operations(
    one: list[tuple[bool, tuple[int, int]]], other: list[tuple[bool, tuple[int, int]]]
) -> None:
    (left, left_model), (right, right_model) = build(one), build(other)
    assert members(left | right) == left_model | right_model
    assert members(left & right) == left_model & right_model
    assert members(left - right) == left_model - right_model
    assert (left == right) == (left_model == right_model)
    assert members(left) == left_model, "operands are left alone"


def test_touching_ranges_become_one() -> None:
    assert list(Ranges([(0, 10), (20, 30), (10, 20)])) == [(0, 30)]


def test_a_copy_is_its_own() -> None:
    first = Ranges([(0, 10)])
    second = first.copy()
    second.remove(0, 5)
    assert list(first) == [(0, 10)]
    second.clear()
    assert not second


def test_aligned() -> None:
    assert list(Ranges([(5, 6), (9, 17)]).aligned(8)) == [(0, 24)]


def test_backwards() -> None:
    with pytest.raises(ValueError, match="ends before it starts: 0x2-0x1"):
        Ranges().add(2, 1)


def test_repr_is_hexadecimal() -> None:
    assert repr(Ranges([(0x1000, 0x2000)])) == "Ranges(0x1000-0x2000)"
