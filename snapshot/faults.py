"""Named points of a take at which `snap` ends itself with SIGKILL when it is told to: for tests.

SNAP_FAULT=NAME in the environment names the one; docs/failure-modes.md says what each leaves.
"""

from __future__ import annotations

import os
import signal
from typing import Literal

Point = Literal[
    "begun",
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
`passed` only with a target that may not make a userfaultfd itself."""

_ARMED = os.environ.get("SNAP_FAULT")


def point(name: Point) -> None:
    if _ARMED is not None and name == _ARMED:
        os.kill(os.getpid(), signal.SIGKILL)
