"""Process and thread records: gathered in the pause, put together when the target runs again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from signal import SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU
from typing import TYPE_CHECKING, Any

import msgspec

from .. import manifest
from ..kernel.closing import Closing
from ..kernel.remote import dispositions
from ..manifest import Descriptor, Mapping, OpenFile, Process, Thread, pack
from . import credentials, layout, pending, threads
from .facts import Facts, Open
from .inquiry import Answer, Answers, Inquiry
from .registry import PROCESS_MODULES, THREAD_MODULES

if TYPE_CHECKING:
    from ..freeze import Frozen
    from ..kernel.ptrace import State

STOP_SIGNALS = (SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU)
"""ptrace(2): in a group-stop a seized thread reports the signal that stopped it."""


class _ThreadQuestions:
    """What each thread is asked, and how its answers are read."""

    def __init__(self, inquiry: Inquiry, facts: Facts) -> None:
        self.inquiry = inquiry
        self.own = threads.ask(inquiry, facts)
        self.securebits = credentials.ask(inquiry, facts)
        self.modules: list[tuple[str, Answer[Any]]] = [
            (module.NAME, module.ask(inquiry, facts)) for module in THREAD_MODULES
        ]


@dataclass(frozen=True)
class _RawThread:
    tid: int
    state: State
    pending: Sequence[bytes]
    questions: _ThreadQuestions
    answers: Answers


@dataclass(frozen=True)
class Gathered:
    """All of a process at T0 but memory and descriptors, most of it not yet looked at."""

    facts: Facts
    stopped: bool
    pending: Sequence[bytes]
    raw_threads: tuple[_RawThread, ...]
    process_answers: Answers
    layout: Answer[manifest.MemoryLayout]
    modules: list[tuple[str, Answer[Any]]]

    def threads(self) -> tuple[Thread, ...]:
        """The leader first."""
        known: dict[credentials.State, msgspec.Raw] = {}
        return tuple(self._thread(raw, known) for raw in self.raw_threads)

    def _thread(self, raw: _RawThread, known: dict[credentials.State, msgspec.Raw]) -> Thread:
        own = raw.questions.own(raw.answers)
        status = self.facts.statuses[raw.tid]
        who = credentials.state(status, raw.questions.securebits(raw.answers))
        state = {name: pack(answer(raw.answers)) for name, answer in raw.questions.modules}
        state[credentials.NAME] = known.setdefault(who, pack(who))
        return Thread(
            tid=self.facts.inner(raw.tid),
            comm=own.comm,
            registers=raw.state.registers,
            xstate=raw.state.xstate,
            signal_mask=raw.state.signal_mask,
            altstack=own.altstack,
            robust_list=own.robust_list,
            clear_child_tid=own.clear_child_tid,
            rseq=_rseq(raw.state),
            pending=pending.complete(raw.pending, status.mask("SigPnd")),
            state=state,
        )

    def process(
        self,
        index: int,
        *,
        mappings: tuple[Mapping, ...],
        files: tuple[OpenFile, ...] = (),
        descriptors: tuple[Descriptor, ...] = (),
        state: dict[str, msgspec.Raw] | None = None,
    ) -> Process:
        """The record of the process; what is not kept here is passed in. `state`: of further
        modules, by NAME."""
        facts, status = self.facts, self.facts.status
        all_threads = self.threads()
        own = {name: pack(answer(self.process_answers)) for name, answer in self.modules}
        return Process(
            index=index,
            pid=facts.inner(facts.pid),
            ppid=facts.stat.ppid,
            pgid=status.numbers("NSpgid")[-1],
            sid=status.numbers("NSsid")[-1],
            comm=all_threads[0].comm,
            cmdline=facts.cmdline,
            start_ticks=facts.stat.start_ticks,
            exe=facts.exe,
            cwd=facts.cwd,
            root=facts.root,
            umask=status.umask,
            personality=facts.personality,
            layout=self.layout(self.process_answers),
            mappings=mappings,
            threads=all_threads,
            files=files,
            descriptors=descriptors,
            pending=pending.complete(self.pending, status.mask("ShdPnd")),
            stopped=self.stopped,
            state={**own, **(state or {})},
        )

    def warnings(self) -> list[str]:
        """What a restore of it will lack."""
        securebits = 0
        found = {
            credentials.warning(credentials.state(status, securebits), self.facts.pid)
            for status in self.facts.statuses.values()
        }
        return sorted(text for text in found if text)


class Questions:
    """What a process is asked in the pause: put into words before it, from facts of then."""

    def __init__(self, facts: Facts, data: int, size: int) -> None:
        """[data, data + size): where the answers go."""
        self.facts = facts
        self.place = (data, size)
        self.about = _about(facts)
        self.first = Inquiry(data, size)
        self.layout = layout.ask(self.first, facts)
        self.modules = [(module.NAME, module.ask(self.first, facts)) for module in PROCESS_MODULES]
        self.leader = _ThreadQuestions(self.first, facts)
        self.others = _ThreadQuestions(Inquiry(data, size), facts)

    def now(self, facts: Facts, data: int, size: int) -> Questions:
        """As they have to be: these, if they are still right."""
        if (data, size) != self.place or _about(facts) != self.about:
            return Questions(facts, data, size)
        self.facts.renew(facts)
        return self


class Preparation(Closing):
    """What `gather` can have ready before the pause, from the process as it runs. `place`: where
    the answers will probably go."""

    def __init__(self, pid: int, place: tuple[int, int]) -> None:
        self.files = Open(pid)
        try:
            # Of the others nothing is asked that depends on what they are, and they may end.
            self.questions = Questions(Facts.read(pid, [pid], self.files), *place)
        except BaseException:
            self.files.close()
            raise

    def close(self) -> None:
        self.files.close()


def _about(facts: Facts) -> tuple[object, ...]:
    """What decides which calls are made."""
    return dispositions(facts.pid, True, facts.status_texts[facts.pid]), facts.timers_text


def gather(frozen: Frozen, prepared: Preparation | None = None) -> Gathered:
    """In the pause: reads /proc, asks every thread by one injected batch each, decodes nothing."""
    leader, others = frozen.threads[0], frozen.threads[1:]
    states = frozen.states()
    files = prepared.files if prepared else None
    facts = Facts.read(frozen.pid, [tracee.tid for tracee in frozen.threads], files)
    remote = frozen.open_remote(facts.status_texts[frozen.pid])
    place = (remote.data, remote.data_size)
    questions = prepared.questions.now(facts, *place) if prepared else Questions(facts, *place)
    leader_answers = questions.first.run(remote)
    answers = questions.others.inquiry.run_in(remote, others)
    raw = [
        _RawThread(
            tid=tracee.tid,
            state=state,
            pending=tracee.pending(shared=False) if state.pending else (),
            questions=questions.leader if tracee is leader else questions.others,
            answers=answer,
        )
        for tracee, state, answer in zip(
            frozen.threads, states, [leader_answers, *answers], strict=True
        )
    ]
    return Gathered(
        facts=questions.facts,
        stopped=(leader.stop >> 8 & 0xFF) in STOP_SIGNALS,
        pending=leader.pending(shared=True),
        raw_threads=tuple(raw),
        process_answers=leader_answers,
        layout=questions.layout,
        modules=questions.modules,
    )


def _rseq(state: State) -> manifest.Rseq | None:
    """The registration with the critical section that was interrupted; injected calls clear that
    field, and Remote puts it back."""
    if state.rseq is None:
        return None
    return manifest.Rseq(
        address=state.rseq.address,
        size=state.rseq.size,
        signature=state.rseq.signature,
        flags=state.rseq.flags,
        critical_section=state.critical_section,
    )


def capture_process(
    frozen: Frozen,
    index: int,
    *,
    mappings: tuple[Mapping, ...],
    files: tuple[OpenFile, ...] = (),
    descriptors: tuple[Descriptor, ...] = (),
) -> Process:
    """`gather` and `Gathered.process` in one: simpler, and more of it in the pause."""
    return gather(frozen).process(index, mappings=mappings, files=files, descriptors=descriptors)
