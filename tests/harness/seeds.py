"""Random choices that can be made again: SNAP_STRESS_SEED, printed by each test that uses one."""

from __future__ import annotations

import os
import time
from random import Random


def seeded(what: str, fixed: int | None = None) -> Random:
    """The random numbers of a test: from SNAP_STRESS_SEED, else `fixed`, else always new ones."""
    chosen = os.environ.get("SNAP_STRESS_SEED") or fixed or time.time_ns() % 1_000_000
    print(f"{what}: SNAP_STRESS_SEED={chosen}")
    return Random(f"{what}/{chosen}")
