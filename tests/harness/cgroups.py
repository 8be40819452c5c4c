"""A control group (version 1) of a test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def cgroup(controller: str, limit: str, value: int) -> Iterator[Path]:
    """Its cgroup.procs: a pid that is written there is limited. At the end those that are left go
    back to the root. Skips where there is no such controller, or it may not be used."""
    root = Path("/sys/fs/cgroup") / controller
    group = root / f"snap-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(value))
    except OSError as error:
        pytest.skip(f"no {controller} controller (cgroup v1): {error.strerror}")
    members = group / "cgroup.procs"
    try:
        yield members
    finally:
        for pid in members.read_text().split():
            (root / "cgroup.procs").write_text(pid)
        group.rmdir()
