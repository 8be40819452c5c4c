"""The ledger of a lazy restore, against a dictionary that does the same page by page."""

from __future__ import annotations

import itertools

from hypothesis import example, given
from hypothesis import strategies as st

from snapshot.missing import Missing, Piece

Model = dict[int, int]  # address -> address in the image
BOUND = 40


def model_of(missing: Missing) -> Model:
    return {
        piece.start + i: piece.source + i
        for piece in missing
        for i in range(piece.end - piece.start)
    }


ranges = st.tuples(st.integers(0, BOUND), st.integers(0, BOUND)).map(
    lambda pair: (min(pair), max(pair))
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("take"), ranges),
        st.tuples(st.just("move"), st.tuples(ranges, st.integers(0, BOUND))),
    ),
    max_size=12,
)


@given(steps)
@example([("move", ((1, 1), 0))])
def test_like_a_dictionary(steps: list[tuple[str, tuple]]) -> None:  # type: ignore[type-arg]
    missing = Missing.of([(0, 8), (8, 12), (20, 33)])
    model = model_of(missing)
    for what, arguments in steps:
        if what == "take":
            start, end = arguments
            taken = model_of(Missing(missing.take(start, end)))
            assert taken == {k: model.pop(k) for k in range(start, end) if k in model}
        else:
            (start, end), new = arguments
            missing.move(start, new, end - start)
            moved = {k - start + new: model.pop(k) for k in range(start, end) if k in model}
            for k in range(new, new + end - start):
                model.pop(k, None)
            model |= moved
        assert model_of(missing) == model
        assert missing.size == len(model)
        pieces = list(missing)
        assert all(one.end <= other.start for one, other in itertools.pairwise(pieces))
        assert all(piece.start < piece.end for piece in pieces)
        for address in range(BOUND * 2):
            piece = missing.at(address)
            assert (piece is None) == (address not in model)
            following = missing.after(address)
            later = [k for k in model if k >= address]
            if not model:
                assert following is None
            else:
                assert following is not None
                assert following.start == min(later or model)
                assert following.source == model[following.start]


def test_a_copy_is_independent() -> None:
    missing = Missing.of([(0, 4)])
    copy = missing.copy()
    missing.take(0, 2)
    assert list(copy) == [Piece(0, 4, 0)]


def test_parts() -> None:
    missing = Missing([Piece(10, 20, 110), Piece(30, 40, 30)])
    assert missing.within(15, 35) == [Piece(15, 20, 115), Piece(30, 35, 30)]
    assert bool(missing)
    assert not Missing()
