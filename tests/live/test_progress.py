"""What a take says of itself while it goes on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

import snapshot
from snapshot.stats import Progress
from snapshot.writer import ImageWriter, RawChunk
from tests.conftest import Spawn

pytestmark = pytest.mark.live


def test_what_is_saved_and_not_stored_yet_is_being_stored(
    spawn: Spawn, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store takes nothing until it has been said that this is what is waited for."""
    victim = spawn("writer", mib=4, threads=1, kind="anon")
    told = threading.Event()
    put = ImageWriter.put
    phases: list[str] = []

    def waiting(self: ImageWriter, batch: Sequence[RawChunk]) -> None:
        assert told.wait(60), "nobody said that all was saved"
        put(self, batch)

    def report(progress: Progress) -> None:
        phases.append(progress.phase)
        if progress.phase == "storing":
            told.set()

    monkeypatch.setattr(ImageWriter, "put", waiting)
    snapshot.take(victim.pid, store=store, name="image", progress=report).close()
    assert phases[-1] == "storing"
    assert "saving" not in phases[phases.index("storing") :]
    victim.goes_on()
