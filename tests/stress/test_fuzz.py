"""A million hostile images, and as many as atheris finds worth trying.

SNAP_STRESS_CASES sets how many."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.harness.seeds import seeded

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200),
    pytest.mark.skipif("SNAP_STRESS" not in os.environ, reason="takes long: make stress"),
]
CASES = int(os.environ.get("SNAP_STRESS_CASES", "1000000"))
PART = 50_000
"""Cases of one process: each begins with little memory."""


def fuzz(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.harness.fuzz", *words]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=3600
    )


def test_no_hostile_image_is_more_than_refused() -> None:
    random = seeded("hostile images")
    found: Counter[str] = Counter()
    while sum(found.values()) < CASES:
        seed = random.randrange(1 << 32)
        ran = fuzz(str(seed), str(min(PART, CASES - sum(found.values()))))
        assert ran.returncode == 0, f"python -m tests.harness.fuzz {seed} {PART}: {ran.stderr}"
        found += Counter(json.loads(ran.stdout))
    print(f"{sum(found.values())} cases: {dict(sorted(found.items()))}")
    assert sum(found.values()) == CASES
    for kind in ("store: read", "manifest: read"):
        assert found[kind], "some must get past the first checks"


@pytest.mark.skipif(find_spec("atheris") is None, reason="no atheris: pip install -e .[fuzz]")
def test_what_atheris_chooses(tmp_path: Path) -> None:
    seed = seeded("atheris").randrange(1, 1 << 31)
    ran = fuzz("--atheris", str(tmp_path / "corpus"), str(CASES), str(seed))
    assert ran.returncode == 0, f"seed {seed}: {ran.stderr[-3000:]}"
    done = re.search(r"Done (\d+) runs", ran.stderr)
    assert done is not None, ran.stderr[-1000:]
    print(f"atheris: {done[1]} cases")
    assert int(done[1]) >= CASES
