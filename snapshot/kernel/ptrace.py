"""Threads of another process, stopped with ptrace: reading and changing what they hold.

Threads are seized (PTRACE_SEIZE, Linux 3.4), never attached, and stopped with PTRACE_INTERRUPT: no
SIGSTOP is ever sent, and a process that somebody else has stopped stays stopped. A thread is halted
in an *event stop* only, in which it has no signal in hand: a signal that arrives while we wait for
the stop is let through at once, so nothing is held back that could be lost.

ptrace belongs to an OS thread: every call for a Tracee must come from the one that seized it
(asserted). Linux detaches a tracee when its tracer ends, whatever stop it is in; see remote.py for
what that means during injected calls.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

from ..errors import KernelError, TargetError, UnsupportedError
from . import arch_x86_64 as arch
from ._native import ffi, lib
from .closing import Closing
from .refusal import fail, refused, status, stuck
from .touched import touched

EXITKILL: int = lib.SNAP_PTRACE_O_EXITKILL
"""The tracee is killed when its tracer ends (PTRACE_O_EXITKILL)."""
TRACESYSGOOD: int = lib.SNAP_PTRACE_O_TRACESYSGOOD
TRACEEXIT: int = lib.SNAP_PTRACE_O_TRACEEXIT
"""The tracee stops when it ends, while its memory is still there (PTRACE_O_TRACEEXIT)."""
SUSPEND_SECCOMP: int = lib.SNAP_PTRACE_O_SUSPEND_SECCOMP
STOP_TIMEOUT = 2.0
"""Seconds that threads get to reach their stop. Only a thread that cannot be woken in the kernel
(vfork, a page fault that nobody serves, dead storage) takes longer than milliseconds."""
SIGINFO_SIZE = 128


class Rseq(NamedTuple):
    """A thread's registration of restartable sequences (PTRACE_GET_RSEQ_CONFIGURATION, 5.13)."""

    address: int
    size: int
    signature: int
    flags: int


class State(NamedTuple):
    """What a stopped thread holds that only its tracer can ask for."""

    registers: bytes  # 216 bytes, struct user_regs_struct
    xstate: bytes  # the XSAVE area
    signal_mask: int
    rseq: Rseq | None
    critical_section: int  # of that: rseq_cs

_NO_CALLS: frozenset[int] = frozenset()


class Tracee:
    """One seized thread. Everything but `interrupt` and `wait` needs it stopped."""

    def __init__(self, tid: int, options: int) -> None:
        self.tid = tid
        self.options = options
        self.owner = threading.get_native_id()
        self.stop = 0
        """The stop as waitpid(2) reported it; 0 while the thread runs."""

    def __repr__(self) -> str:
        state = f"stop {self.stop:#x}" if self.stop else "running"
        return f"<Tracee {self.tid} {state}>"

    def _check(self, result: int, request: str) -> int:
        if result < 0:
            fail(self.tid, request, -result)
        return result

    def own(self) -> None:
        """Asserts that this OS thread may make ptrace requests for the tracee."""
        assert threading.get_native_id() == self.owner, "ptrace belongs to the thread that seized"

    # Stopping and running

    def interrupt(self) -> None:
        """Asks for an event stop; returns at once."""
        self.own()
        self._check(lib.snap_interrupt(self.tid), "PTRACE_INTERRUPT")

    def wait(self, timeout: float = STOP_TIMEOUT) -> int:
        """Waits for the next stop of any kind, at most `timeout` seconds -> its wait status.

        Raises TargetError when the thread ends, KernelError naming it when the time is over.
        """
        return self._wait(lib.snap_wait, timeout)

    def halt(self, timeout: float = STOP_TIMEOUT) -> int:
        """Takes it to an event stop, from running or from any other stop (see the module)."""
        return self._wait(lib.snap_halt, timeout)

    def _wait(self, function: Any, timeout: float) -> int:
        self.own()
        stop = ffi.new("int *", self.stop)
        result = function(self.tid, int(timeout * 1e6), stop)
        if result == -errno.ETIMEDOUT:
            self.stop = 0
            raise KernelError(stuck([self.tid], timeout), f"cat /proc/{self.tid}/stack")
        self.stop = 0 if result < 0 else stop[0]
        if result == -errno.ESRCH:
            reap([self.tid])
        self._check(result, "waitpid")
        return self.stop

    def cont(self, signal: int = 0) -> None:
        """Lets it run; `signal` is delivered if it is in a signal-delivery stop."""
        self._resume(lib.SNAP_RESUME_CONT, signal)

    def syscall(self, signal: int = 0) -> None:
        """Lets it run up to the next entry to or exit from a system call (PTRACE_SYSCALL)."""
        self._resume(lib.SNAP_RESUME_SYSCALL, signal)

    def _resume(self, how: int, signal: int) -> None:
        self.own()
        self._check(lib.snap_resume(self.tid, how, signal), "PTRACE_CONT")
        self.stop = 0

    def run_on(self) -> None:
        """Lets it go on from an event stop; one that somebody has stopped (SIGSTOP, …) stays so. A
        thread that has ended meanwhile is no error."""
        self.own()
        lib.snap_run_on(self.tid, self.stop)
        self.stop = 0

    def detach(self, signal: int = 0) -> None:
        """Lets it go for good. A thread that has ended meanwhile is no error."""
        self.own()
        result = lib.snap_detach(self.tid, signal)
        self.stop = 0
        if result == -errno.ESRCH:
            reap([self.tid])
        else:
            self._check(result, "PTRACE_DETACH")

    @property
    def in_syscall_stop(self) -> bool:
        return bool(lib.snap_is_syscall_stop(self.stop))

    @property
    def stop_signal(self) -> int:
        """The signal of a signal-delivery stop; 0 in a stop of any other kind."""
        return int(lib.snap_stop_signal(self.stop)) if self.stop else 0

    def set_options(self, options: int) -> None:
        """Replaces PTRACE_O_* options; TRACESYSGOOD is always among them."""
        self.own()
        self._check(lib.snap_set_options(self.tid, options | TRACESYSGOOD), "PTRACE_SETOPTIONS")
        self.options = options | TRACESYSGOOD

    # What it holds

    def registers(self) -> bytes:
        """216 bytes, struct user_regs_struct (see arch_x86_64.Registers)."""
        self.own()
        out = ffi.new("unsigned char[]", arch.REGISTERS_SIZE)
        result = lib.snap_get_registers(self.tid, out, arch.REGISTERS_SIZE)
        if result == -errno.ENOEXEC:
            raise UnsupportedError(
                "32-bit code", [f"thread {self.tid} runs it"], f"file /proc/{self.tid}/exe"
            )
        self._check(result, "PTRACE_GETREGSET NT_PRSTATUS")
        return bytes(ffi.buffer(out))

    def set_registers(self, registers: bytes) -> None:
        self.own()
        assert len(registers) == arch.REGISTERS_SIZE
        self._check(
            lib.snap_set_registers(self.tid, registers, len(registers)),
            "PTRACE_SETREGSET NT_PRSTATUS",
        )

    def xstate(self) -> bytes:
        """The XSAVE area (NT_X86_XSTATE): x87, SSE, AVX, … in the kernel's standard format."""
        self.own()
        out = ffi.new("unsigned char[]", arch.XSTATE_MAX)
        length = lib.snap_get_xstate(self.tid, out, arch.XSTATE_MAX)
        return bytes(ffi.buffer(out, self._check(length, "PTRACE_GETREGSET NT_X86_XSTATE")))

    def set_xstate(self, data: bytes) -> None:
        self.own()
        self._check(
            lib.snap_set_xstate(self.tid, data, len(data)), "PTRACE_SETREGSET NT_X86_XSTATE"
        )

    def signal_mask(self) -> int:
        """Blocked signals, bit n-1 for signal n; inside ppoll, sigsuspend, … the mask that the
        program comes back to, not the one it waits with."""
        self.own()
        mask = ffi.new("uint64_t *")
        self._check(lib.snap_get_signal_mask(self.tid, mask), "PTRACE_GETSIGMASK")
        return int(mask[0])

    def set_signal_mask(self, mask: int) -> None:
        self.own()
        self._check(lib.snap_set_signal_mask(self.tid, mask), "PTRACE_SETSIGMASK")

    def pending(self, shared: bool) -> list[bytes]:
        """Queued signals of the process (shared) or of this thread: siginfo, 128 bytes each."""
        self.own()
        found: list[bytes] = []
        batch = 32
        out = ffi.new("unsigned char[]", batch * SIGINFO_SIZE)
        while True:
            got = lib.snap_peek_signals(self.tid, shared, len(found), out, batch)
            self._check(got, "PTRACE_PEEKSIGINFO")
            data = bytes(ffi.buffer(out, got * SIGINFO_SIZE))
            found += [data[i : i + SIGINFO_SIZE] for i in range(0, len(data), SIGINFO_SIZE)]
            if got < batch:
                return found

    def rseq(self) -> Rseq | None:
        """Its registration, None without one, or before Linux 5.13."""
        self.own()
        out = ffi.new("snap_rseq *")
        result = lib.snap_get_rseq(self.tid, out)
        if result == -errno.EOPNOTSUPP:
            return None
        self._check(result, "PTRACE_GET_RSEQ_CONFIGURATION")
        if not out.address:
            return None
        return Rseq(out.address, out.size, out.signature, out.flags)

    def siginfo(self) -> bytes:
        """128 bytes: the siginfo of the stop."""
        self.own()
        out = ffi.new("unsigned char[]", SIGINFO_SIZE)
        self._check(lib.snap_get_siginfo(self.tid, out), "PTRACE_GETSIGINFO")
        return bytes(ffi.buffer(out))

    def read(self, address: int, length: int) -> bytes:
        """Memory of its process, [address, address + length)."""
        out = ffi.new("unsigned char[]", length)
        result = lib.snap_read_memory(self.tid, address, out, length)
        self._check(result, f"reading {length} bytes at {address:#x}")
        return bytes(ffi.buffer(out))

    def write(self, address: int, data: bytes) -> None:
        """Writes memory of its process, also where the process itself may not."""
        source = ffi.from_buffer(data)
        result = lib.snap_write_memory(self.tid, address, source, len(data))
        self._check(result, f"writing {len(data)} bytes at {address:#x}")


class LateError(KernelError):
    """Threads that were asked to stop and have not. They run, and are ours until they stop: the
    kernel has no way to let a running thread go before this OS thread ends."""

    def __init__(self, tids: list[int], timeout: float) -> None:
        super().__init__(stuck(tids, timeout), f"cat /proc/{tids[0]}/stack")
        self.tids = tids

    def let_go(self, timeout: float) -> bool:
        """Waits for their stops, lets each go at once; whether none is left."""
        deadline = time.monotonic() + timeout
        left = []
        for tid in self.tids:
            tracee = Tracee(tid, TRACESYSGOOD)
            try:
                tracee.wait(max(0.0, deadline - time.monotonic()))
                tracee.detach(tracee.stop_signal)
            except TargetError:
                continue  # it has ended
            except KernelError:
                left.append(tid)
        self.tids = left
        return not left


def seize(tid: int, options: int = 0) -> Tracee:
    """Makes this OS thread the tracer of a thread, which runs on meanwhile.

    TargetError: no such process, a zombie, a kernel thread, traced by somebody already.
    DeniedError: the kernel does not let this user.
    """
    options |= TRACESYSGOOD
    result = lib.snap_seize(tid, options)
    if result < 0:
        refused(tid, -result)
    return Tracee(tid, options)


def adopt(tid: int, options: int = TRACESYSGOOD, timeout: float = STOP_TIMEOUT) -> Tracee:
    """A thread that a tracee has made with CLONE_PTRACE: it is ours from its birth, with the
    options of its maker. Waits for its first stop."""
    tracee = Tracee(tid, options)
    tracee.wait(timeout)
    return tracee


class Reaper(Closing):
    """A thread that keeps an execve of a process from waiting for threads that we have stopped, as
    we do for it (native/threads.h). Started before the pause: to make a thread takes 0.1 ms."""

    def __init__(self, leader: int) -> None:
        self.handle: Any = lib.snap_reaper_start(leader)

    def close(self) -> None:
        lib.snap_reaper_stop(self.handle)
        self.handle = ffi.NULL


def seize_and_stop(
    tids: Sequence[int],
    known: Sequence[Tracee] = (),
    reaper: Reaper | None = None,
    timeout: float = STOP_TIMEOUT,
    again: frozenset[int] = _NO_CALLS,
    since_us: Any = None,
) -> tuple[list[Tracee], dict[int, int]]:
    """Seizes threads of one process, then waits until each is in an event stop. `known`: those of
    it that are ours already; `reaper`: where it may have more than one; `again`: system calls that
    are made again when the stop has made them return EINTR; `since_us`: int64_t *, which becomes
    the time (CLOCK_MONOTONIC) at which the first one is told to stop, if it is 0.

    -> the stopped ones, and by tid the errno of those that could not be had (ESRCH: it ended;
    EPERM: ending, or see `refused`). LateError when one does not stop in time; the others of `tids`
    are let go.
    """
    before, count = len(known), len(tids)
    tracees = [Tracee(tid, TRACESYSGOOD) for tid in tids]
    numbers = ffi.new("int[]", [*(tracee.tid for tracee in known), *tids])
    stops = ffi.new("int[]", before + count)
    running = lib.snap_stop_all(
        *(numbers, stops, before, count, reaper.handle if reaper is not None else ffi.NULL),
        *(TRACESYSGOOD, int(timeout * 1e6)),
        call_set(again),
        ffi.new("int64_t *") if since_us is None else since_us,
    )
    results = list(stops)[before:]
    if running:
        late = [tid for tid, stop in zip(tids, results, strict=True) if stop == 0]
        error = LateError(late, timeout)
        lib.snap_detach_all(numbers + before, stops + before, count)
        raise error
    stopped, failed = [], {}
    for tracee, stop in zip(tracees, results, strict=True):
        if stop < 0:
            failed[tracee.tid] = -stop
            continue
        tracee.stop = stop
        stopped.append(tracee)
    if failed:
        reap([tid for tid, number in failed.items() if number == errno.ESRCH], timeout=0)
    return stopped, failed


@contextmanager
def child_signals() -> Iterator[None]:
    """Before other threads are made: for the length of the block nobody but who waits for a stop is
    told of it (SIGCHLD), and so looks more rarely. Threads that begin in it do not get that signal.
    Of no effect where this process has other threads already, or does something with the signal."""
    if signal.getsignal(signal.SIGCHLD) != signal.SIG_DFL or len(os.listdir("/proc/self/task")) > 1:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    lib.snap_hear_stops(1)
    try:
        yield
    finally:
        lib.snap_hear_stops(0)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@lru_cache(maxsize=4)
def call_set(numbers: frozenset[int]) -> Any:
    """System calls as C takes them: uint64_t[], a bit for each."""
    bits = sum(1 << number for number in numbers).to_bytes(lib.SNAP_AGAIN_CALLS // 8, "little")
    return ffi.from_buffer("uint64_t[]", bits)


def registers_of(tracees: Sequence[Tracee]) -> tuple[bytes, list[Tracee]]:
    """`Tracee.registers` of all, one after the other, in one call; and those that have ended (their
    part of the bytes is zero)."""
    count = len(tracees)
    out = ffi.new("unsigned char[]", count * arch.REGISTERS_SIZE)
    numbers = ffi.new("int[]", [tracee.tid for tracee in tracees])
    stops = ffi.new("int[]", [tracee.stop for tracee in tracees])
    if not lib.snap_get_registers_all(numbers, stops, count, out, arch.REGISTERS_SIZE):
        return bytes(ffi.buffer(out)), []
    gone = [tracee for tracee, stop in zip(tracees, stops, strict=True) if stop == -errno.ESRCH]
    for tracee, stop in zip(tracees, stops, strict=True):
        if stop < 0 and stop != -errno.ESRCH:
            tracee.registers()  # raises, with the reason
    reap([tracee.tid for tracee in gone], timeout=0)
    return bytes(ffi.buffer(out)), gone


MARK_GUARDED = int(lib.SNAP_MARK_GUARDED)
MARK_RESTARTS = int(lib.SNAP_MARK_RESTARTS)
MARK_AGAIN = int(lib.SNAP_MARK_AGAIN)


def marks(registers: bytes, guarded: range, again: frozenset[int]) -> bytes:
    """Of each thread, out of what `registers_of` has read, the sum of what there is to see: it
    stands in the range `guarded`; it is in restart_syscall, about to make it, or goes there; its
    call is one of `again` and is made again. Nothing: of none of them there is anything."""
    count = len(registers) // arch.REGISTERS_SIZE
    found = bytearray(count)
    some = lib.snap_mark_registers(
        ffi.from_buffer("unsigned char[]", registers),
        *(count, guarded.start, guarded.stop, call_set(again)),
        ffi.from_buffer("unsigned char[]", found),
    )
    return bytes(found) if some else b""


class StateRoom:
    """Memory for what `most` threads hold, touched: in the pause the first touch of a page costs
    more than what is read to it."""

    def __init__(self, most: int) -> None:
        self.most = max(1, most)
        self.raw = ffi.new("snap_thread_state[]", self.most)
        self.areas = touched(self.most * arch.XSTATE_MAX)

    def lend(self, to: Any) -> None:
        """To a snap_instant, which is to read states into it."""
        to.states, to.area = self.raw, arch.XSTATE_MAX
        to.areas = ffi.from_buffer("unsigned char[]", self.areas)


class States:
    """The `State` of many threads: read at once, in one call, decoded later."""

    def __init__(self, tracees: Sequence[Tracee], room: StateRoom | None = None) -> None:
        """`room`: for them, if there is any yet; or in which they are."""
        self._tracees = tracees
        count = len(tracees)
        self._room = room if room is not None and room.most >= count else StateRoom(count)

    def read(self, registers: bytes | None = None) -> None:
        """`registers`: as `registers_of` has read them in this stop, if it has."""
        count = len(self._tracees)
        numbers = ffi.new("int[]", [tracee.tid for tracee in self._tracees])
        areas = ffi.from_buffer(self._room.areas)
        raw = self._room.raw
        known = ffi.NULL if registers is None else ffi.from_buffer("unsigned char[]", registers)
        failed = lib.snap_get_states(numbers, count, known, raw, areas, arch.XSTATE_MAX)
        for i in range(count) if failed else ():
            self._check(i)

    def _check(self, i: int) -> None:
        failed = self._room.raw[i].failed
        if failed == -errno.ENOEXEC:
            self._tracees[i].registers()  # raises, with the reason
        elif failed:
            fail(self._tracees[i].tid, ffi.string(self._room.raw[i].request).decode(), -failed)

    def decode(self) -> list[State]:
        view = memoryview(self._room.areas)
        found = []
        for i in range(len(self._tracees)):
            one, area = self._room.raw[i], i * arch.XSTATE_MAX
            rseq = one.rseq
            found.append(
                State(
                    registers=bytes(ffi.buffer(one.registers)),
                    xstate=bytes(view[area : area + one.xstate]),
                    signal_mask=one.signal_mask,
                    rseq=Rseq(rseq.address, rseq.size, rseq.signature, rseq.flags)
                    if rseq.address
                    else None,
                    critical_section=one.critical_section,
                )
            )
        return found


def rseq_addresses(tracees: Sequence[Tracee]) -> list[int]:
    """Of their areas of restartable sequences, to which the kernel writes whenever a thread goes on
    after it was switched away; of those that have one."""
    count = len(tracees)
    numbers = ffi.new("int[]", [one.tid for one in tracees])
    addresses = ffi.new("uint64_t[]", count)
    lib.snap_get_rseq_all(numbers, count, addresses)
    return [address for address in addresses if address]


def detach_all(tracees: Sequence[Tracee]) -> None:
    """Lets all of them go, in one call; those that have ended are reaped."""
    if not tracees:
        return
    tracees[0].own()
    numbers = ffi.new("int[]", [tracee.tid for tracee in tracees])
    stops = ffi.new("int[]", [tracee.stop for tracee in tracees])
    lib.snap_detach_all(numbers, stops, len(tracees))
    for tracee in tracees:
        tracee.stop = 0
    if any(stops):
        reap([tid for tid, result in zip(numbers, stops, strict=True) if result == -errno.ESRCH])


def reap(tids: Sequence[int], timeout: float = STOP_TIMEOUT) -> None:
    """Takes note of the end of threads that we traced, so that their parents hear of it.

    The status of a process that is our own child stays for whoever waits for it.
    """
    for tid in sorted(tids, key=lambda tid: int(status(tid).get("Tgid", 0)) == tid):  # leaders last
        fields = status(tid)
        ours = int(fields.get("PPid", 0)) == os.getpid() and int(fields.get("Tgid", 0)) == tid
        if not ours and int(fields.get("TracerPid", 0)) == threading.get_native_id():
            lib.snap_reap(tid, int(timeout * 1e6))
