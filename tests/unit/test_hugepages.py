"""How many huge pages a restore will take from the pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from snapshot import hugepages
from snapshot.errors import RestoreError
from snapshot.kernel import hugetlb
from snapshot.manifest import OBJECT_SPACE, SharedObject
from snapshot.units import CHUNK, GIB, HUGE, PAGE
from tests.unit.images import BASE, manifest, mapping, process


@dataclass
class Piece:
    nonzero: int
    present: int = 0xFFFF
    data: bytes = bytes(CHUNK)


class Source:
    """Chunks by (space, address); 0 for one of zeros."""

    def __init__(self, chunks: dict[tuple[int, int], int]) -> None:
        self._chunks = chunks

    def addresses(self, space: int, /) -> Sequence[int]:
        return sorted(address for its, address in self._chunks if its == space)

    def chunk(self, space: int, address: int, /) -> Piece | None:
        return Piece(self._chunks[space, address])


def huge(start: int, pages: int, *flags: str, **fields: Any) -> Any:
    size = fields.setdefault("page_size", HUGE)
    return mapping(start, pages * size, vm_flags=("rd", "ht", *flags), **fields)


def test_a_mapping_reserves_all_of_its_pages() -> None:
    made = manifest("one", process(mapping(), huge(2 * BASE, 5)))
    assert hugepages.needs(made, Source({})) == {HUGE: 5}


def test_one_without_reservation_takes_those_that_hold_something() -> None:
    made = manifest("one", process(huge(BASE, 8, "nr")))
    chunks = {
        (0, BASE - CHUNK): 1,  # of another mapping
        (0, BASE): 1,
        (0, BASE + HUGE - CHUNK): 1,  # the same huge page
        (0, BASE + 2 * HUGE): 0,  # zeros
        (0, BASE + 7 * HUGE + CHUNK): 1,
        (1, BASE + 4 * HUGE): 1,  # of another process
    }
    assert hugepages.needs(made, Source(chunks)) == {HUGE: 2}


def test_an_object_takes_what_is_mapped_and_what_holds_something_once() -> None:
    shared = SharedObject(
        id=3, kind="memfd", name=b"x", device=1, inode=2, size=8 * HUGE, page_size=HUGE
    )
    two = [
        huge(BASE, 2, kind="shared", shared=True, object=3),
        huge(2 * BASE, 2, kind="shared", shared=True, object=3, offset=HUGE),
        huge(3 * BASE, 8, "nr", kind="shared", shared=True, object=3),
    ]
    made = manifest("one", process(*two), objects=(shared,))
    space = OBJECT_SPACE + 3
    chunks = {(space, 2 * HUGE): 1, (space, 6 * HUGE + CHUNK): 1, (space, 7 * HUGE): 0}
    assert hugepages.needs(made, Source(chunks)) == {HUGE: 4}


def test_sizes_are_counted_apart() -> None:
    made = manifest("one", process(huge(BASE, 1), huge(2 * BASE, 2, page_size=GIB)))
    assert hugepages.needs(made, Source({})) == {HUGE: 1, GIB: 2}


def test_the_error_names_all_that_is_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hugetlb, "pool", lambda size: hugetlb.Pool(8, 2) if size == HUGE else None)
    made = manifest("one", process(huge(BASE, 3), huge(2 * BASE, 1, page_size=GIB)))
    with pytest.raises(RestoreError) as caught:
        hugepages.check(made, Source({}))
    assert "3 pages of 2.0 MiB: 2 of 8 are free" in caught.value.message
    assert "1 page of 1.00 GiB: this kernel has none of that size" in caught.value.message
    assert "nr_hugepages" in caught.value.hint
    assert "9" in caught.value.hint


def test_enough_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hugetlb, "pool", lambda size: hugetlb.Pool(3, 3))
    hugepages.check(manifest("one", process(huge(BASE, 3))), Source({}))
    hugepages.check(manifest("two", process(mapping(size=PAGE))), Source({}))
