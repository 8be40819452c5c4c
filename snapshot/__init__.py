"""Live snapshots of running processes: the public API. Nothing else in here is public.

    import snapshot

    with snapshot.take(4711, name="before-upgrade") as image:  # the process runs on
        image.read(0x7F0000000000, 4096)  # its memory at T0

    snapshot.restore("before-upgrade", lazy=True).wait()  # when the process is gone

Importing is cheap: what take and restore need is imported when they are called. Every failure that
a caller can expect is a `SnapError`, with a message, a hint and an exit code.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from .errors import SnapError
from .units import MIB

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .hooks import HookMapping, Hooks
    from .image import Image
    from .restore import Restored
    from .stats import ProgressCallback

__all__ = ["SnapError", "open_image", "restore", "take"]


def take(
    pid: int,
    *,
    name: str | None = None,
    store: str | os.PathLike[str] | None = None,
    memory: int = 192 * MIB,
    now: bool = False,
    guard: Literal["auto", "always", "never"] = "auto",
    writers: Literal["auto", "wait", "pass"] = "auto",
    pace: str | None = None,
    hooks: HookMapping | None = None,
    progress: ProgressCallback | None = None,
) -> Image:
    """Snapshot the process `pid` while it runs; returns the committed image.

    Memory is copied ahead, and the moment of the image is when little is left to be copied; with
    `now` it is at once. What is left can be lost if the process unmaps it before it is saved: then
    another moment is tried and what is left then copied while the process stands still (`guard`
    "auto"); or so the first time ("always"); or TakeError is raised ("never").

    `writers`: whether who writes to a page that is not copied yet waits for that ("wait"); or for
    nobody, and what was written is copied again until little is left ("pass"; TakeError when he is
    too fast); or what of the two is right for the process ("auto").

    `memory` bounds the staging buffer, in bytes. `pace` limits copying, to bytes a second ("100M")
    or to a share of a processor ("50%"); what the process waits for is copied at once. `hooks` maps
    stages (docs/cli-contract.md) to callables that get a HookContext; `progress` is called now and
    then from the taking thread.
    The image cannot be removed while it is open: close it, or use it in a `with` statement.

    `pid` may be the caller's own: a helper process takes the image then (snapshot/inprocess.py
    says what is different, and what `take` returns in the restored process).

    Raises SnapError, in every case with the target running on as before; ValueError for an
    unknown stage, or what is no pace.
    """
    from . import pace as paces

    speed = paces.parse(pace)
    if pid == os.getpid():
        from .inprocess import take_self

        return take_self(
            name=name,
            store=store,
            memory=memory,
            now=now,
            guard=guard,
            writers=writers,
            pace=pace,
            hooks=hooks,
        )
    from .hooks import TAKE_STAGES
    from .take import take as run

    joined = _join(hooks, TAKE_STAGES)
    path = store_path(store)
    return run(
        pid,
        store=path,
        name=name,
        memory=memory,
        now=now,
        guard=guard,
        writers=writers,
        pace=speed,
        hooks=joined,
        progress=progress,
    )


def restore(
    image: Image | str,
    *,
    lazy: bool = True,
    pid: Literal["keep", "new"] = "keep",
    store: str | os.PathLike[str] | None = None,
    hooks: HookMapping | None = None,
    stdio: tuple[int, int, int] = (0, 1, 2),
    progress: ProgressCallback | None = None,
    working_set: bool = True,
) -> Restored:
    """Bring the process of `image` (or of the image of that name) back; returns when it runs.

    `lazy` lets it run before its memory is there. `pid="new"` restores into a fresh pid namespace.
    `working_set`: of a lazy restore, pages that earlier ones waited for come first.
    `stdio` are the caller's descriptors that stand in for those that led outside.

    Raises SnapError, with nothing left running; ValueError for an unknown stage.
    """
    from .hooks import RESTORE_STAGES
    from .restore import restore as run

    joined = _join(hooks, RESTORE_STAGES)
    if isinstance(image, str):
        with open_image(image, store=store) as opened:
            return restore(
                opened,
                lazy=lazy,
                pid=pid,
                hooks=hooks,
                stdio=stdio,
                progress=progress,
                working_set=working_set,
            )
    return run(
        image,
        lazy=lazy,
        pid=pid,
        hooks=joined,
        stdio=stdio,
        progress=progress,
        working_set=working_set,
    )


def open_image(name: str, *, store: str | os.PathLike[str] | None = None) -> Image:
    """The image `name`: `manifest`, `read(address, length)`, `mappings`, `threads`.

    The beginning of a name that only one image has will do, and `latest`. The image cannot be
    removed while it is open: close it, or use it in a `with` statement. Raises StoreError when
    there is no such store or image, DamagedError when its record cannot be read.
    """
    from .store import Store

    with Store.open(store_path(store)) as opened:
        return opened.image(name)


def store_path(store: str | os.PathLike[str] | None) -> Path:
    """The store meant: the one given, else $SNAP_STORE, else the user's own (XDG data dir)."""
    from pathlib import Path

    if store:
        return Path(store)
    from .directory import default_path

    return default_path()


def _join(given: HookMapping | None, stages: Sequence[str]) -> Hooks:
    from .hooks import Hooks, check_stage

    for stage in given or {}:
        check_stage(stage, stages)
    return Hooks(given)


class _Package(ModuleType):
    """Keeps the functions `take` and `restore`: importing the modules snapshot.take and
    snapshot.restore would otherwise put the modules in their place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in ("take", "restore") and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
