"""How fast a take may copy what nobody waits for: bytes a second, or a share of a processor."""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

from . import arguments
from .units import CHUNK


class Pace(NamedTuple):
    """0: no limit. `percent`: of one processor, for all threads of the take together."""

    bytes_per_second: int = 0
    percent: int = 0


ANY = Pace()
MOST_PERCENT = 100_000


def parse(given: str | None) -> Pace:
    """`100M`, `100M/s`, `50%`; None: no limit. ValueError says what was expected."""
    if given is None:
        return ANY
    text = given.strip()
    with suppress(ValueError):
        if text.endswith("%"):
            percent = int(text.removesuffix("%"))
            if 1 <= percent <= MOST_PERCENT:
                return Pace(percent=percent)
        else:
            size = arguments.size(text.removesuffix("/s"))
            if CHUNK <= size < 1 << 63:
                return Pace(bytes_per_second=size)
    raise ValueError(
        f"{given!r} is not a pace like 100M (bytes a second, 64K at least) or 50% (of a processor)"
    )
