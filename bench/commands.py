"""The `snap` command as anybody would type it; what it leaves running is ended with the bench."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness import processes

ROOT = Path(__file__).resolve().parent.parent


class Failed(Exception):
    """A command or a program of the bench did not do what it is there for."""


@dataclass(frozen=True)
class Ran:
    """Times are ns of CLOCK_MONOTONIC: before the command started, and when it had ended."""

    code: int
    answer: Any
    notes: str
    began: int
    ended: int

    @property
    def seconds(self) -> float:
        return (self.ended - self.began) / 1e9


def installed() -> list[str]:
    script = Path(sys.executable).parent / "snap"
    return [str(script)] if script.exists() else [sys.executable, str(ROOT / "cli.py")]


def of_checkout(checkout: Path) -> list[str]:
    """The command of another checkout, with the packages of this one's environment."""
    return ["env", f"PYTHONPATH={checkout}", sys.executable, str(checkout / "cli.py")]


class Snap:
    """Runs `snap` on one store. A directory beside the store takes its output."""

    def __init__(self, store: Path, command: list[str] | None = None) -> None:
        self.store = store
        self.command = command or installed()
        self.left: list[int] = []
        self.running: subprocess.Popen[bytes] | None = None

    def pid(self) -> int | None:
        """Of the command that runs now."""
        return self.running.pid if self.running else None

    def start(self, *arguments: object) -> Callable[[], Ran]:
        """-> what waits for its end. stdout and stderr are files, not pipes: a restored process
        may keep them open."""
        words = [*self.command, *map(str, arguments), "--store", str(self.store), "--json"]
        paths = [self.store.with_name(f"{self.store.name}.{kind}") for kind in ("out", "err")]
        began = time.monotonic_ns()
        with paths[0].open("wb") as out, paths[1].open("wb") as err:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        self.running = process

        def wait() -> Ran:
            try:
                code = process.wait()
            except BaseException:
                process.kill()
                process.wait()
                raise
            finally:
                self.running = None
            ended = time.monotonic_ns()
            answer = _parsed(paths[0].read_text())
            if code == 0 and arguments[0] == "restore":
                self.left += [pid for pid in (answer["pid"], answer["server_pid"]) if pid]
            return Ran(code, answer, paths[1].read_text(errors="replace"), began, ended)

        return wait

    def run(self, *arguments: object) -> Ran:
        return self.start(*arguments)()

    def __call__(self, *arguments: object) -> Ran:
        """As `run`, but it has to work."""
        ran = self.run(*arguments)
        if ran.code:
            raise Failed(f"snap {' '.join(map(str, arguments))}: {ran.code}\n{ran.notes}")
        return ran

    def end(self) -> None:
        """Ends what it has restored."""
        processes.kill_all(self.left)
        self.left.clear()

    def forget(self) -> None:
        """Removes the store."""
        shutil.rmtree(self.store, ignore_errors=True)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {}
