"""Process and thread records: gathered in the pause, put together when the target runs again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from .. import manifest
from ..kernel import procfs
from ..kernel.closing import Closing
from ..kernel.ptrace import StateRoom, States
from ..kernel.task_iterator import ProcessRecord, TaskAnswers
from ..manifest import Descriptor, Mapping, OpenFile, Process, Thread, pack
from . import credentials, pending
from .facts import Facts, Open
from .inquiry import Answers
from .questions import Questions, ThreadQuestions

if TYPE_CHECKING:
    from ..freeze import Frozen
    from ..kernel.ptrace import State, Tracee
    from .statement import Statement

_NONE_PENDING = b"\nSigPnd:\t0000000000000000\n"
FEW_MORE = 8
"""Threads that there may be at T0, and were not a moment before."""


class Replies(NamedTuple):
    """What a process and its threads have answered."""

    questions: Questions
    process: Answers
    thread: Callable[[int], tuple[ThreadQuestions, Answers]]
    """Of the thread at this place of the list that begins with the leader."""
    unlike: Callable[[int], bool]
    """Whether that one's status may have more to say than the leader's."""


@dataclass
class Gathered:
    """All of a process at T0 but memory and descriptors, most of it not yet looked at."""

    frozen: Frozen
    facts: Facts
    stopped: bool
    prepared: Preparation | None
    registers: dict[int, bytes]
    """By tid, where they are not those of `states`."""
    replies: Replies
    states: States | None
    """None: they can still be read, for nobody has made a call."""
    tracees: Sequence[Tracee]
    """In their order are `states` and `replies`."""
    asked: bool
    """Calls were made in a thread: the kernel has written to its memory for them."""
    pending: list[bytes] = field(default_factory=list)
    thread_pending: dict[int, list[bytes]] = field(default_factory=dict)
    """By tid, where there are any."""
    later: Callable[[], None] | None = None
    """What is left to be done with what has been read."""

    def read_states(self) -> None:
        """What the threads hold: any time before the target runs on."""
        if self.states is None:
            self.states = _states(self.frozen, self.prepared)

    def complete(self) -> None:
        """The same, the rest of /proc, and which signals wait: any time before the target runs on.
        The queues come after the sets of `status`: what is in a set is in its queue by then, and
        the set is believed where the queue has lost it."""
        self.read_states()
        facts = self.facts
        every = facts.nested  # only there the number that a thread has for itself is told
        leader, *others = self.tracees
        some = [one for i, one in enumerate(others, 1) if every or self.replies.unlike(i)]
        files = self.prepared.files if self.prepared else None
        read = partial(Facts.read, facts.pid, [leader.tid, *(one.tid for one in some)], files)
        status = files.status if files else None
        if status is None or some:
            facts.renew(read())
            statuses = facts.status_texts
        else:  # all of it is there
            self.later = lambda: facts.renew(read())
            statuses = {leader.tid: status}
        self.pending[:] = leader.pending(shared=True)
        for tracee in (leader, *some):
            if _NONE_PENDING not in statuses[tracee.tid]:
                self.thread_pending[tracee.tid] = tracee.pending(shared=False)

    @classmethod
    def over(cls, frozen: Frozen, prepared: Preparation) -> Gathered:
        """Of a stop that is over: made where `prepared` has been read elsewhere, all of it, the
        statement holds, and no signal waits for anybody."""
        statement = prepared.statement
        assert statement is not None
        assert statement.answers is not None
        replies = _from_outside(prepared, prepared.questions, statement.answers)
        facts, files = replies.questions.facts, prepared.files
        files.looked()
        return cls(
            frozen=frozen,
            facts=facts,
            stopped=frozen.group_stopped,
            prepared=prepared,
            registers=frozen.restarting(),
            replies=replies,
            states=States(frozen.threads, prepared.states),
            tracees=frozen.threads,
            asked=False,
            later=lambda: facts.renew(Facts.read(facts.pid, [facts.pid], files)),
        )

    def understood(self) -> Facts:
        """After `complete`, any time."""
        later, self.later = self.later, None
        if later is not None:
            later()
        return self.facts

    def threads(self) -> tuple[Thread, ...]:
        """The leader first."""
        self.understood()
        known: dict[credentials.State, msgspec.Raw] = {}
        assert self.states is not None, "it is not complete"
        both = zip(self.tracees, self.states.decode(), strict=True)
        return tuple(self._thread(i, one.tid, state, known) for i, (one, state) in enumerate(both))

    def _thread(
        self, i: int, tid: int, held: State, known: dict[credentials.State, msgspec.Raw]
    ) -> Thread:
        questions, answers = self.replies.thread(i)
        own = questions.own(answers)
        told = self.facts.statuses.get(tid)
        status = told or self.facts.status
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
            pending=pending.complete(
                self.thread_pending.get(tid, ()), told.mask("SigPnd") if told else 0
            ),
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
        facts = self.understood()
        status = facts.status
        all_threads = self.threads()
        answers, questions = self.replies.process, self.replies.questions
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
            for status in self.understood().statuses.values()
        }
        return sorted(text for text in found if text)


class Preparation(Closing):
    """What `gather` can have ready before the pause, from the process as it runs. `place`: where
    the answers will probably go. `statement`: what it has said at an earlier stop, if that was
    possible."""

    def __init__(
        self, pid: int, place: tuple[int, int], statement: Statement | None = None
    ) -> None:
        self.statement = statement if statement is not None and statement.lasts() else None
        self.record: ProcessRecord | None = None
        """To see whether that holds."""
        self.outside: TaskAnswers | None = None
        with ExitStack() as stack:
            self.files = stack.enter_context(Open(pid))
            self.reading = self.files.prepare()
            most = len(procfs.threads(pid)) + FEW_MORE
            self.states = StateRoom(most)
            # Of the others nothing is asked that depends on what they are, and they may end.
            self.questions = (
                statement.questions
                if statement is not None
                else Questions(Facts.read(pid, [pid], self.files), *place)
            )
            self.each = self.questions.others
            packed = self.questions.packed[1]
            if statement is not None and packed is not None:
                with suppress(OSError):
                    made = TaskAnswers(statement.program, pid, most, packed)
                    self.outside = stack.enter_context(made)
                    self.record = stack.enter_context(ProcessRecord(statement.program, pid))
            self._held = stack.pop_all()

    def close(self) -> None:
        self._held.close()


def gather(frozen: Frozen, prepared: Preparation | None = None) -> Gathered:
    """In the pause: reads what all would answer from outside, and asks nobody, or the leader alone
    when the process itself has changed; all, where it cannot be read. Decodes nothing. Then comes
    `complete`."""
    registers = frozen.restarting()
    states = replies = None
    asked = True
    if prepared is not None and _read_outside(frozen, prepared):
        replies = _unasked(prepared)
        asked = replies is None
        if replies is None:
            states = _states(frozen, prepared)
            replies = _from_outside(prepared, *_ask(frozen, frozen.threads[:1], prepared)[:2])
    else:
        states = _states(frozen, prepared)
        replies = _ask(frozen, frozen.threads, prepared)
    return Gathered(
        frozen=frozen,
        facts=replies.questions.facts,
        stopped=frozen.group_stopped,
        prepared=prepared,
        registers=registers,
        replies=replies,
        states=states,
        tracees=frozen.threads,
        asked=asked,
    )


def _states(frozen: Frozen, prepared: Preparation | None) -> States:
    return frozen.states(prepared.states if prepared else None)


def _read_outside(frozen: Frozen, prepared: Preparation) -> bool:
    """Whether what the threads would answer could be read from outside."""
    outside = prepared.outside
    tids = [tracee.tid for tracee in frozen.threads]
    return outside is not None and outside.read(tids, prepared.questions.place[0])


def _unasked(prepared: Preparation) -> Replies | None:
    """None: the process has changed, the leader has to be asked."""
    statement, record = prepared.statement, prepared.record
    if statement is None or statement.answers is None or record is None:
        return None
    if not statement.holds(record):
        return None
    return _from_outside(prepared, prepared.questions, statement.answers)


def _from_outside(prepared: Preparation, questions: Questions, process: Answers) -> Replies:
    """`process`: what it has answered to these questions."""
    each, outside = prepared.each, prepared.outside
    assert outside is not None
    return Replies(
        questions, process, lambda i: (each, Answers.single(*outside.of(i))), outside.unlike
    )


def _ask(frozen: Frozen, tracees: Sequence[Tracee], prepared: Preparation | None) -> Replies:
    """What the threads (the leader, or all) answer, by one injected batch each: in one go, if where
    the answers will be is known."""
    facts = Facts.first(frozen.pid, prepared.files if prepared else None)
    status = facts.status_texts[frozen.pid]
    if prepared is not None:
        questions = prepared.questions.now(facts, *frozen.data)
        first, others = questions.packed
        if first is not None and others is not None:
            found = frozen.interview(first, others, tracees, status)
            if found is not None:
                return _answered(questions, lambda i: Answers.single(*found.of(i)))
    remote = frozen.open_remote(status)
    place = (remote.data, remote.data_size)
    questions = prepared.questions.now(facts, *place) if prepared else Questions(facts, *place)
    replies = [
        questions.of(i).inquiry.run(remote.on(tracee) if i else remote)
        for i, tracee in enumerate(tracees)
    ]
    return _answered(questions, replies.__getitem__)


def _answered(questions: Questions, reply: Callable[[int], Answers]) -> Replies:
    """The leader has been asked for the process as well."""
    return Replies(questions, reply(0), lambda i: (questions.of(i), reply(i)), lambda _: True)


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
