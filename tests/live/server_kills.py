"""Page servers killed at random instants, while the restored process checks what it reads."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

from tests.harness.processes import state, wait_until
from tests.live.servers import servers

WHO = ("server", "guardian", "both", "both", "keeper and server")
COMMANDS = ("all", "all", "fork", "orphan", "threads", "dontneed", "free", "move", "grow", "unmap",
            "brk", "protect", "write")  # fmt: skip
ALL = ("snap-pages", "snap-guardian", "snap-keeper")
LONGEST = 0.25
"""Seconds between two kills, at most."""
IN_A_ROW = 3
"""Kills without a page put in place, at most: after five such servers the process is given up
(pageserver.py)."""


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


def resident(pid: int) -> int:
    """Pages of its memory that are there."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])


def kill_some(
    random: Random, pid: int, most: int, done: Callable[[], bool], complete: Callable[[], bool]
) -> Counter[str]:
    """Up to `most` kills, at random instants, of those who serve `pid`; after the first until
    `done`, or until `complete`: all pages are in. -> how many of which kind hit."""
    found: Counter[str] = Counter()
    there = resident(pid)
    while sum(found.values()) < most and not complete() and not (found and done()):
        # The instant is what is tried out: nothing is waited for.
        time.sleep(random.random() ** 2 * LONGEST)
        who = random.choice(WHO)
        if sum(found.values()) % IN_A_ROW == IN_A_ROW - 1:
            _wait_until(lambda there=there: complete() or done() or resident(pid) != there)  # type: ignore[misc]
            there = resident(pid)
        if not (chosen := victims(who, random)):
            _wait_until(lambda: complete() or all(map(living, ALL)))
            chosen = victims(who, random)
        hit = []
        for victim in chosen:
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                hit.append(victim)
        if hit:
            found[who] += 1
        # Or who is dying would be taken for one of the living, and the last one killed as well.
        wait_until(lambda hit=hit: all(map(dead, hit)), "their end")  # type: ignore[misc]
        if "keeper" in who:
            _wait_until(lambda: complete() or bool(living("snap-keeper")))
    return found


def _wait_until(condition: Callable[[], bool]) -> None:
    """Not for ever: it may have come and gone."""
    with suppress(TimeoutError):
        wait_until(condition, "what the next kill needs")
