"""Victims of the freezing tests: small C programs that say in a shared page how they fare.

`Victim` compiles nothing twice, starts the program with the page's path as argument 1, waits until
the program itself says that it is ready, and kills it at the end whatever happens.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from tests.harness.processes import open_files

COMMON = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
static volatile struct {
    int64_t ready, returned, result, error, count, bad, elapsed_us, tid;
} *page;
static int64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000ll + now.tv_nsec / 1000;
}
static void open_page(char **argv)
{
    int fd = open(argv[1], O_RDWR | O_CLOEXEC);
    page = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
}
"""
FIELDS = ("ready", "returned", "result", "error", "count", "bad", "elapsed_us", "tid")
_BUILD = Path(tempfile.gettempdir()) / f"snap-freezing-{os.getuid()}"


def wait_until(condition: Callable[[], object], what: str, timeout: float = 20.0) -> None:
    """Polls for a real state; fails with its name."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.0005)


def compiled(source: str, *flags: str) -> Path:
    """The program, compiled once per content."""
    text = COMMON + source
    digest = hashlib.blake2b((text + " ".join(flags)).encode(), digest_size=8).hexdigest()
    program = _BUILD / digest
    if not program.exists():
        _BUILD.mkdir(mode=0o700, exist_ok=True)
        temporary = program.with_suffix(f".{os.getpid()}")
        command = ["gcc", "-O2", "-pthread", "-x", "c", "-", "-o", str(temporary), *flags]
        subprocess.run(command, input=text.encode(), check=True)
        temporary.replace(program)
    return program


class Victim:
    """A running program; its page's fields are attributes (`victim.returned`)."""

    def __init__(self, source: str, *args: str) -> None:
        program = compiled(source)
        self._file = tempfile.NamedTemporaryFile(prefix="victim-")  # noqa: SIM115
        self._file.truncate(4096)
        self._page = mmap.mmap(self._file.fileno(), 4096)
        self.process = subprocess.Popen(
            [program, self._file.name, *args], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        self.pid = self.process.pid

    def __enter__(self) -> Victim:
        try:
            wait_until(lambda: self.get("ready"), "the victim is ready")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.kill(self.pid, signal.SIGKILL) if self.process.poll() is None else None
        self.process.communicate()
        self._page.close()
        self._file.close()

    def get(self, field: str) -> int:
        value: int = struct.unpack_from("q", self._page, 8 * FIELDS.index(field))[0]
        return value

    def put(self, field: str, value: int) -> None:
        struct.pack_into("q", self._page, 8 * FIELDS.index(field), value)

    def wake(self) -> None:
        """What the program does with it is its own affair."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"x")
        self.process.stdin.flush()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def system_call(self, tid: int = 0) -> int:
        """The number of the system call that a thread sleeps in, -1 when it does not."""
        tid = tid or self.pid
        text = Path(f"/proc/{self.pid}/task/{tid}/syscall").read_text()
        return -1 if text.startswith("running") else int(text.split()[0])


def proc_state(pid: int) -> dict[str, object]:
    """What must be the same before and after: maps, descriptors, threads, signal state."""
    state: dict[str, object] = {
        "maps": Path(f"/proc/{pid}/maps").read_text(),
        "fd": open_files(pid),
        "vmflags": [
            line
            for line in Path(f"/proc/{pid}/smaps").read_text().splitlines()
            if line.startswith("VmFlags")
        ],
    }
    kept = ("TracerPid", "SigPnd", "SigBlk", "SigIgn", "SigCgt", "ShdPnd", "Seccomp", "FDSize")
    for tid in sorted(os.listdir(f"/proc/{pid}/task")):
        status = Path(f"/proc/{pid}/task/{tid}/status").read_text()
        state[tid] = [line for line in status.splitlines() if line.startswith(kept)]
    return state
