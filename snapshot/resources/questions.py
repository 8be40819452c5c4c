"""What a process and its threads are asked at T0, in one order, and how answers are read."""

from __future__ import annotations

from typing import Any

from ..kernel.remote import dispositions
from . import credentials, layout, threads
from .facts import Facts
from .inquiry import Answer, Inquiry
from .registry import PROCESS_MODULES, THREAD_MODULES


class ThreadQuestions:
    """What each thread is asked, and how its answers are read."""

    def __init__(self, inquiry: Inquiry, facts: Facts) -> None:
        self.inquiry = inquiry
        self.own = threads.ask(inquiry, facts)
        self.securebits = credentials.ask(inquiry, facts)
        self.modules: list[tuple[str, Answer[Any]]] = [
            (module.NAME, module.ask(inquiry, facts)) for module in THREAD_MODULES
        ]


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
        self.leader = ThreadQuestions(self.first, facts)
        self.others = ThreadQuestions(Inquiry(data, size), facts)
        self.packed = self.first.packed(), self.others.inquiry.packed()

    def of(self, i: int) -> ThreadQuestions:
        """Those for the i-th thread."""
        return self.others if i else self.leader

    def now(self, facts: Facts, data: int, size: int) -> Questions:
        """As they have to be: these, if they are still right."""
        if (data, size) != self.place or _about(facts) != self.about:
            return Questions(facts, data, size)
        self.facts.renew(facts)
        return self


def _about(facts: Facts) -> tuple[object, ...]:
    """What decides which calls are made."""
    return dispositions(facts.pid, True, facts.status_texts[facts.pid]), facts.timers_text
