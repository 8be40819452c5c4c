"""Page servers killed at random instants, while the restored process checks what it reads."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from random import Random

from tests.harness.processes import state, wait_until
from tests.live.servers import servers

WHO = ("server", "guardian", "both", "both", "keeper and server")
COMMANDS = ("all", "all", "fork", "orphan", "threads", "dontneed", "free", "move", "grow", "unmap",
            "brk", "protect", "write")  # fmt: skip
ALL = ("snap-pages", "snap-guardian", "snap-keeper")
LONGEST = 0.25
"""Seconds between two kills, at most."""


def dead(pid: int) -> bool:
    """Also when nobody has waited for it yet."""
    return state(pid) in ("Z", "X", "")


def living(name: str) -> list[int]:
    return [pid for pid in servers(name) if not dead(pid)]


NAMES = {
    "server": ["snap-pages"],
    "guardian": ["snap-guardian"],
    "both": ["snap-pages", "snap-guardian"],
    "keeper and server": ["snap-keeper", "snap-pages"],
}


def victims(who: str, random: Random) -> list[int]:
    """Pids to be killed together, in any order; none when nobody would be left: then the process
    waits for ever (docs/failure-modes.md). Looked for once: a keeper may become a guardian."""
    found = {name: living(name) for name in ALL}
    chosen = [pid for name in NAMES[who] for pid in found[name]]
    random.shuffle(chosen)
    return chosen if set().union(*found.values()) - set(chosen) else []


def kill_some(
    random: Random, most: int, done: Callable[[], bool], complete: Callable[[], bool]
) -> Counter[str]:
    """Up to `most` kills at random instants; after the first until `done`, or until `complete`: all
    pages are in. -> how many of which kind hit."""
    found: Counter[str] = Counter()
    while sum(found.values()) < most and not complete() and not (found and done()):
        # The instant is what is tried out: nothing is waited for.
        time.sleep(random.random() ** 2 * LONGEST)
        who = random.choice(WHO)
        if not (chosen := victims(who, random)):
            with suppress(TimeoutError):
                wait_until(lambda: complete() or all(map(living, ALL)), "all three")
            chosen = victims(who, random)
        hit = []
        for pid in chosen:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                hit.append(pid)
        if hit:
            found[who] += 1
        # Or who is dying would be taken for one of the living, and the last one killed as well.
        wait_until(lambda hit=hit: all(map(dead, hit)), "their end")  # type: ignore[misc]
    return found
