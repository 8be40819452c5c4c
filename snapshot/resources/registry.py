"""The kinds of state that go into `Process.state` and `Thread.state`, by NAME.

`credentials` is not among them: it reads a thread's status where these ask, and comes last of all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from . import limits, scheduling, settings, signals, switches, timers

if TYPE_CHECKING:
    from .facts import Facts
    from .inquiry import Answer, Inquiry


class Module(Protocol):
    """A kind of state: asks in the stopped target, answers after it runs again."""

    @property
    def NAME(self) -> str: ...

    @property
    def State(self) -> type[Any]: ...

    def ask(self, inquiry: Inquiry, facts: Facts, /) -> Answer[Any]: ...


PROCESS_MODULES: tuple[Module, ...] = (settings, signals, timers, limits)
THREAD_MODULES: tuple[Module, ...] = (scheduling, switches)
