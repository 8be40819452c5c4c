"""What the process does on each signal (rt_sigaction).

Capture: SigCgt and SigIgn of /proc/PID/status name the signals that are not at their default, so
only those are asked; SIGCHLD always, whose SA_NOCLDWAIT and SA_NOCLDSTOP count with SIG_DFL too.
For the others flags and mask of a default action have no effect and become 0.
"""

from __future__ import annotations

import struct
from signal import SIGCHLD, SIGKILL, SIGSTOP
from typing import TYPE_CHECKING

from ..errors import KernelError
from ..kernel.arch_x86_64 import NR
from ..kernel.errnames import error_name
from ..kernel.remote import Call
from ..manifest import Record
from .context import Context, demand
from .inquiry import Answer, Answers, Inquiry

if TYPE_CHECKING:
    from ..kernel.remote import Remote
    from .facts import Facts

NAME = "signals"
HIGHEST = 64
SIGNALS = tuple(n for n in range(1, HIGHEST + 1) if n not in (SIGKILL, SIGSTOP))
"""Every signal with an action that can be set."""
SET_BYTES = 8
"""sizeof(sigset_t) of the kernel."""
ACTION = struct.Struct("<QQQQ")  # struct sigaction of the kernel: handler, flags, restorer, mask
DEFAULT = ACTION.pack(0, 0, 0, 0)


class Action(Record, frozen=True):
    handler: int  # an address, 0 SIG_DFL, 1 SIG_IGN
    flags: int
    restorer: int
    mask: int  # bit n-1 is signal n


class State(Record, frozen=True):
    actions: dict[int, Action]  # by signal number; the others are at their default


def ask(inquiry: Inquiry, facts: Facts) -> Answer[State]:
    status = facts.status
    set_up = status.mask("SigCgt") | status.mask("SigIgn") | 1 << SIGCHLD - 1
    asked = []
    for number in SIGNALS:
        if set_up >> number - 1 & 1:
            slot = inquiry.space(ACTION.size)
            call = inquiry.call(NR.rt_sigaction, number, 0, slot.address, SET_BYTES)
            asked.append((number, call, slot))

    def answer(answers: Answers) -> State:
        actions = {}
        for number, call, slot in asked:
            if answers.result(call):
                name = error_name(answers.result(call))
                raise KernelError(f"rt_sigaction({number}) in process {facts.pid}: {name}")
            raw = answers.bytes(slot)
            if raw != DEFAULT:
                handler, flags, restorer, mask = ACTION.unpack(raw)
                actions[number] = Action(handler=handler, flags=flags, restorer=restorer, mask=mask)
        return State(actions=actions)

    return answer


def rebuild(state: State, remote: Remote, ctx: Context) -> None:
    """Set every action: the new process has inherited some (Python ignores SIGPIPE)."""
    actions = {
        number: ACTION.pack(one.handler, one.flags, one.restorer, one.mask)
        for number, one in state.actions.items()
    }
    address = remote.put(b"".join(actions.get(number, DEFAULT) for number in SIGNALS))
    demand(
        remote,
        [
            (
                f"action of signal {number}",
                Call(NR.rt_sigaction, (number, address + i * ACTION.size, 0, SET_BYTES)),
            )
            for i, number in enumerate(SIGNALS)
        ],
    )
