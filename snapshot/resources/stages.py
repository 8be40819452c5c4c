"""The stages in which state is put back that is neither memory nor descriptors.

Throughout, every thread is stopped with all signals blocked, and the new process still has snap's
power until `last`. `Remote`s run in the thread they are for; those of threads by Thread.tid.

  1. early            in the leader, before mappings and descriptors are made
  2. (mappings, memory, descriptors, threads: rebuild.py)
  3. thread           in each thread
  4. placed           in the leader: memory layout, umask, working directory, root
  5. last             signals, timers, limits, credentials
  6. (critical_sections, registers, XSAVE, signal masks, detach: rebuild.py)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from signal import SIGSTOP
from typing import TYPE_CHECKING, TypeVar

from ..errors import DamagedError
from ..manifest import Process, Record, Thread, unpack
from . import (
    credentials,
    identity,
    layout,
    limits,
    pending,
    scheduling,
    settings,
    signals,
    switches,
    threads,
    timers,
)
from .context import Context

if TYPE_CHECKING:
    from ..kernel.remote import Remote

S = TypeVar("S", bound=Record)


def _state(owner: Process | Thread, name: str, kind: type[S]) -> S:
    if name not in owner.state:
        raise DamagedError(f"the manifest has no {name!r} state", "snap verify IMAGE")
    return unpack(owner.state[name], kind)


def early(process: Process, remote: Remote, ctx: Context) -> None:
    """Session and group; limits wide enough for what follows."""
    identity.rebuild_group(process, remote, ctx)
    highest = max((one.fd for one in process.descriptors), default=0)
    limits.widen(_state(process, limits.NAME, limits.State), remote, highest + 1)


def thread(process: Process, one: Thread, remote: Remote, ctx: Context) -> None:
    """Everything of a thread that needs the thread to exist and the memory to be mapped, but not
    yet its credentials."""
    threads.rebuild(one, remote, ctx)
    scheduling.rebuild(_state(one, scheduling.NAME, scheduling.State), remote, ctx)
    switches.rebuild(_state(one, switches.NAME, switches.State), remote, ctx)


def placed(process: Process, remote: Remote, ctx: Context, exe_fd: int = -1) -> None:
    """In the leader, when all mappings are made and nothing of the stub is left: see
    layout.rebuild for `exe_fd`."""
    layout.rebuild(process.layout, remote, ctx, exe_fd)
    identity.rebuild_place(process, remote, ctx)
    settings.rebuild(_state(process, settings.NAME, settings.State), remote, ctx)


def last(
    process: Process, remotes: Mapping[int, Remote], ctx: Context, *, parent_stays: bool = False
) -> None:
    """The end: afterwards the process has the power it had at T0 and no more, and its timers run.

    `parent_stays`: the process that made it stays until it ends (`--wait`), so that a death signal
    may be armed. May raise RestoreError: the caller kills what it has built.
    """
    leader = remotes[process.threads[0].tid]
    signals.rebuild(_state(process, signals.NAME, signals.State), leader, ctx)
    pending.rebuild(process, remotes, ctx)
    timers.rebuild(_state(process, timers.NAME, timers.State), leader, ctx)
    limits.rebuild(_state(process, limits.NAME, limits.State), leader, ctx)
    confined = set()
    for one in process.threads:
        who = _state(one, credentials.NAME, credentials.State)
        credentials.rebuild(who, remotes[one.tid], ctx)
        confined.add(credentials.warning(who, process.pid))
        state = _state(one, switches.NAME, switches.State)
        switches.finish(state, remotes[one.tid], ctx, parent_stays)
    ctx.warnings += sorted(text for text in confined if text)
    settings.finish(_state(process, settings.NAME, settings.State), leader, ctx)
    if process.stopped:  # takes effect when the threads are let go
        os.kill(leader.tracee.tid, SIGSTOP)
