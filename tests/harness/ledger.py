"""Clients that write without pause, in an order that shows whether data is of one instant.

Each client does INCR a, then b, then c on keys of its own, one command at a time. In what any one
instant holds, a >= b >= c >= a - 1. Runs as a process of its own, so that what else Python does in
the test cannot slow it:

    python -m tests.harness.ledger SOCKET-PATH-or-PORT CLIENTS

On stdin: `mark` (latencies from here on), `stat` and `stop`, each answered by a line of JSON.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path

from .redis import Address, Client, RedisError, connect, encode

ROOT = Path(__file__).resolve().parent.parent.parent
KEYS = "abc"


@dataclass(frozen=True)
class Report:
    operations: int
    errors: int
    first_error: str
    acknowledged: list[list[int]]  # by client: the last answers for a, b, c
    seconds: float  # since `mark`
    p50_ms: float  # latencies since `mark`
    p99_ms: float
    p999_ms: float
    max_ms: float
    marked_operations: int


def problems(counts: list[int]) -> str:
    """What is wrong with the ledger (a, b, c) of one client at one instant; '' is right."""
    a, b, c = counts
    return "" if a >= b >= c >= a - 1 else f"a={a} b={b} c={c}"


def read(client: Client, clients: int) -> list[list[int]]:
    """The ledgers as the server has them."""
    return [
        [int(value or 0) for value in client("MGET", *(f"ledger:{i}:{key}" for key in KEYS))]
        for i in range(clients)
    ]


class _One:
    """A client: what it has under way."""

    def __init__(self, number: int, address: Address, counts: list[int]) -> None:
        self.number = number
        self.counts = counts
        # After a restore it may have stood between two keys: go on where it was.
        self.key = 0
        if counts[1] < counts[0]:
            self.key = 1
        elif counts[2] < counts[1]:
            self.key = 2
        self.connection = connect(address)
        self.connection.setblocking(False)
        self.requests = [encode(["INCR", f"ledger:{number}:{key}"]) for key in KEYS]
        self.sent = 0.0
        self.buffer = b""

    def send(self) -> None:
        self.sent = time.perf_counter()
        self.connection.send(self.requests[self.key])

    def receive(self) -> float | None:
        """Seconds that the command took, or None when its answer is not whole yet.

        Raises RedisError for anything but the next number."""
        try:
            data = self.connection.recv(4096)
        except BlockingIOError:
            return None
        if not data:
            raise RedisError(f"client {self.number}: the connection ended")
        self.buffer += data
        if not self.buffer.endswith(b"\r\n"):
            return None
        took = time.perf_counter() - self.sent
        answer, self.buffer = self.buffer[:-2], b""
        expected = self.counts[self.key] + 1
        if answer != b":%d" % expected:
            raise RedisError(f"client {self.number}: {answer!r} instead of {expected}")
        self.counts[self.key] = expected
        self.key = (self.key + 1) % 3
        return took


class _Load:
    def __init__(self, address: Address, clients: int) -> None:
        with Client(address) as client:
            counts = read(client, clients)
        self.clients = [_One(i, address, counts[i]) for i in range(clients)]
        self.operations = self.errors = 0
        self.first_error = ""
        self.mark()

    def mark(self) -> None:
        self.latencies = array("d")
        self.marked = time.perf_counter()

    def run(self) -> None:
        poll = select.epoll()
        poll.register(0, select.EPOLLIN)
        by_fd = {}
        for one in self.clients:
            poll.register(one.connection.fileno(), select.EPOLLIN)
            by_fd[one.connection.fileno()] = one
            one.send()
        while True:
            for fd, _ in poll.poll():
                if fd == 0:
                    if not self.command():
                        return
                    continue
                one = by_fd[fd]
                try:
                    took = one.receive()
                    if took is None:
                        continue
                    self.latencies.append(took)
                    self.operations += 1
                    one.send()
                except (OSError, RedisError) as error:
                    self.errors += 1
                    self.first_error = self.first_error or str(error) or type(error).__name__
                    poll.unregister(fd)

    def command(self) -> bool:
        words = os.read(0, 4096).decode().split()
        for word in words:
            if word == "mark":
                self.mark()
            print(json.dumps(asdict(self.report())), flush=True)
        # An end of file: the test is gone, and so are we.
        return bool(words) and "stop" not in words

    def report(self) -> Report:
        ordered = sorted(self.latencies)

        def at(share: float) -> float:
            return ordered[int(share * (len(ordered) - 1))] * 1000 if ordered else 0.0

        # What a client waits for at this moment counts too: a server that stands still is silent.
        now = time.perf_counter()
        oldest = max((now - one.sent for one in self.clients), default=0.0) * 1000
        return Report(
            operations=self.operations,
            errors=self.errors,
            first_error=self.first_error,
            acknowledged=[one.counts for one in self.clients],
            seconds=now - self.marked,
            p50_ms=at(0.5),
            p99_ms=at(0.99),
            p999_ms=at(0.999),
            max_ms=max(at(1.0), oldest if not self.errors else 0.0),
            marked_operations=len(ordered),
        )


class Ledger:
    """The load, seen from the test."""

    def __init__(self, address: Address, clients: int = 20) -> None:
        self.clients = clients
        where = address if isinstance(address, str) else str(address[1])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.harness.ledger", where, str(clients)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        try:
            self.ask("mark")
        except BaseException:
            self.kill()
            raise

    def ask(self, word: str) -> Report:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(word.encode() + b"\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the load ended with {self.process.wait()}")
        return Report(**json.loads(line))

    def works(self, operations: int = 2000) -> Report:
        """Waits until so many more commands were answered."""
        goal = self.ask("stat").operations + operations
        end = time.monotonic() + 60
        while (report := self.ask("stat")).operations < goal:
            if report.errors or time.monotonic() > end:
                raise AssertionError(f"the load stands still: {report.first_error or report}")
            time.sleep(0.01)
        return report

    def stop(self) -> Report:
        report = self.ask("stop")
        self.process.wait()
        self._close()
        return report

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._close()

    def _close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                stream.close()


def main() -> None:
    where, clients = sys.argv[1], int(sys.argv[2])
    address: Address = ("127.0.0.1", int(where)) if where.isdigit() else where
    _Load(address, clients).run()


if __name__ == "__main__":
    main()
