"""How each thread is scheduled: policy, priority, nice, CPUs, I/O priority, timer slack.

Asked in the thread itself with the calls of sched(7), ioprio_get(2) and prctl(2).
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

from ..kernel.arch_x86_64 import NR
from ..kernel.errnames import error_name
from ..kernel.remote import Call
from ..manifest import Record
from .context import Context, attempt
from .inquiry import Answer, Answers, Inquiry

if TYPE_CHECKING:
    from ..kernel.remote import Remote
    from .facts import Facts

NAME = "scheduling"

ATTRIBUTES = struct.Struct("<IIQiIQQQII")
"""struct sched_attr, 56 bytes: size, policy, flags, nice, priority, runtime, deadline, period,
util_min, util_max."""
CPU_BYTES = 1024  # 8192 CPUs, the most that x86-64 can be configured for
NORMAL, FIFO, RR, BATCH, IDLE, DEADLINE = 0, 1, 2, 3, 5, 6
FLAG_UTIL_CLAMP = 0x60  # SCHED_FLAG_UTIL_CLAMP_MIN | _MAX
UTIL_MAX = 1024
PRIO_PROCESS = 0
IOPRIO_WHO_PROCESS = 1
IOPRIO_CLASS_SHIFT = 13
PR_SET_TIMERSLACK, PR_GET_TIMERSLACK = 29, 30


class State(Record, frozen=True):
    policy: int = NORMAL
    flags: int = 0  # SCHED_FLAG_*: RESET_ON_FORK 1, deadline flags
    nice: int = 0
    priority: int = 0  # 1-99 for FIFO and RR
    runtime_ns: int = 0  # DEADLINE; a slice for the fair policies since Linux 6.12
    deadline_ns: int = 0
    period_ns: int = 0
    util_min: int = 0
    util_max: int = UTIL_MAX
    cpus: bytes = b""  # bit n of this little-endian number is CPU n; empty: every CPU
    ioprio: int = 0  # class << 13 | level; 0: follows nice
    timerslack_ns: int = 0  # 0: a realtime thread, which has none


def ask(inquiry: Inquiry, facts: Facts) -> Answer[State]:
    attributes = inquiry.space(ATTRIBUTES.size)
    got = inquiry.call(NR.sched_getattr, 0, attributes.address, ATTRIBUTES.size, 0)
    nice = inquiry.call(NR.getpriority, PRIO_PROCESS, 0)
    cpus = inquiry.space(CPU_BYTES)
    affinity = inquiry.call(NR.sched_getaffinity, 0, CPU_BYTES, cpus.address)
    ioprio = inquiry.call(NR.ioprio_get, IOPRIO_WHO_PROCESS, 0)
    slack = inquiry.call(NR.prctl, PR_GET_TIMERSLACK, 0, 0, 0, 0)

    def answer(answers: Answers) -> State:
        fields = dict.fromkeys(range(10), 0)
        if answers.result(got) == 0:
            fields = dict(enumerate(ATTRIBUTES.unpack(answers.bytes(attributes))))
        size, policy = fields[0], fields[1]
        clamped = size >= ATTRIBUTES.size
        # The raw call returns 20 - nice, 1 to 40. sched_getattr leaves it out for realtime.
        nice_value = 20 - answers.result(nice)
        return State(
            policy=policy,
            flags=fields[2],
            nice=nice_value,
            priority=fields[4],
            runtime_ns=fields[5],
            deadline_ns=fields[6],
            period_ns=fields[7],
            util_min=fields[8] if clamped else 0,
            util_max=fields[9] if clamped else UTIL_MAX,
            cpus=_cpus(answers.bytes(cpus)[: max(answers.result(affinity), 0)]),
            ioprio=_own_ioprio(max(answers.result(ioprio), 0), policy, nice_value),
            timerslack_ns=max(answers.result(slack), 0),
        )

    return answer


def _cpus(mask: bytes) -> bytes:
    """The mask without trailing zeros; empty when it leaves out none of the host's CPUs, so that
    the process may use every CPU of a larger host too."""
    number = int.from_bytes(mask, "little")
    every = (1 << (os.cpu_count() or 1)) - 1
    return b"" if number & every == every else mask.rstrip(b"\0")


def _own_ioprio(effective: int, policy: int, nice: int) -> int:
    """ioprio_get tells what counts: class and level derived from policy and nice when none was
    set (block/ioprio.c, Linux 5.19 and later). That default is 0 here."""
    if policy == IDLE:
        kind, level = 3, (nice + 20) // 5
    elif policy in (FIFO, RR, DEADLINE):
        kind, level = 1, (nice + 20) // 5
    else:
        kind, level = 2, (nice + 20) // 5
    return 0 if effective == kind << IOPRIO_CLASS_SHIFT | level else effective


def rebuild(state: State, remote: Remote, ctx: Context) -> None:
    """In the thread of `remote`, while it still has snap's power: a lower nice, a realtime policy
    need CAP_SYS_NICE or a limit that allows them."""
    who = f"thread {remote.tracee.tid}"
    steps = [(f"{who}: nice {state.nice}", Call(NR.setpriority, (PRIO_PROCESS, 0, state.nice)))]
    attributes = remote.put(_attributes(state, remote))
    steps.append(
        (
            f"{who}: scheduling policy {state.policy}, priority {state.priority}",
            Call(NR.sched_setattr, (0, attributes, 0)),
        )
    )
    steps.append(
        (
            f"{who}: I/O priority {state.ioprio:#x}",
            Call(NR.ioprio_set, (IOPRIO_WHO_PROCESS, 0, state.ioprio)),
        )
    )
    if state.timerslack_ns:
        slack = Call(NR.prctl, (PR_SET_TIMERSLACK, state.timerslack_ns, 0, 0, 0))
        steps.append((f"{who}: timer slack {state.timerslack_ns} ns", slack))
    attempt(remote, ctx, steps)
    _affinity(state, remote, ctx, who)


def _attributes(state: State, remote: Remote) -> bytes:
    """struct sched_attr for sched_setattr. The fair policies report a slice whether or not one was
    set; one equal to the new thread's own is the default and stays unset."""
    address = remote.data
    result = remote.batch([Call(NR.sched_getattr, (0, address, ATTRIBUTES.size, 0))])[0]
    now = ATTRIBUTES.unpack(remote.get(address, ATTRIBUTES.size)) if result == 0 else (0,) * 10
    runtime = state.runtime_ns
    if state.policy not in (FIFO, RR, DEADLINE) and runtime == now[5]:
        runtime = 0
    # Kernels without CONFIG_UCLAMP_TASK report 0 and 0, and refuse to set them.
    clamp = (state.util_min, state.util_max) != now[8:10] and result == 0
    return ATTRIBUTES.pack(
        ATTRIBUTES.size if clamp else ATTRIBUTES.size - 8,
        state.policy,
        state.flags & ~FLAG_UTIL_CLAMP | FLAG_UTIL_CLAMP * clamp,
        state.nice,
        state.priority,
        runtime,
        state.deadline_ns,
        state.period_ns,
        state.util_min,
        state.util_max,
    )


def _affinity(state: State, remote: Remote, ctx: Context, who: str) -> None:
    wanted = state.cpus or b"\xff" * CPU_BYTES
    address = remote.put(wanted)
    answer = remote.data + CPU_BYTES
    got, size = remote.batch(
        [
            Call(NR.sched_setaffinity, (0, len(wanted), address)),
            Call(NR.sched_getaffinity, (0, CPU_BYTES, answer)),
        ]
    )
    now = remote.get(answer, max(size, 0)).rstrip(b"\0")
    if got < 0 or (state.cpus and now != state.cpus):
        ctx.warnings.append(
            f"{who}: CPUs {_list(wanted)} became {_list(now)}"
            + (f" ({error_name(got)})" if got < 0 else "")
        )


def _list(mask: bytes) -> str:
    number = int.from_bytes(mask, "little")
    return ",".join(str(cpu) for cpu in range(number.bit_length()) if number >> cpu & 1) or "none"
