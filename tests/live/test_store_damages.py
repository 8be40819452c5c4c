"""Every kind of damage to a store, as verify, read and restore meet it: never a wrong byte.

Here once each; `make stress` makes hundreds (tests/stress/test_damages.py)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from snapshot.image import Image
from tests.harness import damage
from tests.harness.seeds import seeded
from tests.live.store_damage import Store, check, check_commands
from tests.live.test_lazy import place, program

__all__ = ["place", "program"]  # fixtures
pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sudo pytest tests/live"),
]


@pytest.fixture(scope="module")
def damaged(place: tuple[Path, Image], tmp_path_factory: pytest.TempPathFactory) -> Store:
    directory, image = place
    scratch = tmp_path_factory.mktemp("damaged")
    made = Store(directory, image.store_path, image.name, scratch)
    with made.reference.open("wb") as file:
        for mapping in image.mappings:
            if mapping.kind == "anon":
                file.write(image.read(mapping.start, mapping.size))
    return made


def test_without_damage_nothing_is_found(damaged: Store) -> None:
    damaged.fresh()
    assert damaged.snap("verify", damaged.name)[0] == 0
    assert damaged.read() == (0, "verified\n")  # and nothing more


@pytest.mark.parametrize("kind", damage.KINDS)
def test_each_kind(damaged: Store, kind: str) -> None:
    """Verified and read by the library."""
    print(check(damaged, seeded(f"damage, {kind}", fixed=1), kind))


@pytest.mark.parametrize(
    ("kind", "lazy"),
    [("zeroed block", True), ("truncation", True), ("chunk changed", True),
     ("chunk changed", False), ("index entry removed", True), ("manifest changed", False)],
)  # fmt: skip
def test_the_commands(damaged: Store, kind: str, lazy: bool) -> None:
    """`snap verify` and `snap restore --wait`."""
    print(check_commands(damaged, seeded(f"damage, {kind}", fixed=2), kind, lazy=lazy))
