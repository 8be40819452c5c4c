"""The target ends right after T0: what was saved by then is a whole image; what was not is a clear
error that leaves nothing."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import snapshot
from snapshot.errors import TakeError
from snapshot.hooks import HookContext
from snapshot.store import Store
from tests.conftest import Spawn
from tests.harness import oracle
from tests.harness.victims import Victim

pytestmark = pytest.mark.live

HOW = ["exit", "group", "exec", "abort", "kill", "SIGKILL"]
STAGES = ["frozen", "resumed"]


def end(victim: Victim, how: str) -> None:
    victim.signal(signal.SIGKILL if how == "SIGKILL" else signal.SIGUSR1)


def has_ended(victim: Victim) -> None:
    """For good: also as the program that it became by exec."""
    victim.process.wait(20)
    assert not victim.lives()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", HOW)
def test_nothing_is_unsaved(spawn: Spawn, store: Path, how: str, stage: str) -> None:
    victim = spawn("exits", how="exit" if how == "SIGKILL" else how, mib=1)
    seen: list[oracle.Memory] = []

    def frozen(context: HookContext) -> None:
        seen.append(oracle.read(context.pid))
        if stage == "frozen":
            end(victim, how)

    hooks = {
        "frozen": frozen,
        "resumed": lambda _: end(victim, how) if stage == "resumed" else None,
    }
    with snapshot.take(victim.pid, name="image", store=store, hooks=hooks) as image:
        has_ended(victim)
        assert oracle.compare(seen[-1], image) == []
        assert image.manifest.stats.attempts == 1
        assert list(image.verify()) == []


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", HOW)
def test_much_is_unsaved(spawn: Spawn, store: Path, how: str, stage: str) -> None:
    """Never a torn image; one that is whole all the same may be made."""
    victim = spawn("exits", how="exit" if how == "SIGKILL" else how, mib=256)
    hooks = {stage: lambda _: end(victim, how)}
    with pytest.raises(TakeError) as raised:
        snapshot.take(
            victim.pid, name="image", store=store, hooks=hooks, now=True, memory=4 << 20
        ).close()
    assert raised.value.exit_code == 8
    assert "ended" in raised.value.message
    has_ended(victim)
    with Store.open(store) as opened:
        assert opened.images() == []
