"""`targets/requests.c`: a client of redis with an open loop, and what its log tells."""

from __future__ import annotations

import subprocess
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from snapshot.ranges import Ranges

from .commands import Failed
from .figures import Row, distribution
from .targets import BIN, build, numbers

STALL_NS = 1_000_000
MACHINE = "the machine"
"""The cause of a stall in most of which a processor did not run."""
VALUE_BYTES = 2304
"""Of a key, on average."""
KEY_BYTES = VALUE_BYTES + 150
"""What redis needs for one."""


@dataclass(frozen=True)
class Request:
    """ns of CLOCK_MONOTONIC."""

    due: int
    sent: int
    answered: int

    @property
    def latency(self) -> int:
        return self.answered - self.due


@dataclass(frozen=True)
class Watched:
    """Until `at`: how long the server's main thread has run, and waited for a CPU; how long the
    host has kept CPUs from us, all of them together."""

    at: int
    ran: int
    waited: int
    stolen: int


@dataclass(frozen=True)
class Stall:
    """Requests that were late together: from the first one's due time to the last one's answer.
    What passed of it, in ns: the client was not awake, the server wanted a CPU that others had, the
    server ran, the host had a CPU; the rest it was stopped, or waited in a fault. Whatever these
    say, in `silent` of it there was a processor that did not run."""

    begin: int
    end: int
    requests: int
    client: int
    waited: int
    ran: int
    stolen: int
    silent: int

    @property
    def length(self) -> int:
        return self.end - self.begin

    @property
    def cause(self) -> str:
        if 2 * self.silent > self.length:
            return MACHINE
        parts = {"client": self.client, "no CPU": self.waited, "busy": self.ran}
        parts["stolen"] = self.stolen
        parts["stopped"] = self.length - sum(parts.values())
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True)
class Log:
    requests: list[Request]
    watched: list[Watched]
    silent: Ranges = field(default_factory=Ranges)
    """When there was a processor that did not run (beats.py)."""

    def between(self, begin: int, end: int) -> list[Request]:
        """Those that were due in [begin, end)."""
        first = bisect_left(self.requests, begin, key=lambda one: one.due)
        last = bisect_left(self.requests, end, key=lambda one: one.due)
        return self.requests[first:last]

    def stalls(self, begin: int, end: int) -> list[Stall]:
        """Late requests whose times overlap belong to one stall."""
        found: list[list[Request]] = []
        reached = 0
        for one in self.between(begin, end):
            if one.latency < STALL_NS:
                continue
            if not found or one.due > reached:
                found.append([])
            found[-1].append(one)
            reached = max(reached, one.answered)
        return [self._stall(late) for late in found]

    def _stall(self, late: Sequence[Request]) -> Stall:
        begin, end = late[0].due, max(one.answered for one in late)
        before, after = self._watched(begin, end)
        asleep, awake = 0, begin
        for one in self.between(begin, end):
            asleep += max(0, one.sent - max(one.due, awake))
            awake = one.sent
        return Stall(
            begin=begin,
            end=end,
            requests=len(late),
            client=min(asleep, end - begin),
            waited=min(after.waited - before.waited, end - begin),
            ran=min(after.ran - before.ran, end - begin),
            stolen=min(after.stolen - before.stolen, end - begin),
            silent=sum(high - low for low, high in self.silent.within(begin, end)),
        )

    def _watched(self, begin: int, end: int) -> tuple[Watched, Watched]:
        """The last look before, and the first one after."""
        if not self.watched:
            return Watched(begin, 0, 0, 0), Watched(end, 0, 0, 0)
        first = max(0, bisect_right(self.watched, begin, key=lambda one: one.at) - 1)
        last = bisect_left(self.watched, end, key=lambda one: one.at)
        return self.watched[first], self.watched[min(last, len(self.watched) - 1)]


def latencies(requests: Sequence[Request], prefix: str) -> Row:
    found = distribution((one.latency for one in requests), "us", 1e-3)
    return {f"{prefix}_{name}": value for name, value in found.items()}


class Client:
    """Started; `stop` ends it and reads its log."""

    def __init__(self, directory: Path, socket: str, keys: int, **options: object) -> None:
        build()
        self._log = directory / "requests.log"
        words = [str(BIN / "requests"), "--socket", socket, "--keys", str(keys)]
        words += ["--log", str(self._log)]
        words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        self.process = subprocess.Popen(words, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)

    def wait(self) -> Log:
        assert self.process.stderr is not None
        notes = self.process.stderr.read().decode()
        if self.process.wait():
            raise Failed(f"the client: {notes}")
        watched = self._log.with_name(f"{self._log.name}.watch")
        return Log(
            [Request(*one) for one in numbers(self._log, 3)],
            [Watched(*one) for one in numbers(watched, 4)],
        )

    def stop(self) -> Log:
        self.process.terminate()
        return self.wait()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def fill(directory: Path, socket: str, mib: int) -> int:
    """So many keys that redis has about `mib` MiB of data -> how many."""
    keys = (mib << 20) // KEY_BYTES
    filling = Client(directory, socket, keys, fill=1, rate=60_000, seconds=1)
    try:
        filling.wait()
    finally:
        filling.kill()
    return keys
