"""A redis-server of the tests' own, a small client, and data whose every byte is known."""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from . import processes
from .processes import wait_until

SERVER = shutil.which("redis-server")
Address = str | tuple[str, int]
"""Path of a unix socket, or host and port."""


class RedisError(Exception):
    """An answer that begins with '-', or a connection that ended."""


def connect(address: Address, seconds: float = 60.0) -> socket.socket:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    connection = socket.socket(family, socket.SOCK_STREAM)
    connection.settimeout(seconds)
    try:
        connection.connect(address)
    except BaseException:
        connection.close()
        raise
    return connection


def encode(words: Sequence[bytes | str | int]) -> bytes:
    """One command in RESP."""
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        data = word if isinstance(word, bytes) else str(word).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(parts)


class Client:
    def __init__(self, address: Address, seconds: float = 60.0) -> None:
        self.connection = connect(address, seconds)
        self.reader = self.connection.makefile("rb", 1 << 20)

    def __call__(self, *words: bytes | str | int) -> Any:
        self.connection.sendall(encode(words))
        return self.answer()

    def pipeline(
        self, commands: Iterable[Sequence[bytes | str | int]], at_once: int = 256
    ) -> list[Any]:
        """The answers to all commands, `at_once` of them under way at a time."""
        answers: list[Any] = []
        for group in _groups(commands, at_once):
            self.connection.sendall(b"".join(encode(words) for words in group))
            answers += [self.answer() for _ in group]
        return answers

    def answer(self) -> Any:
        line = self.reader.readline()
        if not line.endswith(b"\r\n"):
            raise RedisError("the connection ended")
        kind, rest = line[:1], line[1:-2]
        if kind == b"+":
            return rest.decode()
        if kind == b":":
            return int(rest)
        if kind == b"-":
            raise RedisError(rest.decode())
        if kind == b"$":
            return None if rest == b"-1" else self._bulk(int(rest))
        if kind == b"*":
            return [self.answer() for _ in range(int(rest))]
        raise RedisError(f"not RESP: {line!r}")

    def _bulk(self, size: int) -> bytes:
        data: bytes = self.reader.read(size + 2)
        if len(data) != size + 2:
            raise RedisError("the connection ended")
        return data[:-2]

    def close(self) -> None:
        self.reader.close()
        self.connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _groups(commands: Iterable[Any], size: int) -> Iterator[list[Any]]:
    group: list[Any] = []
    for command in commands:
        group.append(command)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


@cache
def _pool() -> bytes:
    return random.Random(20).randbytes(8 << 20)


def value_of(key: int) -> bytes:
    """512 to 4095 bytes that compress badly, different for each key."""
    size = 512 + key * 7919 % 3584
    offset = key * 104_729 % ((8 << 20) - 4096)
    return b"%016d" % key + _pool()[offset : offset + size - 16]


class Redis:
    """redis-server without persistence of its own, on a unix socket and a free TCP port."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        if SERVER is None:
            raise RuntimeError("no redis-server: apt-get install redis-server")
        self.directory = directory
        self.socket_path = str(directory / "redis.sock")
        self.port = free_port()
        self.filled = 0
        with (directory / "output").open("wb") as output:
            self.process = subprocess.Popen(
                [
                    *(SERVER, "--save", "", "--appendonly", "no", "--dir", str(directory)),
                    *("--port", str(self.port), "--bind", "127.0.0.1", "--daemonize", "no"),
                    *("--unixsocket", self.socket_path, "--logfile", str(directory / "log")),
                    *("--enable-debug-command", "yes", *arguments),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.pid = self.process.pid
        try:
            wait_until(self._answers, "redis-server answering")
        except BaseException:
            self.kill()
            raise

    def _answers(self) -> bool:
        if self.process.poll() is not None:
            log = self.directory / "log"
            raise RuntimeError(f"redis-server ended: {log.read_text() if log.exists() else ''}")
        try:
            with Client(self.socket_path) as client:
                return bool(client("PING") == "PONG")
        except OSError:
            return False

    def client(self, *, tcp: bool = False, seconds: float = 60.0) -> Client:
        return Client(("127.0.0.1", self.port) if tcp else self.socket_path, seconds)

    def fill(self, mib: int) -> int:
        """Sets keys until about `mib` MiB of values are in; returns how many keys there are now."""
        size, key = 0, self.filled

        def commands() -> Iterator[tuple[bytes, bytes, bytes]]:
            nonlocal size, key
            while size < mib << 20:
                value = value_of(key)
                size += len(value)
                yield b"SET", b"key:%d" % key, value
                key += 1

        with self.client() as client:
            client.pipeline(commands())
        self.filled = key
        return key

    def wrong_values(self) -> list[int]:
        """Keys of `fill` whose value is not what was set: all are read."""
        found: list[int] = []
        with self.client() as client:
            for first in range(0, self.filled, 4096):
                keys = range(first, min(first + 4096, self.filled))
                answers = client.pipeline([(b"GET", b"key:%d" % key) for key in keys])
                found += [
                    key for key, value in zip(keys, answers, strict=True) if value != value_of(key)
                ]
        return found

    def kill(self) -> None:
        """SIGKILL, and wait until the pid is free; of a restored server too."""
        if self.process.returncode is None:
            self.process.kill()
            self.process.wait()
        processes.kill(self.pid)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
