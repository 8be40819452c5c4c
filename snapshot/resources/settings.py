"""Settings of a whole process: OOM score, core dumps, sub-reaper, huge pages, merging, mdwe.

prctl answers only to the process itself (PR_GET_*, prctl(2)); two are files of /proc/PID.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from ..kernel import procfs
from ..kernel.arch_x86_64 import NR
from ..kernel.errnames import error_name
from ..kernel.remote import Call
from ..manifest import Record
from .context import Context, attempt
from .inquiry import Answer, Answers, Inquiry

if TYPE_CHECKING:
    from ..kernel.remote import Remote
    from .facts import Facts

NAME = "settings"

PR_GET_DUMPABLE, PR_SET_DUMPABLE = 3, 4
PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 36, 37
PR_SET_THP_DISABLE, PR_GET_THP_DISABLE = 41, 42
PR_SET_MDWE, PR_GET_MDWE = 65, 66
PR_SET_MEMORY_MERGE, PR_GET_MEMORY_MERGE = 67, 68


class State(Record, frozen=True):
    oom_score_adj: int = 0
    coredump_filter: int | None = None
    dumpable: int = 1  # 0 no, 1 yes, 2 readable by root only (set by the kernel alone)
    subreaper: bool = False
    thp_disable: int = 0  # bit 0: no transparent huge pages; bit 1: unless advised
    mdwe: int = 0  # PR_MDWE_* bits: no memory becomes executable any more
    memory_merge: bool = False  # KSM for all memory


def ask(inquiry: Inquiry, facts: Facts) -> Answer[State]:
    subreaper = inquiry.space(8)
    reaper_call = inquiry.call(NR.prctl, PR_GET_CHILD_SUBREAPER, subreaper.address, 0, 0, 0)
    dumpable = inquiry.call(NR.prctl, PR_GET_DUMPABLE, 0, 0, 0, 0)
    thp = inquiry.call(NR.prctl, PR_GET_THP_DISABLE, 0, 0, 0, 0)
    mdwe = inquiry.call(NR.prctl, PR_GET_MDWE, 0, 0, 0, 0)
    merge = inquiry.call(NR.prctl, PR_GET_MEMORY_MERGE, 0, 0, 0, 0)

    def answer(answers: Answers) -> State:
        def value(call: int) -> int:
            return max(answers.result(call), 0)  # EINVAL: this kernel has no such setting

        (reaper,) = struct.unpack_from("<i", answers.bytes(subreaper))
        core = facts.coredump_filter_text
        return State(
            oom_score_adj=int(facts.oom_score_adj_text),
            coredump_filter=int(core, 16) if core else None,
            dumpable=value(dumpable),
            subreaper=bool(reaper) and answers.result(reaper_call) == 0,
            thp_disable=value(thp),
            mdwe=value(mdwe),
            memory_merge=bool(value(merge)),
        )

    return answer


def rebuild(state: State, remote: Remote, ctx: Context) -> None:
    """All but what would be in the way of the rest: see `finish`."""
    pid = remote.tracee.tid
    _write(pid, "oom_score_adj", str(state.oom_score_adj), ctx)
    if state.coredump_filter is not None:
        _write(pid, "coredump_filter", f"{state.coredump_filter:#x}", ctx)
    steps = [
        (
            "child sub-reaper",
            Call(NR.prctl, (PR_SET_CHILD_SUBREAPER, int(state.subreaper), 0, 0, 0)),
        ),
        (
            "no transparent huge pages",
            Call(
                NR.prctl,
                (PR_SET_THP_DISABLE, int(bool(state.thp_disable)), state.thp_disable & ~1, 0, 0),
            ),
        ),
    ]
    if state.memory_merge:
        steps.append(("memory merging", Call(NR.prctl, (PR_SET_MEMORY_MERGE, 1, 0, 0, 0))))
    attempt(remote, ctx, steps)


def finish(state: State, remote: Remote, ctx: Context) -> None:
    """After credentials, whose change resets `dumpable`, and after the last mapping: without
    `dumpable` an unprivileged snap may no longer read the process, with `mdwe` no mapping becomes
    executable."""
    dumpable = 1 if state.dumpable == 1 else 0
    steps = [("dumpable", Call(NR.prctl, (PR_SET_DUMPABLE, dumpable, 0, 0, 0)))]
    if state.mdwe:
        steps.insert(0, ("mdwe", Call(NR.prctl, (PR_SET_MDWE, state.mdwe, 0, 0, 0))))
    attempt(remote, ctx, steps)


def _write(pid: int, name: str, value: str, ctx: Context) -> None:
    try:
        procfs.write(pid, name, value.encode())
    except OSError as error:
        ctx.warnings.append(
            f"{name} {value}: not restored ({error_name(-(error.errno or 0))}),"
            f" it is {procfs.read(pid, name).decode().strip()}"
        )
