"""The victims of tests/targets as Python objects."""

from __future__ import annotations

import json
import os
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from . import processes, redis
from .processes import wait_until

TARGETS = Path(__file__).resolve().parent.parent / "targets"
BIN = TARGETS / "bin"
_STATUS = struct.Struct("<QQqQQQ64Q32Q512sQ")  # struct status of victim.h
_MAGIC = 0x0031544349565F5F


@cache
def build() -> None:
    """Compiles the victims that are older than their sources."""
    made = subprocess.run(
        ["make", "-s", "-C", str(TARGETS)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        raise RuntimeError(f"make -C {TARGETS} failed:\n{made.stderr}")


@dataclass(frozen=True)
class Status:
    """One whole write of a victim's status file."""

    sequence: int
    pid: int
    errors: int
    verified: int
    progress: tuple[int, ...]
    values: tuple[int, ...]
    first_error: str


def read_status(path: Path) -> Status:
    """The newest whole status; repeats a read that met a write half way."""

    def parse() -> Status | None:
        data = path.read_bytes()
        if len(data) != _STATUS.size:
            return None
        fields = _STATUS.unpack(data)
        if fields[0] != _MAGIC or fields[1] != fields[-1]:
            return None
        lanes = fields[5]
        text = fields[102].split(b"\0")[0].decode(errors="replace")
        progress, values = fields[6 : 6 + lanes], fields[70:102]
        return Status(fields[1], fields[2], fields[3], fields[4], progress, values, text)

    for _ in range(1000):
        if (status := parse()) is not None:
            return status
    raise RuntimeError(f"{path} is not the status of a victim")


class Victim:
    """A running victim: `pid` changes when it is restored with another one (`became`)."""

    def __init__(self, directory: Path, command: Sequence[str], *, session: bool = True) -> None:
        self.directory = directory
        self.status_path = directory / "status"
        self.output_path = directory / "output"
        ready, told = os.pipe()
        with self.output_path.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--status", str(self.status_path), "--ready", str(told)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(told,),
                start_new_session=session,
                cwd=directory,
            )
        self.pid = self.process.pid
        os.close(told)
        try:
            with os.fdopen(ready, "rb") as pipe:
                # An end of file without the byte: it died on the way. select bounds the wait.
                if not select.select([pipe], [], [], 60)[0] or pipe.read(1) != b"r":
                    raise RuntimeError(f"{command} did not get ready: {self.output()}")
        except BaseException:
            self.kill()
            raise

    def output(self) -> str:
        return self.output_path.read_text(errors="replace")

    def status(self) -> Status:
        return read_status(self.status_path)

    def became(self, pid: int) -> None:
        """It was restored; from now on `pid` is meant."""
        self.pid = pid

    def kill(self) -> None:
        """SIGKILL, to its children as well, and wait until the pid is free."""
        children = processes.descendants(self.pid) if self.lives() else []
        if self.process.returncode is None and self.process.pid == self.pid:
            self.process.kill()
            # Not wait: after a take that was broken off this very process may trace its threads.
            processes.kill(self.process.pid)
            self.process.wait()
        processes.kill(self.pid)
        # They have become children of the test session; most end by themselves.
        processes.kill_all([pid for pid in children if not processes.ended(pid)])
        # A child that was born meanwhile, as a member of its group: the number is not free.
        while born := processes.members(self.pid):
            processes.kill_all(born)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def lives(self) -> bool:
        return processes.state(self.pid) not in ("", "Z", "X")

    def goes_on(self, seconds: float = 30.0) -> Status:
        """Waits until every lane has moved on twice from where it is now and nothing was found
        wrong; returns the last status. A lane that stands still is a lost wake-up."""
        for _ in range(2):
            self._moves(seconds)
        return self.healthy()

    def writes(self, seconds: float = 30.0) -> None:
        """Waits until it writes its status file: what is there may be a former life's last words,
        or of a time before it was quite ready."""
        stale = self.status().sequence
        wait_until(lambda: self._or_dead().sequence != stale, f"{self.name} writing", seconds)

    def _moves(self, seconds: float) -> None:
        self.writes(seconds)
        before = self.status()

        def moved() -> bool:
            after = self._or_dead().progress
            return all(new > old for new, old in zip(after, before.progress, strict=True))

        try:
            wait_until(moved, f"every thread of {self.name} going on", seconds)
        except TimeoutError:
            now = self.status()
            pairs = zip(before.progress, now.progress, strict=True)
            still = [lane for lane, (old, new) in enumerate(pairs) if new <= old]
            raise AssertionError(
                f"{self.name}: lanes {still} stand still at "
                f"{[now.progress[lane] for lane in still]}; {now.first_error}"
            ) from None

    def _or_dead(self) -> Status:
        if not self.lives():
            raise AssertionError(
                f"{self.name} ({self.pid}) is dead: {self.status().first_error or self.output()}"
            )
        return self.status()

    def healthy(self) -> Status:
        """The status, after checking that the program found nothing wrong in itself."""
        status = self._or_dead()
        assert status.errors == 0, f"{self.name}: {status.errors} faults: {status.first_error}"
        return status

    def verify(self, seconds: float = 60.0) -> Status:
        """Has the victim check all of its memory (SIGUSR1) and waits for the result."""
        self.writes(seconds)
        done = self.status().verified
        self.signal(signal.SIGUSR1)
        wait_until(lambda: self._or_dead().verified > done, f"{self.name} checking itself", seconds)
        return self.healthy()

    @property
    def name(self) -> str:
        return Path(str(self.process.args[0])).name  # type: ignore[index]


class Ordered(Victim):
    """`ordered`, and the checker of its order."""

    def rings(self) -> list[list[int]]:
        """Addresses of the counters, ring by ring."""
        rings, pages = self.status().values[:2]
        table = (self.directory / "table").read_bytes()
        flat = struct.unpack(f"<{rings * pages}Q", table)
        return [list(flat[i * pages : (i + 1) * pages]) for i in range(rings)]

    def torn(self, read: Callable[[int, int], bytes]) -> list[str]:
        """Where `read(address, length)` shows memory of no single instant; [] is a proof."""
        found = []
        for number, ring in enumerate(self.rings()):
            counts = [int.from_bytes(read(address, 8), "little") for address in ring]
            found += [f"ring {number}: {problem}" for problem in out_of_order(counts)]
        return found


def out_of_order(counts: Sequence[int]) -> list[str]:
    """The rule: c[0] >= c[1] >= … >= c[K-1] >= c[0] - 1."""
    found = [
        f"counter {k + 1} is {counts[k + 1]}, ahead of counter {k} at {counts[k]}"
        for k in range(len(counts) - 1)
        if counts[k + 1] > counts[k]
    ]
    if counts[-1] < counts[0] - 1:
        found.append(f"the last counter is {counts[-1]}, the first one {counts[0]}")
    return found


class PyApp(Victim):
    """`pyapp.py`: it also answers on TCP and on a unix socket."""

    def ask(
        self, question: str = "stat", *, unix: bool = False, seconds: float = 30.0
    ) -> dict[str, Any]:
        """One connection, one question, its answer."""
        address: str | tuple[str, int] = str(self.directory / "socket")
        if not unix:
            address = ("127.0.0.1", int((self.directory / "port").read_text()))
        with redis.connect(address, seconds) as client:
            client.sendall(question.encode() + b"\n")
            with client.makefile("rb") as answer:
                found = json.loads(answer.readline())
        assert isinstance(found, dict)
        return found

    def verify(self, seconds: float = 60.0) -> Status:
        found = self.ask("check", seconds=seconds)
        assert found["faults"] == [], found["faults"]
        assert found["pid"] > 0
        return self.healthy()


def c_victim(directory: Path, name: str, *prefix: str, **options: object) -> Victim:
    build()
    kind = Ordered if name == "ordered" else Victim
    given = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    if kind is Ordered:
        given += ["--table", str(directory / "table")]
    return kind(directory, [*prefix, str(BIN / name), *given])


def python_app(directory: Path, **options: object) -> PyApp:
    given = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    script = str(TARGETS / "pyapp.py")
    return PyApp(directory, [sys.executable, script, "--directory", str(directory), *given])
