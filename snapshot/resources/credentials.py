"""Who each thread is: user, groups, capabilities, securebits, no_new_privs; seccomp is recorded.

Credentials belong to threads (credentials(7)); C libraries keep those of all threads equal, so the
state of the leader is kept once and the others' only where it differs.

Rebuilt last, in every thread: whatever needs power comes before. A thread that ends up with less
power than it had is a warning; one that would have more is a RestoreError.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from ..errors import RestoreError
from ..kernel import procfs
from ..kernel.arch_x86_64 import NR
from ..kernel.remote import Call
from ..manifest import Record
from .context import Context
from .inquiry import Answer, Answers, Inquiry

if TYPE_CHECKING:
    from ..kernel.remote import Remote
    from .facts import Facts

NAME = "credentials"

PR_CAPBSET_DROP = 24
PR_GET_SECUREBITS, PR_SET_SECUREBITS = 27, 28
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, PR_CAP_AMBIENT_CLEAR_ALL = 47, 2, 4
NO_SETUID_FIXUP = 1 << 2  # SECBIT: capabilities survive setuid
CAPABILITY_VERSION_3 = 0x20080522
CAPABILITY_HEADER = struct.Struct("<Ii")  # version, pid (0: the caller)
CAPABILITY_SETS = struct.Struct("<IIIIII")  # effective, permitted, inheritable; low, then high
SECCOMP_MODES = {1: "strict mode", 2: "a filter"}


class State(Record, frozen=True):
    uids: tuple[int, int, int, int]  # real, effective, saved, file system
    gids: tuple[int, int, int, int]
    groups: tuple[int, ...]
    inheritable: int  # capability sets: bit n is capability n
    permitted: int
    effective: int
    bounding: int
    ambient: int
    securebits: int
    no_new_privs: bool
    seccomp: int = 0  # 0 off, 1 strict, 2 filter


def ask(inquiry: Inquiry, facts: Facts) -> Answer[int]:
    """Only securebits have to be asked; the rest is in the thread's status. → `state`."""
    call = inquiry.call(NR.prctl, PR_GET_SECUREBITS, 0, 0, 0, 0)

    def answer(answers: Answers) -> int:
        return max(answers.result(call), 0)

    return answer


def state(status: procfs.Status, securebits: int) -> State:
    """From /proc/PID/task/TID/status and what `ask` found."""
    real, effective, saved, file_system = status.uids
    real_group, effective_group, saved_group, file_system_group = status.gids
    return State(
        uids=(real, effective, saved, file_system),
        gids=(real_group, effective_group, saved_group, file_system_group),
        groups=status.groups,
        inheritable=status.mask("CapInh"),
        permitted=status.mask("CapPrm"),
        effective=status.mask("CapEff"),
        bounding=status.mask("CapBnd"),
        ambient=status.mask("CapAmb"),
        securebits=securebits,
        no_new_privs=bool(status.number("NoNewPrivs")),
        seccomp=status.number("Seccomp") if "Seccomp" in status else 0,
    )


def warning(state: State, pid: int) -> str | None:
    """What a restore will lack; for the take to say as well."""
    if not state.seccomp:
        return None
    mode = SECCOMP_MODES.get(state.seccomp, f"mode {state.seccomp}")
    return (
        f"process {pid} confines itself with seccomp ({mode}); it is restored WITHOUT it, free to"
        " make any system call"
    )


# --- rebuild -------------------------------------------------------------------------------------


def rebuild(state: State, remote: Remote, ctx: Context) -> None:
    """In the thread of `remote`. Only what differs from what it has is set, so that an
    unprivileged snap can restore its own user's processes. Raises RestoreError when the thread
    would keep power that it did not have."""
    now = _now(remote)
    if now != state:
        _groups(state, now, remote)
        _set(state, now, remote)
    _judge(state, _now(remote), remote.tracee.tid, ctx)


def _now(remote: Remote) -> State:
    (securebits,) = remote.batch([Call(NR.prctl, (PR_GET_SECUREBITS, 0, 0, 0, 0))])
    return state(procfs.status(remote.tracee.tid), max(securebits, 0))


def _groups(wanted: State, now: State, remote: Remote) -> None:
    if wanted.groups == now.groups:
        return
    data = struct.pack(f"<{len(wanted.groups)}I", *wanted.groups)
    if len(data) > remote.data_size:
        raise RestoreError(
            f"{len(wanted.groups)} supplementary groups, more than {remote.data_size // 4}"
            " cannot be set",
            "snap show IMAGE",
        )
    remote.batch([Call(NR.setgroups, (len(wanted.groups), remote.put(data)))])


def _set(wanted: State, now: State, remote: Remote) -> None:
    """All in one batch, refusals ignored: `_judge` looks at what came of it.

    The order keeps the power that the next step needs: capabilities survive setresuid because of
    NO_SETUID_FIXUP; inheritable must be within the bounding set when it is set (capset(2)), so it
    comes before that shrinks; ambient needs inheritable (capabilities(7)) and must come before
    securebits, which may forbid raising it; permitted shrinks last.
    """
    header = remote.put(CAPABILITY_HEADER.pack(CAPABILITY_VERSION_3, 0))
    every = now.permitted
    open_sets = remote.put(_sets(every, every, wanted.inheritable), 16)
    final_sets = remote.put(_sets(wanted.effective, wanted.permitted, wanted.inheritable), 48)

    def prctl(*args: int) -> Call:
        return Call(NR.prctl, args + (0,) * (5 - len(args)))

    calls = [prctl(PR_SET_SECUREBITS, now.securebits | NO_SETUID_FIXUP)]
    if wanted.gids != now.gids:
        calls += [Call(NR.setresgid, wanted.gids[:3]), Call(NR.setfsgid, wanted.gids[3:])]
    if wanted.uids != now.uids:
        calls += [Call(NR.setresuid, wanted.uids[:3]), Call(NR.setfsuid, wanted.uids[3:])]
    calls.append(Call(NR.capset, (header, open_sets)))
    calls += [prctl(PR_CAPBSET_DROP, cap) for cap in _bits(now.bounding & ~wanted.bounding)]
    calls.append(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL))
    calls += [prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap) for cap in _bits(wanted.ambient)]
    calls.append(prctl(PR_SET_SECUREBITS, wanted.securebits))
    calls.append(Call(NR.capset, (header, final_sets)))
    if wanted.no_new_privs:
        calls.append(prctl(PR_SET_NO_NEW_PRIVS, 1))
    remote.batch(calls)


def _sets(effective: int, permitted: int, inheritable: int) -> bytes:
    low = 0xFFFFFFFF
    return CAPABILITY_SETS.pack(
        effective & low,
        permitted & low,
        inheritable & low,
        effective >> 32,
        permitted >> 32,
        inheritable >> 32,
    )


def _bits(number: int) -> list[int]:
    return [bit for bit in range(number.bit_length()) if number >> bit & 1]


def _judge(wanted: State, now: State, tid: int, ctx: Context) -> None:
    for field in ("effective", "permitted", "ambient", "inheritable"):
        extra = getattr(now, field) & ~getattr(wanted, field)
        if extra:
            raise RestoreError(
                f"thread {tid} would keep {field} capabilities {extra:#x} that it did not have",
                "snap check",
            )
    if 0 in now.uids and 0 not in wanted.uids:
        raise RestoreError(f"thread {tid} would run as root, not as uid {wanted.uids[1]}")
    if wanted.no_new_privs and not now.no_new_privs:
        raise RestoreError(f"thread {tid} would lose no_new_privs", "snap check")
    for field in State.__struct_fields__:
        was, found = getattr(wanted, field), getattr(now, field)
        if field != "seccomp" and was != found:
            shown = (f"{one:#x}" if isinstance(one, int) else f"{one}" for one in (was, found))
            ctx.warnings.append("thread {}: {} {} became {}".format(tid, field, *shown))
