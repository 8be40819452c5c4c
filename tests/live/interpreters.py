"""Python processes that a test talks to, and a way to give one the descriptors of another.

The target opens things and waits for the next line on stdin. `rebuilt` captures its descriptors
live and places them in a second process, in which the test then looks.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from snapshot.freeze import freeze
from snapshot.kernel import pidfd
from snapshot.manifest import (
    Descriptor,
    Host,
    Manifest,
    MemoryLayout,
    OpenFile,
    Process,
    SharedObject,
)
from snapshot.resources import descriptors

LOOP = """
import array, errno, fcntl, json, os, select, signal, socket, stat, struct, sys, time
def read_line(rest=[b""]):
    while b"\\n" not in rest[0]:
        more = os.read(0, 65536)
        if not more:
            os._exit(0)
        rest[0] += more
    line, rest[0] = rest[0].split(b"\\n", 1)
    return json.loads(line)
def run():
    while True:
        kind, code = read_line()
        try:
            answer = [True, repr((exec if kind == "run" else eval)(code, globals()))]
        except BaseException as error:
            answer = [False, f"{type(error).__name__}: {error}"]
        os.write(1, json.dumps(answer).encode() + b"\\n")
run()
"""


class Interpreter:
    """A Python process. `to` and `back` are our ends of its stdin and stdout."""

    def __init__(
        self, keep: Sequence[int] = (), prelude: str = "", cwd: str | os.PathLike[str] | None = None
    ) -> None:
        self.stdin, self.to = os.pipe()
        self.back, self.stdout = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", prelude + LOOP],
            stdin=self.stdin,
            stdout=self.stdout,
            pass_fds=keep,
            cwd=cwd,
        )
        self.pid = self.process.pid
        self._rest = b""
        self.ask("1")  # it runs

    def ask(self, expression: str) -> Any:
        """The value of an expression in the process."""
        return ast.literal_eval(self._say("ask", expression))

    def run(self, code: str) -> None:
        self._say("run", code)

    def _say(self, kind: str, code: str) -> str:
        os.write(self.to, json.dumps([kind, code]).encode() + b"\n")
        while b"\n" not in self._rest:
            more = os.read(self.back, 65536)
            if not more:
                raise EOFError(f"the process ended: {self.process.wait()}")
            self._rest += more
        line, self._rest = self._rest.split(b"\n", 1)
        good, text = json.loads(line)
        if not good:
            raise AssertionError(f"{code}: {text}")
        return str(text)

    def end(self) -> None:
        """SIGKILL; what it had open is closed when this returns."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.end()
        for fd in (self.to, self.back, self.stdin, self.stdout):
            os.close(fd)

    def __enter__(self) -> Interpreter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class Context:
    """What rebuild.Context is to descriptors."""

    manifest: Manifest
    stdio: tuple[int, int, int]
    objects: dict[int, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    closed_connections: list[str] = field(default_factory=list)


@dataclass
class Table:
    files: tuple[OpenFile, ...]
    descriptors: tuple[Descriptor, ...]
    cannot: list[str]
    process: Process

    def at(self, fd: int) -> OpenFile:
        number = next(d.file for d in self.descriptors if d.fd == fd)
        return next(file for file in self.files if file.id == number)


def fdinfo(pid: int) -> dict[str, list[bytes]]:
    """What the kernel says of every descriptor, without times that run."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fdinfo"):
        with open(f"/proc/{pid}/fdinfo/{name}", "rb") as file:
            lines = file.read().split(b"\n")
        link = os.readlink(f"/proc/{pid}/fd/{name}").encode()
        found[name] = [link, *(line for line in lines if not line.startswith(b"it_value"))]
    return found


def captured(target: Interpreter) -> Table:
    """Its descriptors, taken while it is stopped; nothing about them may have changed."""
    before = fdinfo(target.pid)
    with freeze(target.pid) as frozen:
        files, table, cannot = descriptors.capture(frozen.pid, frozen.pidfd)
    assert fdinfo(target.pid) == before
    process = Process(
        index=0,
        pid=target.pid,
        ppid=0,
        pgid=0,
        sid=0,
        comm=b"",
        cmdline=(),
        start_ticks=0,
        exe=b"",
        cwd=os.fsencode(os.readlink(f"/proc/{target.pid}/cwd")),
        root=b"/",
        umask=0,
        personality=0,
        layout=MemoryLayout(**dict.fromkeys(_LAYOUT, 0), auxv=b""),
        mappings=(),
        threads=(),
        files=files,
        descriptors=table,
    )
    return Table(files, table, cannot, process)


_LAYOUT = [name for name in MemoryLayout.__struct_fields__ if name != "auxv"]


def objects_of(target: Interpreter, table: Table) -> tuple[list[SharedObject], dict[int, int]]:
    """The shared memory that descriptors need, copied as a restore would have filled it."""
    shared, fds = [], {}
    needed = descriptors.needed(table.files, table.descriptors)
    with pidfd_of(target) as handle:
        for number, memory in enumerate(needed.values()):
            with pidfd.borrowed(handle, memory.fd) as theirs:
                data = os.pread(theirs, memory.size, 0)
            fds[number] = os.memfd_create("object")
            os.pwrite(fds[number], data, 0)
            shared.append(
                SharedObject(
                    id=number,
                    kind=memory.kind,
                    name=memory.name,
                    device=memory.device,
                    inode=memory.inode,
                    size=memory.size,
                )
            )
    return shared, fds


@contextmanager
def pidfd_of(target: Interpreter) -> Iterator[int]:
    handle = pidfd.open(target.pid)
    try:
        yield handle
    finally:
        os.close(handle)


class Rebuilt(Interpreter):
    context: Context


@contextmanager
def rebuilt(target: Interpreter, between: Callable[[], object] = lambda: None) -> Iterator[Rebuilt]:
    """A second process with the descriptors that the target has now. `between` runs after they
    are captured and before they are opened again."""
    table = captured(target)
    assert table.cannot == []
    with ExitStack() as stack:
        shared, fds = objects_of(target, table)
        for fd in fds.values():
            stack.callback(os.close, fd)
        between()
        manifest = Manifest(
            image="test",
            taken_at=0,
            host=Host(boot_id="", kernel="", machine="", vdso=b""),
            processes=(table.process,),
            objects=tuple(shared),
        )
        # Its own stdin and stdout are known only when it exists: the loop's pipes come first.
        stdin, to = os.pipe()
        back, stdout = os.pipe()
        context = Context(manifest, (stdin, stdout, 2), objects=fds)
        try:
            opened = descriptors.open_all(table.process, context)
        except BaseException:
            for fd in (stdin, to, back, stdout):
                os.close(fd)
            raise
        new = Rebuilt.__new__(Rebuilt)
        new.stdin, new.to, new.back, new.stdout, new._rest = stdin, to, back, stdout, b""
        new.process = subprocess.Popen(
            [sys.executable, "-c", LOOP],
            stdin=stdin,
            stdout=stdout,
            pass_fds=list(opened.values()),
        )
        new.pid = new.process.pid
        new.context = context
        stack.callback(new.close)
        new.ask("1")
        with freeze(new.pid) as frozen:
            descriptors.place(table.process, opened, frozen.remote, context)
        for fd in opened.values():
            os.close(fd)
        yield new
