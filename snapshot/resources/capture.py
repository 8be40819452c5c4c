"""Process and thread records: gathered in the pause, put together when the target runs again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from .. import manifest
from ..kernel.closing import Closing
from ..kernel.ptrace import StateRoom
from ..kernel.remote import dispositions
from ..manifest import Descriptor, Mapping, OpenFile, Process, Thread, pack
from . import credentials, layout, pending, threads
from .facts import Facts, Open
from .inquiry import Answer, Answers, Inquiry
from .registry import PROCESS_MODULES, THREAD_MODULES

if TYPE_CHECKING:
    from ..freeze import Frozen
    from ..kernel.ptrace import State, States, Tracee

_NONE_PENDING = b"\nSigPnd:\t0000000000000000\n"
FEW_MORE = 8
"""Threads that there may be at T0, and were not a moment before."""


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
class Gathered:
    """All of a process at T0 but memory and descriptors, most of it not yet looked at."""

    facts: Facts
    stopped: bool
    states: States
    registers: dict[int, bytes]
    """By tid, where they are not those of `states`."""
    questions: Questions
    replies: Callable[[int], Answers]
    """Of the thread at this place of `facts.status_texts`, which begin with the leader."""
    tracees: Sequence[Tracee]
    files: Open | None
    pending: list[bytes] = field(default_factory=list)
    thread_pending: dict[int, list[bytes]] = field(default_factory=dict)
    """By tid, where there are any."""

    def complete(self) -> None:
        """The rest of /proc, and which signals wait: any time before the target runs on. The
        queues come after the sets of `status`: what is in a set is in its queue by then, and the
        set is believed where the queue has lost it."""
        facts = self.facts
        tids = [tracee.tid for tracee in self.tracees]
        facts.renew(Facts.read(facts.pid, tids, self.files))
        self.pending[:] = self.tracees[0].pending(shared=True)
        for tracee in self.tracees:
            if _NONE_PENDING not in facts.status_texts[tracee.tid]:
                self.thread_pending[tracee.tid] = tracee.pending(shared=False)

    def threads(self) -> tuple[Thread, ...]:
        """The leader first."""
        known: dict[credentials.State, msgspec.Raw] = {}
        both = zip(self.facts.status_texts, self.states.decode(), strict=True)
        return tuple(self._thread(i, tid, state, known) for i, (tid, state) in enumerate(both))

    def _thread(
        self, i: int, tid: int, held: State, known: dict[credentials.State, msgspec.Raw]
    ) -> Thread:
        questions, answers = self.questions.of(i), self.replies(i)
        own = questions.own(answers)
        status = self.facts.statuses[tid]
        who = credentials.state(status, questions.securebits(answers))
        state = {name: pack(answer(answers)) for name, answer in questions.modules}
        state[credentials.NAME] = known.setdefault(who, pack(who))
        return Thread(
            tid=self.facts.inner(tid),
            comm=own.comm,
            registers=self.registers.get(tid, held.registers),
            xstate=held.xstate,
            signal_mask=held.signal_mask,
            altstack=own.altstack,
            robust_list=own.robust_list,
            clear_child_tid=own.clear_child_tid,
            rseq=_rseq(held),
            pending=pending.complete(self.thread_pending.get(tid, ()), status.mask("SigPnd")),
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
        answers, questions = self.replies(0), self.questions
        own = {name: pack(answer(answers)) for name, answer in questions.modules}
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
            layout=questions.layout(answers),
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
        self.packed = self.first.packed(), self.others.inquiry.packed()

    def of(self, i: int) -> _ThreadQuestions:
        """Those for the i-th thread."""
        return self.others if i else self.leader

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
            self.states = StateRoom(len(self.files.tids) + FEW_MORE)
        except BaseException:
            self.files.close()
            raise

    def close(self) -> None:
        self.files.close()


def _about(facts: Facts) -> tuple[object, ...]:
    """What decides which calls are made."""
    return dispositions(facts.pid, True, facts.status_texts[facts.pid]), facts.timers_text


def gather(frozen: Frozen, prepared: Preparation | None = None) -> Gathered:
    """In the pause: asks every thread by one injected batch each, decodes nothing. Then comes
    `complete`."""
    states = frozen.states(prepared.states if prepared else None)
    files = prepared.files if prepared else None
    facts = Facts.first(frozen.pid, files)
    registers = frozen.restarting()
    questions, replies = _asked(frozen, facts, prepared)
    return Gathered(
        facts=questions.facts,
        stopped=frozen.group_stopped,
        states=states,
        registers=registers,
        questions=questions,
        replies=replies,
        tracees=frozen.threads,
        files=files,
    )


def _asked(
    frozen: Frozen, facts: Facts, prepared: Preparation | None
) -> tuple[Questions, Callable[[int], Answers]]:
    """What all threads answer: in one go, if where the answers will be is known."""
    status = facts.status_texts[frozen.pid]
    if prepared is not None:
        questions = prepared.questions.now(facts, *frozen.data)
        first, others = questions.packed
        if first is not None and others is not None:
            found = frozen.interview(first, others, status)
            if found is not None:
                return questions, lambda i: Answers.single(*found.of(i))
    remote = frozen.open_remote(status)
    place = (remote.data, remote.data_size)
    questions = prepared.questions.now(facts, *place) if prepared else Questions(facts, *place)
    replies = [
        questions.of(i).inquiry.run(remote.on(tracee) if i else remote)
        for i, tracee in enumerate(frozen.threads)
    ]
    return questions, replies.__getitem__


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
    gathered = gather(frozen)
    gathered.complete()
    return gathered.process(index, mappings=mappings, files=files, descriptors=descriptors)
