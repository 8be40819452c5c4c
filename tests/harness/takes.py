"""A take with the oracle at its T0, and a restore that is ended again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import snapshot

from . import oracle, processes
from .victims import Victim

if TYPE_CHECKING:
    from snapshot.image import Image
    from snapshot.restore import Restored


def take_with_oracle(
    pid: int, store: Path, name: str, **options: Any
) -> tuple[oracle.Memory, Image]:
    """An image, and all memory of T0 as the oracle read it in the `frozen` hook.

    A take that tries again has a new T0: the last one counts.
    """
    seen: list[oracle.Memory] = []
    image = snapshot.take(
        pid,
        name=name,
        store=store,
        hooks={"frozen": lambda context: seen.append(oracle.read(context.pid))},
        **options,
    )
    assert seen, "the hook at `frozen` did not run"
    return seen[-1], image


def compared(pid: int, store: Path, name: str, **options: Any) -> list[str]:
    """What of an image differs from T0, by the oracle; [] when every byte is equal."""
    memory, image = take_with_oracle(pid, store, name, **options)
    with image:
        return [str(difference) for difference in oracle.compare(memory, image, pid)]


@contextmanager
def restored(
    victim: Victim,
    name: str,
    store: Path,
    lazy: bool,
    pid: Literal["keep", "new"] = "keep",
) -> Iterator[Restored]:
    """The victim lives again for as long as the block lasts; then everything of it is ended."""
    back = snapshot.restore(name, lazy=lazy, pid=pid, store=store)
    try:
        victim.became(back.pid)
        yield back
    finally:
        victim.kill()
        processes.kill_all([one for one in (back.pid, back.server_pid) if one])
