"""System calls made inside another, stopped process, and memory there to make them with.

How: code and data of 1 KiB, the *guard*, are written into the padding behind the vdso, where
nothing of the target is, and are zeros again in the end (the page stays a private copy: 4 KiB). A
call made by that code maps room for data, the *scratch*. From then on a loop in it runs whole
arrays of calls for one round trip. It tells of the end of a call, or of all, with a signal that the
target ignores; where it ignores none, or catches all, calls are made with system call stops.

Where there is no vdso, or no room behind it, and in a process that dies with us anyway (EXITKILL:
one that is being rebuilt), there is no guard: calls go through the target's own `syscall`
instruction, the loop lies in the scratch and ends in int3. Where SIGTRAP is ignored int3 would
reset that for good (force_sig_info_to_task; the same where it is blocked, hence the mask below):
then without the loop.

With a guard the thread that made the last calls has registers that lead home as long as the scratch
is mapped, also between two calls (`registers` tells its own).

Signals are blocked while calls are made (all but the one that ends the loop) and stay queued. A
SIGTRAP that somebody sends to a process without a guard, or that was queued already, is put back
into the queue, siginfo and all, and the rest of the batch is made without the loop. SIGSTOP takes
effect: the process is a stopped one when it is let go. A restartable sequence (rseq) that the
thread was in is noted before and written back after, for the kernel clears it on the way; it then
aborts as it must.

The thread's own registers are put back in an event stop, where the kernel's restart of interrupted
system calls works, unless an injected call sleeps interruptibly with a restart block of its own
(nanosleep, futex with timeout, poll): do not inject those into a live target.

If this process is killed
-------------------------
The kernel detaches (SIGKILL is enough) and the thread runs on from the registers that it has at
that instant. With a guard these are its own, or lead home: the rest of the batch is made, the
scratch is unmapped, signal mask, flags and registers are put back by the guard's code, an
interrupted system call is made again, or returns EINTR if a handler is about to run
(guard_x86_64.c). So the registers are changed before the mask, and put back after it. A descriptor
that `making` has made, or that is owed (`owe`), is closed on the way. `close` has the thread go the
same way, up to where the scratch is unmapped. Charge of that goes from one thread to the next by
one write, at which both lead home. What can be left: the guard's bytes, which nothing runs and the
next one takes over; what a batch had made and a later one would have undone.

Not covered:
 1. No guard (no vdso): `open` and `close` for 2 system call stops (20-150 us), each batch from the
    loop's registers to those put back (10-60 us).
 2. A seccomp filter that kills: it is no longer suspended, and meets the rest of the batch.
 3. A signal that arrives in the few instructions between the guard's look at what is pending and
    the end of the mask: an interrupted call is then made again after its handler, as if the signal
    had come just before the call. The same while `open` makes its mapping.
 4. A handler that runs on the way, and still does when the next one makes calls in the process: it
    returns to where the guard lay, which is written over. (Threads on the way themselves are let
    home first: freeze.py.)
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import signal
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

from ..errors import DeniedError, KernelError, SnapError, TargetError
from ..units import PAGE, align_up
from . import arch_x86_64 as arch
from ._native import ffi, lib
from .arch_x86_64 import NR
from .errnames import error_name
from .ptrace import EXITKILL, SUSPEND_SECCOMP, Tracee, reap
from .refusal import status, stop_name
from .room import Room, find_room, find_syscall, is_still

SCRATCH_SIZE = 64 * 1024
CALL_TIMEOUT = 10.0
"""Seconds that a batch gets."""
CALL_BYTES = 64
CAPACITY = 4 * PAGE // CALL_BYTES
"""Calls that make a batch, with a scratch of SCRATCH_SIZE."""
OWED = struct.Struct("2i16xi4x")
_SIGNALS = re.compile(rb"^(SigIgn|SigCgt):\s*(\w+)", re.MULTILINE)
_IGNORED_BY_DEFAULT = sum(1 << n - 1 for n in (signal.SIGURG, signal.SIGWINCH, signal.SIGCHLD))
_JOB_CONTROL = sum(
    1 << n - 1
    for n in (signal.SIGCONT, signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
)
_SIGTRAP_BIT = 1 << (signal.SIGTRAP - 1)
_MAP_FIXED = 0x10
_MAP_FIXED_NOREPLACE = 0x100000
_PROT_RWX = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
_MAX_ERRNO = 4095


class Call(NamedTuple):
    """One system call: its number (arch_x86_64.NR) and up to six arguments."""

    nr: int
    args: tuple[int, ...] = ()


class Packed(NamedTuple):
    """Calls that were put together before (`pack`), as many as fit into one batch."""

    calls: Sequence[Call]
    data: bytes
    size: int
    """Bytes from the begin of the data area on that they write."""

    def decoded(self, results: bytearray, answers: bytearray, i: int) -> tuple[list[int], bytes]:
        """What the i-th of several threads has answered."""
        count = len(self.calls)
        row = struct.unpack_from(f"{count}q", results, 8 * count * i)
        return list(row), bytes(answers[self.size * i : self.size * (i + 1)])


class Interview(NamedTuple):
    """What threads have answered, the first one and the others; decoded later."""

    first: tuple[Packed, bytearray, bytearray]
    others: tuple[Packed, bytearray, bytearray]
    fetched: int
    """A duplicate of the descriptor that the first one has made, or -errno."""

    def of(self, i: int) -> tuple[list[int], bytes]:
        """Results and answers of thread i, in the order in which they were asked."""
        packed, results, answers = self.others if i else self.first
        return packed.decoded(results, answers, max(i - 1, 0))


def _array_bytes(scratch_size: int) -> int:
    return min(CAPACITY * CALL_BYTES, (scratch_size - PAGE) // 2)


def data_area(scratch: int, scratch_size: int = SCRATCH_SIZE) -> tuple[int, int]:
    """Address and size of what a scratch has for the caller."""
    offset = PAGE + _array_bytes(scratch_size)
    return scratch + offset, scratch_size - offset


class Remote:
    """Calls made in one stopped thread, with a scratch that other threads can share (`on`). One
    scratch in a process at a time.

    The scratch is [scratch, scratch + scratch_size): one page of code, an array of calls, and
    [data, data + data_size) for the caller.
    """

    die_at = 0
    """For tests: the n-th point between two steps of an injection at which this process kills
    itself."""

    def __init__(
        self,
        tracee: Tracee,
        size: int = SCRATCH_SIZE,
        timeout: float = CALL_TIMEOUT,
        room: Room | None = None,
    ) -> None:
        """`room`: where it was when somebody looked, if that is known."""
        self.tracee = tracee
        self.timeout = timeout
        self.scratch = 0
        self.scratch_size = max(align_up(size, PAGE), 2 * PAGE)
        self.capacity = _array_bytes(self.scratch_size) // CALL_BYTES
        self._data_offset, _ = data_area(0, self.scratch_size)
        self._at: Any = None
        self._maker: Remote | None = None  # whose scratch it is, if not our own
        self._parked = ffi.new("snap_injection **")  # who would unmap it; shared with `on`
        self._last: Any = None  # keeps alive what that points to
        self._loop_allowed = False
        self.room = room
        self._guard = 0  # where the way home lies in the target, 0: there is none
        self._mem = -1  # its /proc/PID/mem, as long as there is a guard
        self._caught = self._ignored = 0

    @property
    def data(self) -> int:
        return self.scratch + self._data_offset

    @property
    def data_size(self) -> int:
        return self.scratch_size - self._data_offset

    def open(self, hint: int | None = None, near: int = 0, status_text: bytes = b"") -> None:
        """Maps the scratch, at `hint` exactly (which must be free) or where the kernel likes, if
        possible at `near`. `status_text`: /proc/PID/status as it is now, if that has been read.

        Raises UnsupportedError when the target has no `syscall` instruction to borrow, DeniedError
        when a seccomp filter of it cannot be suspended, KernelError when mmap fails.
        """
        self._begin(status_text)
        if self._guard and (placed := lib.snap_guard_place(self._at)) < 0:
            self._failed(-placed, [])
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        if hint is not None:
            flags |= _MAP_FIXED_NOREPLACE
        protection = mmap.PROT_READ | mmap.PROT_WRITE if self._guard else _PROT_RWX
        args = (hint or near, self.scratch_size, protection, flags, arch.NO_SYSCALL, 0)
        try:
            address = self.batch([Call(NR.mmap, args)])[0]
            self.scratch = self._at.scratch
            refused = not self._guard and -address in (errno.EACCES, errno.EPERM, errno.ENOTSUP)
            if refused:  # nothing may be writable and executable at once (SELinux, PR_SET_MDWE)
                args = (*args[:2], mmap.PROT_READ | mmap.PROT_WRITE, *args[3:])
                address = self.batch([Call(NR.mmap, args)])[0]
            self.scratch = _checked(self.tracee.tid, NR.mmap, args, address)
            if hint is not None and self.scratch != hint:  # before Linux 4.17 the flag is unknown
                raise KernelError(f"mmap at {hint:#x} went to {self.scratch:#x}", "uname -r")
            if self._guard:
                self._loop_allowed = True
            else:
                _, ignored = dispositions(self.tracee.tid, every=True)
                self._loop_allowed = self._place_loop(refused) and not ignored & _SIGTRAP_BIT
        except BaseException:
            self.close()
            raise
        self._at.loop = self._guard or self.scratch
        self._at.array = self.scratch + PAGE

    def _begin(self, status_text: bytes) -> None:
        """Everything that comes before the first call."""
        instruction = self._find_guard(status_text)
        self._prepare(instruction)
        self._at.undo = self.scratch_size if self._guard else 0
        self._at.undo_call = NR.munmap

    def _find_guard(self, status_text: bytes) -> int:
        """-> address of a `syscall` instruction."""
        if self.room is None or not is_still(self.tracee, self.room):
            self.room = find_room(self.tracee)
        if self.room.guard and not self.tracee.options & EXITKILL:
            self._guard = self.room.guard
            self._caught, self._ignored = dispositions(self.tracee.tid, text=status_text)
            self._mem = _open_memory(self.tracee.tid)
        return self.room.instruction

    def look(self) -> None:
        """What comes before `clone`, of the process as it runs."""
        self._find_guard(b"")

    def clone(self, tracee: Tracee, flags: int) -> int | None:
        """Has this thread, now stopped, make another one (CLONE_PTRACE is among `flags`), which
        stands at its birth, in code of the guard that lies there until `wipe`, and would end if it
        went on -> its number in its own pid namespace. None: it cannot be had, nothing is there."""
        self.tracee = tracee
        assert self.room is not None, "look() comes first"
        self._prepare(self.room.instruction)
        if not self._guard or not tracee.options & SUSPEND_SECCOMP:
            self._abandon()
            return None
        made = ffi.new("int64_t *")
        result = lib.snap_clone_thread(self._at, flags, made)
        self.tracee.stop = self._at.stop
        if result < 0:
            failure = self._failure(-result, [Call(NR.clone)])
            with suppress(SnapError):
                self.close()
            raise failure
        if made[0] < 0:
            self.wipe()
            return None
        return int(made[0])

    def wipe(self) -> None:
        """After `look` or `clone`: nothing of it is in the target any more."""
        if self._at is not None:
            lib.snap_guard_wipe(self._at)
        self._abandon()

    def interview(
        self,
        near: int,
        first: Packed,
        others: Packed,
        tracees: Sequence[Tracee],
        status_text: bytes = b"",
        pidfd: int = -1,
    ) -> Interview | None:
        """`open` with the scratch at `near`, the calls `first` here, `others` in other threads, and
        `close`, all at once. None, and nothing is open: it has to be done step by step. `pidfd` of
        the process: the first of all calls makes a descriptor (`making`), which is fetched."""
        self._begin(status_text)
        if not self._guard or not self.tracee.options & SUSPEND_SECCOMP or not near:
            self._abandon()
            return None
        threads, options = len(tracees), self.tracee.options
        each = ffi.new("snap_injection[]", max(1, threads))
        numbers = [tracee.tid for tracee in tracees]
        stops = ffi.new("int[]", [tracee.stop for tracee in tracees])
        rooms = _room_for(first, 1), _room_for(others, threads)
        asked, asked_others = (questions(*one) for one in rooms)
        fetching = ffi.new("snap_making *", (pidfd, -1)) if pidfd >= 0 else ffi.NULL
        step = ffi.new("int *")
        self._last = each
        result = lib.snap_interview(
            *(self._at, near, PAGE, near + self._data_offset, asked, fetching, asked_others),
            *(each, numbers, stops, threads, options, step),
        )
        made = Interview(*rooms, fetching.fetched if fetching else -1)
        if result != 0 and made.fetched >= 0:
            os.close(made.fetched)
        self.tracee.stop, self.scratch = self._at.stop, self._at.scratch
        failed = step[0] - lib.SNAP_STEP_ASK - 1  # which of the others
        asked = threads if step[0] == lib.SNAP_STEP_UNMAP else max(0, failed + 1)
        for i, tracee in enumerate(tracees[:asked]):
            tracee.stop, tracee.options = stops[i], options
        if result == 0:
            self._abandon()
            return made
        if result > 0:
            self.close()
            return None
        if failed < 0:
            raise self._failure(-result, first.calls)
        other = Remote(tracees[failed], self.scratch_size, self.timeout)
        other._at = each + failed
        raise other._failure(-result, others.calls)

    def _abandon(self) -> None:
        """Nothing of it is in the target."""
        self._at = None
        self._guard = 0
        if self._mem >= 0:
            os.close(self._mem)
            self._mem = -1

    def _place_loop(self, separate: bool) -> bool:
        """Writes the loop into the first page; False where no such page may be executable. A page
        that was never writable is written through /proc/PID/mem."""
        if separate:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
            args = (self.scratch, PAGE, mmap.PROT_READ | mmap.PROT_EXEC, flags, arch.NO_SYSCALL, 0)
            if self.batch([Call(NR.mmap, args)])[0] != self.scratch:
                return False
        self.tracee.write(self.scratch, bytes(ffi.buffer(lib.snap_arch_loop(), lib.SNAP_LOOP_SIZE)))
        return True

    def _prepare(self, instruction: int) -> None:
        suspend_seccomp(self.tracee)
        at = self._at = ffi.new("snap_injection *")
        at.tid = self.tracee.tid
        at.stop = self.tracee.stop
        at.instruction = instruction
        at.timeout_us = int(self.timeout * 1e6)
        maker = self._maker or self
        at.guard, at.caught, at.ignored = maker._guard, maker._caught, maker._ignored
        at.mem = maker._mem
        if maker._guard:
            at.parked = maker._parked
        if self._maker is not None and maker._guard:
            at.scratch, at.scratch_size = maker.scratch, maker.scratch_size
        at.die_at = self.die_at

    def close(self) -> None:
        """Closes what is owed and unmaps the scratch. The thread stands in an event stop, with
        everything its own."""
        if self._at is None or self._maker is not None:
            return
        try:
            lib.snap_give_back(self._at)
            self._loop_allowed = False
            scratch, self.scratch = self.scratch, 0
            if self._guard and scratch:
                self._finish(lib.snap_unmap_scratch(self._at), [Call(NR.munmap)])
            elif scratch:
                for fd in self._owed():
                    self.call(NR.close, fd)
                self.call(NR.munmap, scratch, self.scratch_size)
            lib.snap_guard_wipe(self._at)
        finally:
            self._abandon()

    def renew(self) -> None:
        """Finds another `syscall` instruction: after the vdso was unmapped or put elsewhere, which
        only calls of the loop can do."""
        assert self._at is not None, "open() comes first"
        self._at.instruction = find_syscall(self.tracee)

    def on(self, tracee: Tracee) -> Remote:
        """The same scratch, calls made in another stopped thread of the process. Not at the same
        time: the array of calls is one."""
        other = Remote(tracee, self.scratch_size, self.timeout)
        other.scratch = self.scratch
        other._maker = self._maker or self
        other._prepare(self._at.instruction)
        other._at.loop, other._at.array = self._at.loop, self._at.array
        return other

    def batch(self, calls: Sequence[Call]) -> list[int]:
        """Makes the calls in order -> their results, -errno for one that failed.

        Hundreds of calls are split into as many round trips as the array needs. TargetError when
        the process ends meanwhile, KernelError when a call does not return within `timeout`.
        """
        results: list[int] = []
        for start in range(0, len(calls), self.capacity):
            results += self._one_batch(calls[start : start + self.capacity])
        return results

    def ask(self, packed: Packed) -> list[int]:
        """`batch` of what was put together before."""
        return self._one_batch(packed.calls, packed.data)

    def _one_batch(self, calls: Sequence[Call], packed: bytes = b"") -> list[int]:
        self.tracee.own()
        assert self._at is not None, "open() comes first"
        self._at.use_loop = self._may_use_loop(calls)
        array = bytearray(packed or pack(calls))
        (self._maker or self)._last = self._at
        count = len(calls)
        self._finish(lib.snap_inject(self._at, ffi.from_buffer("snap_call[]", array), count), calls)
        return [result for (result,) in _RESULT.iter_unpack(array)]

    def _finish(self, result: int, calls: Sequence[Call]) -> None:
        self.tracee.stop = self._at.stop
        if result < 0:
            self._failed(-result, calls)

    def registers(self, tracee: Tracee) -> bytes:
        """A thread's own registers, 216 bytes, also where it has others as long as the scratch is
        mapped."""
        at = self._parked[0]
        if at != ffi.NULL and at.tid == tracee.tid:
            return bytes(ffi.buffer(at.registers))
        return tracee.registers()

    def owe(self) -> int:
        """Address of the end of the data area, of `OWED`: two descriptors, 16 bytes, a third. What
        calls store there is closed when the scratch is, also if this process dies; -1: nothing."""
        address = self.put(OWED.pack(-1, -1, -1), self.data_size - OWED.size)
        self._at.owed = address
        return address

    def _owed(self) -> list[int]:
        if not self._at.owed:
            return []
        return [fd for fd in OWED.unpack(self.get(self._at.owed, OWED.size)) if fd >= 0]

    @contextmanager
    def making(self, call: Call) -> Iterator[int]:
        """What a call returns that makes a descriptor, or -errno. The target closes it at the end
        of the block, and also when this process dies in it; no other calls meanwhile."""
        self.tracee.own()
        assert self._at is not None, "open() comes first"
        made = ffi.new("snap_call *")
        ffi.memmove(made, pack([call]), CALL_BYTES)
        result = lib.snap_make(self._at, made)
        descriptor = int(made.result) if result == 0 else -1
        try:
            if result == 0:
                yield descriptor
        finally:
            back = lib.snap_unmake(self._at, descriptor)
            self.tracee.stop = self._at.stop
        if result < 0 or back < 0:
            self._failed(-(result or back), [call, Call(NR.close)])

    def _may_use_loop(self, calls: Sequence[Call]) -> bool:
        """Not with SIGTRAP ignored, nor with a call that has it ignored from now on."""
        maker = self._maker or self
        for call in calls if maker._loop_allowed and not maker._guard else ():
            if call.nr == NR.rt_sigaction and call.args[0] == signal.SIGTRAP and call.args[1]:
                handler = int.from_bytes(self.get(call.args[1], 8), "little")
                maker._loop_allowed = handler != signal.SIG_IGN
        return maker._loop_allowed

    def _failed(self, number: int, calls: Sequence[Call]) -> NoReturn:
        raise self._failure(number, calls)

    def _failure(self, number: int, calls: Sequence[Call]) -> SnapError:
        tid = self.tracee.tid
        names = ", ".join(dict.fromkeys(arch.syscall_name(call.nr) for call in calls))
        if number == errno.ESRCH:
            reap([tid])
            message = f"thread {tid} ended during injected calls ({names})"
            return TargetError(message, f"ps -p {tid}")
        if number == errno.ETIMEDOUT:
            return KernelError(
                f"injected calls ({names}) did not return within {self.timeout:g} s in "
                f"thread {tid}",
                f"cat /proc/{tid}/stack",
            )
        if number == errno.EFAULT:
            return KernelError(
                f"{stop_name(self._at.fault)} in thread {tid} during injected calls ({names})",
                f"cat /proc/{tid}/maps",
            )
        return KernelError(
            f"injected calls ({names}) in thread {tid}: {error_name(number)}",
            f"cat /proc/{tid}/status",
        )

    def call(self, nr: int, *args: int) -> int:
        """One call -> its result; KernelError, naming call and errno, when it fails."""
        return _checked(self.tracee.tid, nr, args, self.batch([Call(nr, args)])[0])

    def put(self, data: bytes, offset: int = 0) -> int:
        """Writes `data` at `offset` of the data area -> its address in the target."""
        assert self.scratch, "open() comes first"
        assert offset + len(data) <= self.data_size, "does not fit into the scratch"
        self.tracee.write(self.data + offset, data)
        return self.data + offset

    def get(self, address: int, length: int) -> bytes:
        """Memory of the target, [address, address + length)."""
        return self.tracee.read(address, length)


_CALL = struct.Struct("7Qq")
_RESULT = struct.Struct("56xq")


NOTHING = Packed((), b"", 0)
"""No calls."""


def making(call: Call, packed: Packed) -> Packed | None:
    """A call of at most three arguments that makes a descriptor, and others after it, as
    `Remote.interview` wants them (native/interview.h). None: they are too many."""
    assert len(call.args) <= 3
    if len(packed.calls) >= CAPACITY:
        return None
    first = _CALL.pack(call.nr, *(*call.args, *_NOTHING)[:3], arch.NO_SYSCALL, 0, 0, -1)
    return Packed([call, *packed.calls], first + packed.data, packed.size)


def pack(calls: Sequence[Call]) -> bytes:
    """snap_call[]"""
    return b"".join(
        _CALL.pack(call.nr, *(value & arch.NO_SYSCALL for value in (*call.args, *_NOTHING)[:6]), 0)
        for call in calls
    )


_NOTHING = (0,) * 6


def _room_for(packed: Packed, threads: int) -> tuple[Packed, bytearray, bytearray]:
    return (
        packed,
        bytearray(8 * len(packed.calls) * threads),
        bytearray(packed.size * threads),
    )


def questions(packed: Packed, results: bytearray, answers: bytearray) -> Any:
    """snap_questions *, good as long as the result and all three are kept."""
    made = ffi.new("snap_questions *")
    calls = ffi.from_buffer("snap_call[]", packed.data)
    into = ffi.from_buffer("int64_t[]", results), ffi.from_buffer("unsigned char[]", answers)
    made.calls, made.count, made.size = calls, len(packed.calls), packed.size
    made.results, made.answers = into
    return made


def _checked(tid: int, nr: int, args: tuple[int, ...], result: int) -> int:
    if -_MAX_ERRNO <= result < 0:
        name = arch.syscall_name(nr)
        shown = ", ".join(hex(arg) for arg in args)
        raise KernelError(
            f"{name}({shown}) inside thread {tid}: {error_name(result)}",
            f"snap check {tid}",
        )
    return result


def _open_memory(pid: int) -> int:
    try:
        return os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise TargetError(f"process {pid}: {error.strerror}", f"ps -p {pid}") from None


def suspend_seccomp(tracee: Tracee) -> None:
    """Sees to it that injected calls do not meet the target's seccomp filter.

    PTRACE_O_SUSPEND_SECCOMP needs CAP_SYS_ADMIN and a tracer without a filter of its own. It is set
    on a stopped thread only, so no code of the target ever runs without its filter. Where it cannot
    be had, a thread with a filter is refused: the filter might kill it.
    """
    if tracee.options & SUSPEND_SECCOMP:
        return
    result = lib.snap_set_options(tracee.tid, tracee.options | SUSPEND_SECCOMP)
    if result == 0:
        tracee.options |= SUSPEND_SECCOMP
    elif status(tracee.tid).get("Seccomp", "0") != "0":
        raise DeniedError(
            f"thread {tracee.tid} has a seccomp filter that cannot be suspended "
            f"({error_name(result)}: needs CAP_SYS_ADMIN, no filter in snap)",
            f"sudo snap check {tracee.tid}",
        )


@lru_cache(maxsize=4)
def signals_in(text: bytes) -> tuple[int, int]:
    """Those caught, and those ignored, in a /proc/PID/status. Known, if that has been seen before
    (in the pause that counts)."""
    found = dict(_SIGNALS.findall(text))
    return int(found[b"SigCgt"], 16), int(found[b"SigIgn"], 16)


def dispositions(pid: int, every: bool = False, text: bytes = b"") -> tuple[int, int]:
    """Signals with a handler, and those that the process ignores and that may be sent to it
    without any effect (`every`: all that it says it ignores), bit n-1 for signal n. `text`: its
    /proc/PID/status, if that has been read."""
    if not text:
        with open(f"/proc/{pid}/status", "rb", buffering=0) as file:
            text = file.readall()
    caught, ignored = signals_in(text)
    if every:
        return caught, ignored
    return caught, (ignored | _IGNORED_BY_DEFAULT) & ~caught & ~_JOB_CONTROL
