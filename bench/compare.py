"""This checkout's `snap` and that of another revision, in turn on the same targets.

The other one is built in a working tree of its own and uses the packages of this environment: what
differs between the two is the code.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .commands import Failed
from .figures import Rows, Table, median, number, ratio
from .machine import ROOT
from .session import OURS

PARAMETERS = ("mib", "threads", "writers", "kind", "rewritten", "mode", "target", "what")
"""What makes a row comparable with another; those that a row has."""
NOT_MEASURED = frozenset({
    *PARAMETERS, "case", "way", "round", "time", "load", "commit", "kernel", "cpus", "memory_mib",
    "quick", "exit_code", "attempts", "guarded",
})  # fmt: skip


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A built working tree of `revision`, removed again at the end of the block."""
    with tempfile.TemporaryDirectory(prefix="snap-compare-") as name:
        tree = Path(name) / "tree"
        _ran(ROOT, "git", "worktree", "add", "--detach", "--quiet", str(tree), revision)
        try:
            _ran(tree, sys.executable, "setup.py", "-q", "build_ext", "--inplace")
            # As `make build` does: else a command that may not write compiles it all, each time.
            _ran(tree, sys.executable, "-m", "compileall", "-q", "cli.py", "snapshot")
            yield tree
        finally:
            _ran(ROOT, "git", "worktree", "remove", "--force", str(tree))


def _ran(tree: Path, *words: str) -> None:
    ran = subprocess.run(words, cwd=tree, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise Failed(f"{' '.join(words)} in {tree}: {ran.stderr.strip()[-2000:]}")


def table(rows: Rows, other: str) -> Table:
    """Medians of all numbers that both have, and how many times larger ours is."""
    lines = []
    kept = Rows(row for row in rows if row["way"] in (OURS, other))
    for key in dict.fromkeys(_key(row) for row in kept):
        here = Rows(row for row in kept if _key(row) == key)
        names = dict.fromkeys(name for row in here for name in row if _measured(row, name))
        for name in names:
            ours = median(here.where(way=OURS).values(name))
            theirs = median(here.where(way=other).values(name))
            if ours is None or theirs is None or ours == theirs == 0:
                continue
            times = number(ratio(theirs, ours))
            lines.append([" ".join(map(str, key)), name, number(theirs), number(ours), times])
    return Table("Medians", ["case", "what", other, "this checkout", "ratio"], lines)


def _key(row: dict[str, object]) -> tuple[object, ...]:
    return (row["case"], *(f"{name}={row[name]}" for name in PARAMETERS if name in row))


def _measured(row: dict[str, object], name: str) -> bool:
    return isinstance(row[name], int | float) and name not in NOT_MEASURED
