"""What every thread has beside its registers: alternate stack, robust list, rseq, name, …

Asked in the thread itself: sigaltstack(2), get_robust_list(2), prctl(PR_GET_TID_ADDRESS,
PR_GET_NAME). Registers, XSAVE area, signal mask and rseq registration come from ptrace.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from ..errors import KernelError
from ..kernel.arch_x86_64 import NR
from ..kernel.errnames import error_name
from ..kernel.remote import Call
from ..manifest import Process, Thread
from .context import Context, attempt, demand
from .inquiry import Answer, Answers, Inquiry

if TYPE_CHECKING:
    from ..kernel.remote import Remote
    from .facts import Facts

PR_SET_NAME, PR_GET_NAME = 15, 16
PR_GET_TID_ADDRESS = 40
STACK = struct.Struct("<QiiQ")  # stack_t: ss_sp, ss_flags, padding, ss_size
SS_ONSTACK, SS_DISABLE = 1, 2
COMM_BYTES = 16
CRITICAL_SECTION = 8
"""Offset and size of rseq_cs in struct rseq."""


class Own(NamedTuple):
    """What the thread itself said."""

    comm: bytes
    altstack: tuple[int, int, int]
    robust_list: tuple[int, int]
    clear_child_tid: int


def ask(inquiry: Inquiry, facts: Facts) -> Answer[Own]:
    stack = inquiry.space(STACK.size)
    got_stack = inquiry.call(NR.sigaltstack, 0, stack.address)
    robust = inquiry.space(16)
    got_robust = inquiry.call(NR.get_robust_list, 0, robust.address, robust.address + 8)
    clear = inquiry.space(8)
    got_clear = inquiry.call(NR.prctl, PR_GET_TID_ADDRESS, clear.address, 0, 0, 0)
    name = inquiry.space(COMM_BYTES)
    got_name = inquiry.call(NR.prctl, PR_GET_NAME, name.address, 0, 0, 0)
    calls = {
        "sigaltstack": got_stack,
        "get_robust_list": got_robust,
        "prctl(PR_GET_TID_ADDRESS)": got_clear,
        "prctl(PR_GET_NAME)": got_name,
    }

    def answer(answers: Answers) -> Own:
        for what, call in calls.items():
            if answers.result(call):
                error = error_name(answers.result(call))
                raise KernelError(f"{what} in process {facts.pid}: {error}", "snap check")
        address, flags, _, size = STACK.unpack(answers.bytes(stack))
        head, length = struct.unpack("<QQ", answers.bytes(robust))
        # SS_ONSTACK only says where the stack pointer is; that is in the registers.
        return Own(
            comm=answers.bytes(name).split(b"\0", 1)[0],
            altstack=(address, flags & ~SS_ONSTACK, size),
            robust_list=(head, length),
            clear_child_tid=int.from_bytes(answers.bytes(clear), "little"),
        )

    return answer


# --- rebuild -------------------------------------------------------------------------------------


def touched(process: Process) -> list[tuple[int, int]]:
    """(address, length) of memory that the kernel itself reads or writes while threads are being
    rebuilt: struct rseq, at every return to user mode once it is registered. A lazy restore has
    these pages in place, or a server running, before `rebuild`."""
    return [(t.rseq.address, t.rseq.size) for t in process.threads if t.rseq is not None]


def critical_sections(process: Process) -> list[tuple[int, bytes]]:
    """(address, bytes) to write into the memory of the new process as the very last thing before
    the final registers are set: injected calls make the kernel clear rseq_cs, and a critical
    section that was interrupted at T0 must find it again to abort as it has to."""
    return [
        (t.rseq.address + CRITICAL_SECTION, t.rseq.critical_section.to_bytes(8, "little"))
        for t in process.threads
        if t.rseq is not None
    ]


def rebuild(thread: Thread, remote: Remote, ctx: Context) -> None:
    """In the thread of `remote`, its memory being mapped. Not here: registers, XSAVE area and
    signal mask (ptrace), fs_base and gs_base among the registers."""
    head, length = thread.robust_list
    address, flags, size = thread.altstack
    stack = remote.put(STACK.pack(address, flags, 0, size))
    name = remote.put(thread.comm[: COMM_BYTES - 1] + b"\0", STACK.size)
    who = f"thread {thread.tid}"
    steps = [
        # Returns the tid, never fails.
        (f"{who}: set_tid_address", Call(NR.set_tid_address, (thread.clear_child_tid,))),
        (f"{who}: alternate signal stack", Call(NR.sigaltstack, (stack, 0))),
    ]
    if length:
        steps.append((f"{who}: robust list", Call(NR.set_robust_list, (head, length))))
    if thread.rseq is not None:
        rseq = thread.rseq
        call = Call(NR.rseq, (rseq.address, rseq.size, rseq.flags, rseq.signature))
        steps.append((f"{who}: rseq", call))
    demand(remote, steps)
    attempt(remote, ctx, [(f"{who}: name", Call(NR.prctl, (PR_SET_NAME, name, 0, 0, 0)))])
