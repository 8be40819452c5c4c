"""The ways to save a target of `pages` while its writers go on, for the cases that compare them."""

from __future__ import annotations

import time

from .figures import Row
from .pages import Pages
from .peers import forksave
from .session import OURS, Bench

NOW = "snap --now"


def saved(bench: Bench, target: Pages, way: str, seconds: float) -> Row:
    """Has `target` saved in a way: a snap, NOW, fork; any other: nothing is done for `seconds`."""
    if way in bench.snaps:
        return bench.take(way, target.pid)[1]
    if way == NOW:
        return bench.take(OURS, target.pid, "--now")[1]
    if way == "fork":
        with bench.directory() as place:
            return forksave.save(target, place)
    time.sleep(seconds)
    return {}
