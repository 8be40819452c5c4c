"""A thread that ends while its memory is protected is joined, and its mutexes get another owner:
what the kernel writes then is told to no userfaultfd (decision 27).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import snapshot
from snapshot.ahead import Ahead
from snapshot.hooks import HookContext
from tests.conftest import Spawn
from tests.harness import oracle

pytestmark = pytest.mark.live

KINDS = [{}, {"threads": 40}, {"common": 1}, {"robust": 1}]


@pytest.mark.parametrize("now", [False, True], ids=["ahead", "now"])
@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("moment", ["rounds", "frozen", "resumed"])
def test_threads_that_end(
    spawn: Spawn,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    options: dict[str, int],
    now: bool,
) -> None:
    """After the rounds, as the first thing after T0, or while memory is still unsaved."""
    victim = spawn("ends", **options)
    seen: list[oracle.Memory] = []
    ended = []

    def end(when: str) -> None:
        if when != moment:
            return
        ended.append(when)
        if when == "frozen":
            victim.signal(10)
        else:
            victim.verify(30)

    def rounds(ahead: Ahead, report: Callable[[], None], **how: Any) -> None:
        copy(ahead, report, **how)
        end("rounds")

    def frozen(context: HookContext) -> None:
        seen.append(oracle.read(context.pid))
        end("frozen")

    copy = Ahead.copy
    monkeypatch.setattr(Ahead, "copy", rounds)
    hooks: dict[str, Callable[[Any], None]] = {
        "frozen": frozen,
        "resumed": lambda _: end("resumed"),
    }
    with snapshot.take(victim.pid, name="image", store=store, now=now, hooks=hooks) as image:
        assert oracle.compare(seen[-1], image, victim.pid) == []
    assert ended or (moment == "rounds" and now)
    victim.verify(30)
    victim.goes_on()
