"""A few thousand hostile images; `make stress` tries a million (tests/stress/test_fuzz.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshot.errors import SnapError
from tests.conftest import ROOT
from tests.harness import hostile


def test_hostile_images_are_refused_or_read() -> None:
    """In a process with little memory; what a reader cannot refuse ends it."""
    command = [sys.executable, "-m", "tests.harness.fuzz", "1", "4000"]
    ran = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    found = Counter(json.loads(ran.stdout))
    assert sum(found.values()) == 4000
    assert found["store: refused"]
    assert found["store: read"]


@pytest.mark.parametrize("reader", hostile.READERS)
@given(data=st.binary(max_size=400))
def test_any_bytes(reader: hostile.Reader, data: bytes) -> None:
    with suppress(SnapError):
        reader(data)


@given(data=st.data())
def test_a_manifest_with_a_piece_of_anything(data: st.DataObject) -> None:
    whole = hostile.seed_fields()
    at = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(at, min(len(whole), at + 30)))
    with suppress(SnapError):
        hostile.read_manifest(whole[:at] + data.draw(st.binary(max_size=30)) + whole[end:])
