"""Resource limits (prlimit).

Set from inside while the new process still has all of snap's power: raising a hard limit needs
CAP_SYS_RESOURCE. They come in two steps: `widen` before anything is rebuilt (there may have been
more descriptors, memory or locked pages than the limits of T0 allow), `rebuild` at the end.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from ..kernel import procfs
from ..kernel.arch_x86_64 import NR
from ..kernel.remote import Call
from ..manifest import Record
from .context import Context
from .inquiry import Answer, Answers, Inquiry

if TYPE_CHECKING:
    from ..kernel.remote import Remote
    from .facts import Facts

NAME = "limits"
NOFILE = 7
PAIR = struct.Struct("<QQ")  # struct rlimit64: soft, hard


class State(Record, frozen=True):
    limits: dict[int, tuple[int, int]]  # RLIMIT_* → soft, hard; 2**64 - 1 is unlimited


def ask(inquiry: Inquiry, facts: Facts) -> Answer[State]:
    def answer(answers: Answers) -> State:
        return State(limits=procfs.parse_limits(facts.limits_text))

    return answer


def widen(state: State, remote: Remote, descriptors: int) -> None:
    """Make room for what will be rebuilt: each limit at least as wide as it was, the number of
    descriptors at least `descriptors` (the highest one + 1). A refusal shows later, where it
    matters."""
    now = _get(remote, list(state.limits))
    wider, soft_only = {}, {}
    for number, (_, hard) in state.limits.items():
        _, now_hard = now[number]
        wanted = max(hard, now_hard, descriptors if number == NOFILE else 0)
        wider[number] = wanted, wanted
        soft_only[number] = now_hard, now_hard
    refused = _set(remote, wider)
    _set(remote, {number: soft_only[number] for number in refused})


def rebuild(state: State, remote: Remote, ctx: Context) -> None:
    refused = _set(remote, state.limits)
    if not refused:
        return
    now = _get(remote, refused)
    _set(remote, {n: (min(state.limits[n][0], now[n][1]), now[n][1]) for n in refused})
    for number, reached in _get(remote, refused).items():
        ctx.warnings.append(
            f"limit {_name(number)}: {_text(state.limits[number])} became {_text(reached)}"
            " (raising a hard limit needs CAP_SYS_RESOURCE)"
        )


def _name(number: int) -> str:
    names = {value: name for name, value in procfs.LIMITS.items()}
    return names.get(number, f"RLIMIT {number}").removeprefix("Max ")


def _text(limit: tuple[int, int]) -> str:
    soft, hard = ("unlimited" if value == procfs.INFINITY else str(value) for value in limit)
    return f"{soft} (hard {hard})"


def _get(remote: Remote, numbers: list[int]) -> dict[int, tuple[int, int]]:
    address = remote.data
    calls = [
        Call(NR.prlimit64, (0, number, 0, address + i * PAIR.size))
        for i, number in enumerate(numbers)
    ]
    remote.batch(calls)
    raw = remote.get(address, len(numbers) * PAIR.size)
    return dict(zip(numbers, PAIR.iter_unpack(raw), strict=True))


def _set(remote: Remote, limits: dict[int, tuple[int, int]]) -> list[int]:
    """The numbers of those that were refused (EPERM, or EINVAL for soft above hard)."""
    if not limits:
        return []
    address = remote.put(b"".join(PAIR.pack(*limit) for limit in limits.values()))
    calls = [
        Call(NR.prlimit64, (0, number, address + i * PAIR.size, 0))
        for i, number in enumerate(limits)
    ]
    results = remote.batch(calls)
    return [number for number, result in zip(limits, results, strict=True) if result < 0]
