"""500 random damages of a store; each fifth also through the commands, with a restore.

SNAP_STRESS_DAMAGES sets how many."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tests.harness import damage
from tests.harness.seeds import seeded
from tests.live.store_damage import Store, check, check_commands, total
from tests.live.test_lazy import place, program
from tests.live.test_store_damages import damaged

__all__ = ["damaged", "place", "program"]  # fixtures
pytestmark = [
    pytest.mark.live,
    pytest.mark.slow,
    pytest.mark.timeout(7200),
    pytest.mark.skipif("SNAP_STRESS" not in os.environ, reason="takes long: make stress"),
]
DAMAGES = int(os.environ.get("SNAP_STRESS_DAMAGES", "500"))
COMMANDS = 5
"""Each such is one for the commands."""


def test_no_damage_gives_a_wrong_byte_or_a_crash(damaged: Store) -> None:
    found: Counter[tuple[str, str]] = Counter()
    for number in range(DAMAGES):
        random = seeded(f"damage {number}")
        kind = random.choice(list(damage.KINDS))
        if number % COMMANDS:
            found[kind, check(damaged, random, kind)] += 1
        else:
            lazy = random.random() < 0.7
            found[kind, check_commands(damaged, random, kind, lazy=lazy)] += 1
    print(total(found))
    print(f"{sum(found.values())} damages, {len(range(0, DAMAGES, COMMANDS))} through the commands")
    assert sum(found.values()) == DAMAGES
