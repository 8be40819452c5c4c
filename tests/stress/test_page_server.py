"""Page servers killed at 300 random instants, alone, with their guardian, with the keeper.

SNAP_STRESS_KILLS sets how many."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from snapshot import service
from snapshot.image import Image
from tests.harness.seeds import seeded
from tests.live.server_kills import COMMANDS
from tests.live.test_lazy import place, program
from tests.live.test_server_kills import life

__all__ = ["place", "program"]  # fixtures
pytestmark = [
    pytest.mark.live,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif("SNAP_STRESS" not in os.environ, reason="takes long: make stress"),
]
KILLS = int(os.environ.get("SNAP_STRESS_KILLS", "300"))


def test_no_kill_shows_a_wrong_page(
    place: tuple[Path, Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    random = seeded("page server")
    total: Counter[str] = Counter()
    lives: Counter[str] = Counter()
    while sum(total.values()) < KILLS:
        command = random.choice(COMMANDS)
        monkeypatch.setenv(service.PAUSE, str(random.choice((0, 2, 10, 30))))
        number = sum(lives.values())
        total += life(place, command, random.randrange(1, 8), f"life {number}, {command}")
        lives[command] += 1
    print(f"{sum(total.values())} kills in {sum(lives.values())} lives: {dict(total)}")
    print(f"commands: {dict(lives)}")
    assert sum(total.values()) >= KILLS
