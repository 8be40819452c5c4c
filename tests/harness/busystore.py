"""A store that nobody else can write to for a while: another program has a transaction open."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from snapshot.kernel.closing import Closing

HOLDER = """
import sys, lmdb
path = sys.stdin.readline().strip()
with lmdb.open(path, max_dbs=16, lock=True).begin(write=True):
    print("held", flush=True)
    sys.stdin.readline()
"""


class BusyStore(Closing):
    """`hold` returns when the store is taken; `release`, or the end of the block, gives it back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def hold(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{self.path}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "held\n"

    def release(self) -> None:
        self.process.communicate()

    def close(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
            self.process.communicate()
