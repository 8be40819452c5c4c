"""A thread that ends while its memory is protected is joined, and its mutexes get another owner:
what the kernel writes then is told to no userfaultfd (decision 27).
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import snapshot
from snapshot.ahead import Ahead
from snapshot.hooks import HookContext
from tests.conftest import Spawn
from tests.harness import oracle
from tests.harness.processes import wait_until

pytestmark = pytest.mark.live

KINDS = [{}, {"threads": 40}, {"common": 1}, {"robust": 1}]
LATE = {"late": 1}
"""Of such a thread nobody knows before it is told to go on."""
MOMENTS = ["rounds", "last", "frozen", "resumed"]
CASES = [*product(MOMENTS, KINDS), *product(MOMENTS[1:], [LATE])]


@pytest.mark.parametrize("now", [False, True], ids=["ahead", "now"])
@pytest.mark.parametrize(("moment", "options"), CASES, ids=str)
def test_threads_that_end(
    spawn: Spawn,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    options: dict[str, int],
    now: bool,
) -> None:
    """After the rounds, after the last of them, as the first thing after T0, or while memory is
    still unsaved."""
    victim = spawn("ends", **options)
    seen: list[oracle.Memory] = []
    ended = []

    def end(when: str) -> None:
        if when != moment:
            return
        ended.append(when)
        if when == "frozen":
            victim.signal(signal.SIGUSR1)
        else:
            victim.verify(30)

    def rounds(ahead: Ahead, report: Callable[[], None], **how: Any) -> None:
        copy(ahead, report, **how)
        end("rounds")

    def last(ahead: Ahead, report: Callable[[], None]) -> None:
        if options == LATE:
            victim.signal(signal.SIGUSR2)
            wait_until(lambda: victim.status().values[0] > 0, "its threads going on")
        last_rounds(ahead, report)
        end("last")

    def frozen(context: HookContext) -> None:
        seen.append(oracle.read(context.pid))
        end("frozen")

    copy, last_rounds = Ahead.copy, Ahead.last_rounds
    monkeypatch.setattr(Ahead, "copy", rounds)
    monkeypatch.setattr(Ahead, "last_rounds", last)
    hooks: dict[str, Callable[[Any], None]] = {
        "frozen": frozen,
        "resumed": lambda _: end("resumed"),
    }
    with snapshot.take(victim.pid, name="image", store=store, now=now, hooks=hooks) as image:
        assert oracle.compare(seen[-1], image, victim.pid) == []
    assert ended or (moment == "rounds" and now)
    victim.verify(30)
    victim.goes_on()
