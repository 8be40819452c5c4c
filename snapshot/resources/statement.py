"""What a process has said of itself at an earlier stop, and whether that still holds.

Some of it can be asked by calls in the process alone (getitimer, prctl, brk): they are made while
it stands still for another reason, and the kernel's record of the same is read with them. As long
as that stays as it was, byte for byte, so do the answers: a later stop reads it, and asks nothing.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ..kernel._native import ffi
from ..kernel.closing import Closing
from ..kernel.remote import Packed, signals_in
from ..kernel.task_iterator import ProcessRecord, TaskProgram
from . import timers
from .facts import Facts, Open
from .questions import Questions

if TYPE_CHECKING:
    from ..freeze import Frozen
    from .inquiry import Answers

LOOKS = 8


class Statement(Closing):
    """`open` and `make` in a stop ask, `holds` in a later one looks again."""

    def __init__(self, pid: int, program: TaskProgram, place: tuple[int, int]) -> None:
        """Before the stop. `place`: where the answers will probably go. OSError: this kernel shows
        no records."""
        self.program = program
        self.answers: Answers | None = None
        self._record: bytes | None = None
        self._before: bytes | None = None
        with ExitStack() as stack:
            records = [stack.enter_context(ProcessRecord(program, pid)) for _ in range(4)]
            before, after, self._stopped, self._asked = records
            self._files = stack.enter_context(Open(pid, [pid]))
            self._meant = before.read()
            self.questions = Questions(Facts.read(pid, [pid], self._files), *place)
            if after.read() != self._meant:
                self._meant = None
            signals_in(self.questions.facts.status_texts[pid])  # for the first use of `remote`
            self._held = stack.pop_all()

    def look(self, frozen: Frozen) -> Packed | None:
        """In the stop: what is to be asked, if it is one batch and the answers go where they were
        to go. Then `note`, or `make`."""
        facts = self.questions.facts
        self._before = self._stopped.read()
        if self._meant is None or self._before != self._meant:
            facts = Facts.first(frozen.pid, self._files)
        self.questions = self.questions.now(facts, *self.questions.place)
        return self.questions.packed[0]

    @property
    def status_text(self) -> bytes:
        """/proc/PID/status as it was at `look`."""
        facts = self.questions.facts
        return facts.status_texts[facts.pid]

    def note(self, answers: Answers) -> None:
        """In the same stop: what has been answered to that."""
        self.answers = answers
        # Memory that is mapped for the calls may change the flags of mm_struct.
        self._record = self._asked.read()

    def make(self, frozen: Frozen) -> None:
        """In the same stop: asks, through `frozen.remote`."""
        remote = frozen.remote
        self.questions = self.questions.now(self.questions.facts, remote.data, remote.data_size)
        self.note(self.questions.first.run(remote, self.questions.packed[0]))

    def make_running(self, guest: Frozen) -> None:
        """Asked of a thread of ours while the others run, again and again, the record read before
        and after each time: it says nothing if what is asked changes just then. Who changes it and
        back all the time, faster than that, is found out by one of so many looks."""
        remote = guest.remote
        self.look(guest)
        self.questions = self.questions.now(self.questions.facts, remote.data, remote.data_size)
        first, packed = self.questions.first, self.questions.packed[0]
        answers = first.run(remote, packed)
        for _ in range(LOOKS):
            with ProcessRecord(self.program, guest.pid) as record:
                if record.read() != self._before or first.run(remote, packed) != answers:
                    return
        self.answers, self._record = answers, self._before

    def lasts(self) -> bool:
        """Whether it may hold: no timer runs, whose time changes by itself."""
        if self._record is None or self.answers is None:
            return False
        answer = dict(self.questions.modules)[timers.NAME]
        state: timers.State = answer(self.answers)
        return not state.intervals and not state.posix

    def holds(self, record: ProcessRecord) -> bool:
        """In a later stop, for which `record` was made: nothing has changed."""
        return self._record is not None and record.read() == self._record

    def lend(self, to: Any, record: ProcessRecord) -> None:
        """To a snap_instant, which is to look in place of `holds`; `lasts` is true."""
        to.record_fd = record.fd
        to.record = ffi.from_buffer("unsigned char[]", self._record)

    def close(self) -> None:
        self._held.close()
