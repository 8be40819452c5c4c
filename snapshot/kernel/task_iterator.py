"""What the kernel keeps of threads, read from outside: a BPF program run by the task iterator.

Some of what a thread or a process has is told to itself only (sigaltstack, prctl): calls made there
take 50 us for each thread, in the pause. This takes 2, and the threads notice nothing. Where it
cannot be had (no CAP_BPF, before Linux 6.1, no BTF, a pid namespace of our own), or is not wanted
(SNAP_NO_BPF in the environment), those calls remain.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any

from ..worker import Worker
from . import remote
from ._native import ffi, lib
from .closing import Closing
from .touched import touched

UNWANTED = "SNAP_NO_BPF"


class TaskProgram(Closing):
    """The loaded program. That takes 10 ms, in a thread of its own; `error` waits for it."""

    def __init__(self) -> None:
        self._made = ffi.new("snap_task_program **")
        self._bits = ffi.new("snap_task_bits *")
        self._result = 0
        self._loader = Worker("snap-bpf", self._load)

    def _load(self) -> None:
        if UNWANTED in os.environ:
            self._result = -errno.EPERM
            return
        self._result = lib.snap_task_program_load(self._made)
        if self._result == 0:
            self._result = lib.snap_task_find_bits(self._made[0], self._bits)

    @property
    def error(self) -> int:
        """-errno with which it could not be loaded, or 0."""
        self._loader.join()
        return self._result

    def iterator(self, number: int, what: int) -> int:
        """A descriptor to be read once: `snap_task_iterator`. OSError."""
        fd: int = lib.snap_task_iterator(self._made[0], number, what)
        if fd < 0:
            raise OSError(-fd, os.strerror(-fd))
        return fd

    def list_faults(self, pid: int, made: Any) -> int:
        """`snap_fault_list_open` -> 0 or -errno."""
        return self.error or int(lib.snap_fault_list_open(self._made[0], pid, made))

    @property
    def bits(self) -> Any:
        return self._bits[0]

    def close(self) -> None:
        """Iterators stay good."""
        self._loader.join()
        lib.snap_task_program_free(self._made[0])
        self._made[0] = ffi.NULL


class ProcessRecord(Closing):
    """The kernel's record of a process, as bytes to be compared: `snap_process`. Each can be read
    once, when it is wanted; made before that (OSError)."""

    def __init__(self, program: TaskProgram, pid: int) -> None:
        self.fd = program.iterator(pid, lib.SNAP_OF_PROCESS)
        self._room = bytearray(ffi.sizeof("snap_process"))

    def read(self) -> bytes | None:
        """None: the process has ended."""
        size = len(self._room)
        found = lib.snap_task_read(self.fd, ffi.from_buffer(self._room), size)
        return bytes(self._room) if found == size else None

    def close(self) -> None:
        os.close(self.fd)


class TaskAnswers(Closing):
    """What system calls would return in the threads of a process: for one time, at any moment.
    Made before that, with room for `most` threads (OSError)."""

    def __init__(self, program: TaskProgram, pid: int, most: int, questions: remote.Packed) -> None:
        self._bits = program.bits
        self._most = most
        self._questions = questions
        self._tasks = touched(most * ffi.sizeof("snap_task"))
        self._unlike = bytearray(most)
        self._results = touched(most * 8 * len(questions.calls))
        self._answers = touched(most * questions.size)
        self._asked = remote.questions(questions, self._results, self._answers)
        self._fd = program.iterator(pid, lib.SNAP_OF_THREADS)

    def lend(self, to: Any, data: int) -> None:
        """To a snap_instant, which is to read them in place of `read`."""
        to.tasks_fd = self._fd
        to.tasks, to.tasks_size = ffi.from_buffer("snap_task[]", self._tasks), len(self._tasks)
        to.unlike = ffi.from_buffer("unsigned char[]", self._unlike)
        to.bits, to.data, to.questions = self._bits, data, self._asked

    def read(self, tids: Sequence[int], data: int) -> bool:
        """Answers for these threads; `data`: where the calls of `questions` would write. False:
        they have to be asked (there are more threads, or a question that only they can answer)."""
        if len(tids) > self._most:
            return False
        tasks = ffi.from_buffer("snap_task[]", self._tasks)
        found = lib.snap_task_read(self._fd, tasks, len(self._tasks))
        if found < 0:
            return False
        known, count = found // ffi.sizeof("snap_task"), len(tids)
        if lib.snap_task_sort(tasks, known, tids, count) < 0:
            return False
        lib.snap_task_compare(tasks, count, ffi.from_buffer("unsigned char[]", self._unlike))
        answered: int = lib.snap_answer(tasks, count, self._bits, data, self._asked)
        return answered == 0

    def of(self, i: int) -> tuple[list[int], bytes]:
        """Results and what was written, of the i-th thread."""
        return self._questions.decoded(self._results, self._answers, i)

    def unlike(self, i: int) -> bool:
        """Whether /proc/PID/task/TID/status has more to say of the i-th thread than of the first:
        other credentials, no_new_privs or seccomp mode, or a signal that waits for it."""
        return self._unlike[i] != 0

    def close(self) -> None:
        os.close(self._fd)
