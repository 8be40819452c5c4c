"""Where brk, code, data, stack, arguments and environment are (struct prctl_mm_map).

Capture: fields 26-28 and 45-51 of /proc/PID/stat, /proc/PID/auxv, and brk(0) in the process.
Rebuild: prctl(PR_SET_MM, PR_SET_MM_MAP); the memory they point to is already mapped.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from ..errors import DeniedError
from ..kernel.arch_x86_64 import NR
from ..kernel.errnames import error_name
from ..kernel.remote import Call
from ..manifest import MemoryLayout
from .context import Context, demand
from .inquiry import Answer, Answers, Inquiry

if TYPE_CHECKING:
    from ..kernel.remote import Remote
    from .facts import Facts

PR_SET_MM, PR_SET_MM_MAP = 35, 14
MAP = struct.Struct("<11QQIi")
"""struct prctl_mm_map: start_code … env_end, address and size of auxv, exe_fd (-1: unchanged)."""


def ask(inquiry: Inquiry, facts: Facts) -> Answer[MemoryLayout]:
    call = inquiry.call(NR.brk, 0)

    def answer(answers: Answers) -> MemoryLayout:
        stat = facts.stat
        if not stat.start_stack:
            raise DeniedError(
                f"/proc/{facts.pid}/stat hides its addresses from uid {facts.status.uids[0]}",
                f"sudo snap check {facts.pid}",
            )
        return MemoryLayout(
            start_code=stat.start_code,
            end_code=stat.end_code,
            start_data=stat.start_data,
            end_data=stat.end_data,
            start_brk=stat.start_brk,
            brk=answers.result(call),
            start_stack=stat.start_stack,
            arg_start=stat.arg_start,
            arg_end=stat.arg_end,
            env_start=stat.env_start,
            env_end=stat.env_end,
            auxv=facts.auxv,
        )

    return answer


def rebuild(layout: MemoryLayout, remote: Remote, ctx: Context, exe_fd: int = -1) -> None:
    """Put it back; `exe_fd` is a descriptor in the new process of the file that /proc/PID/exe is
    to name (needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN, and nothing of the old exe mapped:
    refused, it is a warning), -1 leaves that link alone. RestoreError when the rest is refused."""
    auxv = remote.put(layout.auxv, MAP.size)

    def call(exe: int) -> Call:
        packed = MAP.pack(
            layout.start_code,
            layout.end_code,
            layout.start_data,
            layout.end_data,
            layout.start_brk,
            layout.brk,
            layout.start_stack,
            layout.arg_start,
            layout.arg_end,
            layout.env_start,
            layout.env_end,
            auxv,
            len(layout.auxv),
            exe,
        )
        return Call(NR.prctl, (PR_SET_MM, PR_SET_MM_MAP, remote.put(packed), MAP.size, 0))

    if exe_fd >= 0:
        (result,) = remote.batch([call(exe_fd)])
        if result == 0:
            return
        ctx.warnings.append(f"/proc/PID/exe: not restored ({error_name(result)})")
    demand(remote, [("memory layout (PR_SET_MM_MAP)", call(-1))])
