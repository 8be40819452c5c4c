"""Signals that were queued for a thread or for the process and not yet taken.

Captured with PTRACE_PEEKSIGINFO, 128 bytes of siginfo each, in the order of delivery. Rebuilt from
inside: towards itself a thread may queue any siginfo, whatever its si_code (kernel/signal.c,
do_rt_sigqueueinfo), as long as all signals are blocked in every thread meanwhile.

A signal of a timer becomes an ordinary one: the timer no longer waits for it to be taken.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from signal import SIGKILL, SIGSTOP
from typing import TYPE_CHECKING

from ..kernel.arch_x86_64 import NR
from ..kernel.remote import Call
from ..manifest import Process
from .context import Context, attempt

if TYPE_CHECKING:
    from ..kernel.remote import Remote

SIGINFO = 128


def number(info: bytes) -> int:
    """si_signo"""
    return int.from_bytes(info[:4], "little")


def complete(queue: Sequence[bytes], waiting: int) -> tuple[bytes, ...]:
    """The queue, and for a signal of the set `waiting` that has no entry (the kernel was short of
    memory) what it would be delivered with: si_code SI_USER from pid 0."""
    queued = {number(info) for info in queue}
    lost = [n for n in range(1, 65) if waiting >> n - 1 & 1 and n not in queued]
    return *queue, *(struct.pack("<i", n).ljust(SIGINFO, b"\0") for n in lost)


def rebuild(process: Process, remotes: Mapping[int, Remote], ctx: Context) -> None:
    """Queue them again, the actions of all signals being set. `remotes` by Thread.tid, in which
    all signals are blocked."""
    _queue(process.pending, process.pid, None, remotes[process.threads[0].tid], ctx)
    for thread in process.threads:
        _queue(thread.pending, process.pid, thread.tid, remotes[thread.tid], ctx)


def _queue(infos: Sequence[bytes], pid: int, tid: int | None, remote: Remote, ctx: Context) -> None:
    per_round = remote.data_size // SIGINFO
    # SIGKILL and SIGSTOP cannot be blocked: they would take effect at once.
    sent = [info for info in infos if number(info) not in (SIGKILL, SIGSTOP)]
    for first in range(0, len(sent), per_round):
        some = sent[first : first + per_round]
        address = remote.put(b"".join(info.ljust(SIGINFO, b"\0") for info in some))
        steps = []
        for i, info in enumerate(some):
            sig = number(info)
            at = address + i * SIGINFO
            if tid is None:
                call = Call(NR.rt_sigqueueinfo, (pid, sig, at))
            else:
                call = Call(NR.rt_tgsigqueueinfo, (pid, tid, sig, at))
            steps.append((f"pending signal {sig} of {tid or pid}", call))
        attempt(remote, ctx, steps)
