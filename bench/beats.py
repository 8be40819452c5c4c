"""`targets/beats.c`: when a processor of this machine did not run, which is its host's doing."""

from __future__ import annotations

import subprocess
from pathlib import Path

from snapshot.ranges import Ranges

from .commands import Failed
from .targets import BIN, build, numbers


class Beats:
    """Started; `stop` ends it -> when there was a processor that did not run, ns of
    CLOCK_MONOTONIC."""

    def __init__(self, directory: Path) -> None:
        build()
        self._log = directory / "beats.log"
        words = [str(BIN / "beats"), "--log", str(self._log)]
        self.process = subprocess.Popen(words, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)

    def stop(self) -> Ranges:
        assert self.process.stderr is not None
        self.process.terminate()
        notes = self.process.stderr.read().decode()
        if self.process.wait():
            raise Failed(f"beats: {notes}")
        return Ranges((due, came) for _, due, came in numbers(self._log, 3))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
