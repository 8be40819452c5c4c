"""The index of a space: the fast way and LMDB's say the same."""

from __future__ import annotations

from pathlib import Path

from snapshot import index
from snapshot.store import ProcessIdentity, Store
from snapshot.units import CHUNK, PAGE
from snapshot.writer import RawChunk
from tests.unit.images import BASE, manifest, mapping, process

COUNT = 700
"""Enough for pages above the leaves."""


def test_all_entries_in_one_go(tmp_path: Path) -> None:
    memory = memoryview(bytes(PAGE) + b"x" * (CHUNK - PAGE))
    with Store.open(tmp_path / "store", create=True) as store:
        for name in ("first", "second"):
            writer = store.begin(name, ProcessIdentity("boot", 100, 5))
            for space, count in ((0, COUNT), (1, 1), (7, COUNT)):
                addresses = range(BASE, BASE + count * CHUNK, CHUNK)
                writer.put([RawChunk(space, at, 0xFFFF, memory) for at in addresses])
            spaces = process(mapping(size=COUNT * CHUNK))
            writer.commit(manifest(name, spaces, taken_at=1.0))
        with store.image("second") as image:
            environment, number = image._environment, image._record.number
            for said in image._record.spaces:
                fast = index._read(environment, number, said)
                slow = index.load(environment, number, said.space)
                assert fast is not None
                assert fast.addresses == slow.addresses
                assert list(fast.entries()) == list(slow.entries())
                assert slow.summary() == fast.summary() == said
            wrong = said.__class__(space=0, chunks=COUNT - 1, digest=said.digest)
            assert index._read(environment, number, wrong) is None
            assert len(index.load(environment, number, 0, wrong)) == COUNT
