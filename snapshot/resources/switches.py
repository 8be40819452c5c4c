"""Switches of each thread: personality, death signal, time-stamp counter, CPUID.

Asked in the thread itself: personality(2), prctl(2), arch_prctl(2).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from ..kernel.arch_x86_64 import NR
from ..kernel.remote import Call
from ..manifest import Record
from .context import Context, attempt
from .inquiry import Answer, Answers, Inquiry

if TYPE_CHECKING:
    from ..kernel.remote import Remote
    from .facts import Facts

NAME = "switches"

ASK_PERSONALITY = 0xFFFFFFFF
PR_SET_PDEATHSIG, PR_GET_PDEATHSIG = 1, 2
PR_GET_TSC, PR_SET_TSC = 25, 26
TSC_ENABLE = 1
ARCH_GET_CPUID, ARCH_SET_CPUID = 0x1011, 0x1012
INT = struct.Struct("<i4x")


class State(Record, frozen=True):
    personality: int = 0
    death_signal: int = 0  # sent when the parent ends
    tsc: int = TSC_ENABLE  # 2: rdtsc raises SIGSEGV
    cpuid: bool = True  # False: the cpuid instruction raises SIGSEGV


def ask(inquiry: Inquiry, facts: Facts) -> Answer[State]:
    personality = inquiry.call(NR.personality, ASK_PERSONALITY)
    signal = inquiry.space(INT.size)
    got_signal = inquiry.call(NR.prctl, PR_GET_PDEATHSIG, signal.address, 0, 0, 0)
    tsc = inquiry.space(INT.size)
    got_tsc = inquiry.call(NR.prctl, PR_GET_TSC, tsc.address, 0, 0, 0)
    cpuid = inquiry.call(NR.arch_prctl, ARCH_GET_CPUID, 0)

    def answer(answers: Answers) -> State:
        (signal_value,) = INT.unpack(answers.bytes(signal))
        (tsc_value,) = INT.unpack(answers.bytes(tsc))
        return State(
            personality=max(answers.result(personality), 0),
            death_signal=signal_value if answers.result(got_signal) == 0 else 0,
            tsc=tsc_value if answers.result(got_tsc) == 0 else TSC_ENABLE,
            cpuid=answers.result(cpuid) != 0,
        )

    return answer


def rebuild(state: State, remote: Remote, ctx: Context) -> None:
    """In the thread of `remote`, after the last mapping: READ_IMPLIES_EXEC and the address limits
    of a personality would change what mmap does."""
    who = f"thread {remote.tracee.tid}"
    steps = [(f"{who}: personality", Call(NR.personality, (state.personality,)))]
    if state.tsc != TSC_ENABLE:
        steps.append((f"{who}: no rdtsc", Call(NR.prctl, (PR_SET_TSC, state.tsc, 0, 0, 0))))
    if not state.cpuid:
        steps.append((f"{who}: no cpuid", Call(NR.arch_prctl, (ARCH_SET_CPUID, 0))))
    attempt(remote, ctx, steps)


def finish(state: State, remote: Remote, ctx: Context, parent_stays: bool) -> None:
    """After credentials, whose change clears the death signal.

    Its parent is now snap, and it would be killed by the end of a `snap restore` that does not
    wait: then the signal is left out, with a warning.
    """
    if not state.death_signal:
        return
    who = f"thread {remote.tracee.tid}"
    if not parent_stays:
        ctx.warnings.append(
            f"{who}: signal {state.death_signal} at the end of its parent: not restored, the"
            " parent is now snap (kept with --wait)"
        )
        return
    call = Call(NR.prctl, (PR_SET_PDEATHSIG, state.death_signal, 0, 0, 0))
    attempt(remote, ctx, [(f"{who}: death signal {state.death_signal}", call)])
