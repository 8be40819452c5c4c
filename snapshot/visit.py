"""A thread of ours in a target that runs on: for calls inside it that stop nobody.

One thread of the target is stopped for as long as it takes to make another (clone); all that is to
be done is done by that one, which has a table of descriptors of its own, so that no fork of the
target inherits what it holds, and no signal. Then it ends. If this process dies it ends by itself.

A process with only one thread is not visited: to stop it is to stop all, and it could find out that
it has another (unshare(2) and setns(2) refuse then).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from . import faults
from .errors import SnapError, TargetError
from .freeze import DEFERRED, LATE_SECONDS, Frozen, freeze
from .kernel import arch_x86_64 as arch
from .kernel import pidfd, procfs, ptrace
from .kernel.arch_x86_64 import NR, Registers
from .kernel.ptrace import LateError, Tracee
from .kernel.remote import Call, Remote, dispositions
from .kernel.room import Room

_CLONE = 0x100 | 0x400 | 0x800 | 0x2000 | 0x10000
"""VM, FILES, SIGHAND, PTRACE, THREAD: sched.h"""
_UNSHARE = 1 << 1
"""CLOSE_RANGE_UNSHARE"""
_ALL_SIGNALS = (1 << 64) - 1
_EVERY = 0xFFFF_FFFF
_DONTFORK = 10
"""MADV_DONTFORK: no child of the target has what we have mapped"""
_LOOKS = 16


class Visit(NamedTuple):
    """`host`: the one thread that was stopped, as an earlier freeze of the process; None: none was.
    `guest`: our thread, stopped; None: it cannot be had."""

    host: Frozen | None = None
    guest: Frozen | None = None


@contextmanager
def visiting(pid: int, room: Room, scratch: int) -> Iterator[Visit]:
    """A visit for the length of a `with` block. `room`, `scratch`: as of `freeze`.

    TargetError: the process has ended. What is missing where it cannot be had (one thread, a
    kernel before 6.9, a limit on threads) has to be done in a stop of all.
    """
    thread = _sleeper(pid) if _possible(room) else 0
    if not thread:
        yield Visit()
        return
    held = signal.pthread_sigmask(signal.SIG_BLOCK, DEFERRED)
    guest: Frozen | None = None
    try:
        host, guest = _enter(pid, thread, room, scratch)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        yield Visit(host, guest)
        if host is not None and guest is not None:
            host.scratch, host.data = guest.scratch, guest.data
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, DEFERRED)
        if guest is not None:
            _leave(guest)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _possible(room: Room) -> bool:
    if not room.guard:
        return False
    found = _handle(os.getpid())
    if found >= 0:
        os.close(found)
    return found >= 0


def _handle(tid: int) -> int:
    """A pidfd of the thread, or -1."""
    try:
        return pidfd.find(tid, pidfd.THREAD)
    except SnapError:
        return -1


def _sleeper(pid: int) -> int:
    """A thread that sleeps, and so does not miss its time; else any, but not the leader
    (`Frozen.stay` has the reason). 0: there is no other."""
    _, *others = procfs.threads(pid)
    for tid in others[:_LOOKS]:
        with suppress(TargetError):
            if procfs.stat(pid, tid).state == "S":
                return tid
    return others[0] if others else 0


def _enter(pid: int, thread: int, room: Room, scratch: int) -> tuple[Frozen | None, Frozen | None]:
    remote = Remote(Tracee(thread, 0), room=room)
    try:
        remote.look()
        with freeze(pid, room=room, scratch=scratch, only=thread) as host:
            faults.point("visited")
            inner = remote.clone(host.threads[0], _CLONE)
    except (TargetError, LateError) as error:
        remote.wipe()
        if isinstance(error, LateError) and not error.let_go(LATE_SECONDS):
            raise
        return None, None  # that thread has ended; of the process the next one tells
    if inner is None:
        remote.wipe()
        return host, None
    faults.point("guest-made")
    room = remote.room or room
    tracee = _settled(pid, inner, host.threads[0].options, room.instruction)
    if tracee is None:
        return host, None  # it was killed: what it stands in stays, in case that it was not
    remote.wipe()
    return host, _guest(pid, tracee, room, scratch)


def _settled(pid: int, inner: int, options: int, instruction: int) -> Tracee | None:
    """It stands at its birth, in code of the guard; from here on it would end by an instruction of
    the target's own."""
    try:
        tracee = ptrace.adopt(procfs.outer_tid(pid, inner), options)
        registers = Registers.unpack(tracee.registers())
        leaving = registers._replace(rip=instruction, rax=NR.exit, rdi=0, orig_rax=arch.NO_SYSCALL)
        tracee.set_registers(leaving.pack())
        _, ignored = dispositions(pid)  # one of them tells that its calls are made (remote.py)
        tracee.set_signal_mask(_ALL_SIGNALS ^ ignored)
    except (SnapError, OSError):
        return None
    return tracee


def _guest(pid: int, tracee: Tracee, room: Room, scratch: int) -> Frozen | None:
    handle = _handle(tracee.tid)
    if handle < 0:
        _end(tracee)
        return None
    guest = Frozen(pid, handle, room=room, scratch=scratch)
    guest.threads = [tracee]
    with suppress(SnapError):  # it has ended
        remote = guest.remote
        calls = (
            Call(NR.madvise, (remote.scratch, remote.scratch_size, _DONTFORK)),
            Call(NR.close_range, (0, _EVERY, _UNSHARE)),
        )
        if remote.batch(calls) == [0, 0]:
            return guest
    _leave(guest)
    return None


def _leave(guest: Frozen) -> None:
    with suppress(SnapError):
        guest.close_remote()
    _end(guest.threads[0])
    os.close(guest.pidfd)


def _end(tracee: Tracee) -> None:
    """It runs to its end, which is waited for: no look at the process shall find it."""
    with suppress(SnapError):
        tracee.cont()
    ptrace.reap([tracee.tid])
