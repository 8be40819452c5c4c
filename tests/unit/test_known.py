"""Which chunks have been seen."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from snapshot.known import Known
from snapshot.units import CHUNK

places = st.tuples(st.integers(0, 2), st.integers(0, 200).map(lambda n: n * CHUNK))


@given(st.lists(places))
def test_like_a_set(some: list[tuple[int, int]]) -> None:
    known, model = Known(), set[tuple[int, int]]()
    for place in some:
        assert known.add(*place) == (place in model)
        model.add(place)
