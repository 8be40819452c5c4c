"""Named points at which `snap` ends itself with SIGKILL when it is told to: for tests.

SNAP_FAULT=NAME in the environment names the one; docs/failure-modes.md says what each leaves. With
SNAP_FAULT_ONCE=FILE only the process that removes that file does so.
"""

from __future__ import annotations

import os
import signal
from typing import Literal

Point = Literal[
    "begun",
    "visited",
    "guest-made",
    "first-stop",
    "paired",
    "passed",
    "made",
    "fetched",
    "created",
    "clean",
    "registered",
    "first-resumed",
    "round-begun",
    "round-ended",
    "second-stop",
    "captured",
    "clean-again",
    "held",
    "settled",
    "let-go",
    "stays",
    "resumed",
    "put",
    "written",
    "saved",
    "drained",
    "in-commit",
    "committed",
    "synced",
]
"""In the order in which a take comes to them (`put` and `written` may come earlier); `paired` and
`passed` only with a target that may not make a userfaultfd itself, `made` and `fetched` only where
it is made step by step (`Frozen.make`), `stays` only if something is unsaved at T0."""

Succession = Literal["keeper-made", "generation-set", "keepers-replaced", "led", "followed"]
"""Of guardian and keeper, in the same order: the first three when a server is replaced, `led` when
a keeper has taken the lead, `followed` when it has a keeper of its own."""

ARMED = os.environ.get("SNAP_FAULT")
"""The point, if there is one."""


_ONCE = os.environ.get("SNAP_FAULT_ONCE")


def point(name: Point | Succession) -> None:
    if ARMED is not None and name == ARMED:
        if _ONCE is not None:
            try:
                os.unlink(_ONCE)
            except FileNotFoundError:
                return
        os.kill(os.getpid(), signal.SIGKILL)
