"""System calls made inside another, stopped process, and memory there to make them with.

How: one page of code and room for data (the *scratch*) is mapped in the target by a call made
through a `syscall` instruction that the target has already (in its vdso), with system call stops:
not a byte of the target is patched. From then on a loop in the scratch runs whole arrays of calls
for one round trip and ends in int3. Where SIGTRAP is ignored int3 would reset that for good
(force_sig_info_to_task; the same where it is blocked, hence the mask below), so there every call
goes through the vdso's instruction.

Signals are blocked while calls are made (all but SIGTRAP in the loop) and stay queued. A SIGTRAP
that somebody sends, or that was queued already, is put back into the queue, siginfo and all, and
the rest of the batch is made without the loop. SIGSTOP takes effect: the process is a stopped one
when it is let go. A restartable sequence (rseq) that the thread was in is noted before and written
back after, for the kernel clears it on the way; it then aborts as it must.

The thread's own registers are put back in an event stop, where the kernel's restart of interrupted
system calls works, unless an injected call sleeps interruptibly with a restart block of its own
(nanosleep, futex with timeout, poll): do not inject those into a live target.

Windows
-------
If this process is killed (SIGKILL) the kernel detaches and the target runs on from the registers it
has at that instant. It is harmed in these windows only, each inside ONE C call (snap_inject):
 1. `open`: from the registers set for mmap to those put back (2 system call stops, 20-150 us). The
    thread would return from `syscall` into the vdso with wrong registers.
 2. each `batch`: from the loop's registers set to those put back after its trap (10-60 us). The
    thread would get a fatal SIGTRAP, or go on with its signals blocked.
 3. `close`: munmap through the vdso, as window 1.
Between the calls the thread has its own registers and mask, and stands in an event stop or in the
loop's trap with the signal taken from it (waitpid clears it, kernel/exit.c wait_task_stopped): a
death of the tracer is harmless there but for the scratch, mapped from `open` to `close`.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import signal
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import DeniedError, KernelError, TargetError, UnsupportedError
from ..units import PAGE, align_up
from . import arch_x86_64 as arch
from ._native import ffi, lib
from .arch_x86_64 import NR
from .errnames import error_name
from .ptrace import EXITKILL, SUSPEND_SECCOMP, Tracee, reap
from .refusal import status, stop_name

SCRATCH_SIZE = 64 * 1024
CALL_TIMEOUT = 10.0
"""Seconds that a batch gets."""
CALL_BYTES = 64
_SIGNALS = re.compile(rb"^(SigIgn|SigCgt):\s*(\w+)", re.MULTILINE)
_IGNORED_BY_DEFAULT = sum(1 << n - 1 for n in (signal.SIGURG, signal.SIGWINCH, signal.SIGCHLD))
_JOB_CONTROL = sum(
    1 << n - 1
    for n in (signal.SIGCONT, signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
)
_VDSO_MAX = 1 << 20
_SIGTRAP_BIT = 1 << (signal.SIGTRAP - 1)
_MAP_FIXED = 0x10
_MAP_FIXED_NOREPLACE = 0x100000
_PROT_RWX = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
_PROCMAP_QUERY = 0xC0686611  # _IOWR('f', 17, struct procmap_query), Linux 6.11
_PROCMAP_EXECUTABLE = 0x4
_MAX_ERRNO = 4095


class Call(NamedTuple):
    """One system call: its number (arch_x86_64.NR) and up to six arguments."""

    nr: int
    args: tuple[int, ...] = ()


class Remote:
    """Calls made in one stopped thread, with a scratch that other threads can share (`on`).

    The scratch is [scratch, scratch + scratch_size): one page of code, an array of calls, and
    [data, data + data_size) for the caller.
    """

    die_at = 0
    """For tests: the n-th point between two steps of an injection at which this process kills
    itself."""

    def __init__(
        self, tracee: Tracee, size: int = SCRATCH_SIZE, timeout: float = CALL_TIMEOUT
    ) -> None:
        self.tracee = tracee
        self.timeout = timeout
        self.scratch = 0
        self.scratch_size = max(align_up(size, PAGE), 2 * PAGE)
        array = min(4 * PAGE, (self.scratch_size - PAGE) // 2)
        self.capacity = array // CALL_BYTES
        self._data_offset = PAGE + array
        self._at: Any = None
        self._maker: Remote | None = None  # whose scratch it is, if not our own
        self._loop_allowed = False
        self._guard = 0  # where the way home lies in the target, 0: there is none
        self._caught = self._ignored = 0

    @property
    def data(self) -> int:
        return self.scratch + self._data_offset

    @property
    def data_size(self) -> int:
        return self.scratch_size - self._data_offset

    def open(self, hint: int | None = None) -> None:
        """Maps the scratch, at `hint` exactly (which must be free) or where the kernel likes.

        Raises UnsupportedError when the target has no `syscall` instruction to borrow, DeniedError
        when a seccomp filter of it cannot be suspended, KernelError when mmap fails.
        """
        instruction, room = find_room(self.tracee)
        if room and not self.tracee.options & EXITKILL:
            self._guard = room
            self._caught, self._ignored = dispositions(self.tracee.tid)
        self._prepare(instruction)
        self._at.undo = self.scratch_size if self._guard else 0
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        if hint is not None:
            flags |= _MAP_FIXED_NOREPLACE
        protection = mmap.PROT_READ | mmap.PROT_WRITE if self._guard else _PROT_RWX
        args = (hint or 0, self.scratch_size, protection, flags, arch.NO_SYSCALL, 0)
        try:
            address = self.batch([Call(NR.mmap, args)])[0]
            self._at.undo = 0
            refused = not self._guard and -address in (errno.EACCES, errno.EPERM, errno.ENOTSUP)
            if refused:  # nothing may be writable and executable at once (SELinux, PR_SET_MDWE)
                args = (*args[:2], mmap.PROT_READ | mmap.PROT_WRITE, *args[3:])
                address = self.batch([Call(NR.mmap, args)])[0]
            self.scratch = _checked(self.tracee.tid, NR.mmap, args, address)
            if hint is not None and self.scratch != hint:  # before Linux 4.17 the flag is unknown
                raise KernelError(f"mmap at {hint:#x} went to {self.scratch:#x}", "uname -r")
            if self._guard:
                self._at.scratch, self._at.scratch_size = self.scratch, self.scratch_size
                self._loop_allowed = True
            else:
                _, ignored = dispositions(self.tracee.tid, every=True)
                self._loop_allowed = self._place_loop(refused) and not ignored & _SIGTRAP_BIT
        except BaseException:
            self.close()
            raise
        self._at.loop = self._guard or self.scratch
        self._at.array = self.scratch + PAGE

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
        if self._maker is not None and maker._guard:
            at.scratch, at.scratch_size = maker.scratch, maker.scratch_size
        at.die_at = self.die_at

    def close(self) -> None:
        """Unmaps the scratch. The thread stands in an event stop, everything its own."""
        if self._at is None or self._maker is not None:
            return
        try:
            lib.snap_give_back(self._at)
            self._loop_allowed = False
            scratch, self.scratch = self.scratch, 0
            self._at.scratch = 0
            if scratch:
                self.call(NR.munmap, scratch, self.scratch_size)
            lib.snap_guard_wipe(self._at)
        finally:
            self._at = None
            self._guard = 0

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
            results += self._run(calls[start : start + self.capacity])
        return results

    def _run(self, calls: Sequence[Call]) -> list[int]:
        self.tracee.own()
        assert self._at is not None, "open() comes first"
        self._at.use_loop = self._may_use_loop(calls)
        count = len(calls)
        array = ffi.new("snap_call[]", count)
        packed = b"".join(_pack(call) for call in calls)
        ffi.memmove(array, packed, len(packed))
        result = lib.snap_inject(self._at, array, count)
        self.tracee.stop = self._at.stop
        if result < 0:
            self._failed(-result, calls)
        return [array[i].result for i in range(count)]

    def _may_use_loop(self, calls: Sequence[Call]) -> bool:
        """Not with SIGTRAP ignored, nor with a call that has it ignored from now on."""
        maker = self._maker or self
        for call in calls if maker._loop_allowed and not maker._guard else ():
            if call.nr == NR.rt_sigaction and call.args[0] == signal.SIGTRAP and call.args[1]:
                handler = int.from_bytes(self.get(call.args[1], 8), "little")
                maker._loop_allowed = handler != signal.SIG_IGN
        return maker._loop_allowed

    def _failed(self, number: int, calls: Sequence[Call]) -> None:
        tid = self.tracee.tid
        names = ", ".join(dict.fromkeys(arch.syscall_name(call.nr) for call in calls))
        if number == errno.ESRCH:
            reap([tid])
            raise TargetError(f"thread {tid} ended during injected calls ({names})", f"ps -p {tid}")
        if number == errno.ETIMEDOUT:
            raise KernelError(
                f"injected calls ({names}) did not return within {self.timeout:g} s in "
                f"thread {tid}",
                f"cat /proc/{tid}/stack",
            )
        if number == errno.EFAULT:
            raise KernelError(
                f"{stop_name(self._at.fault)} in thread {tid} during injected calls ({names})",
                f"cat /proc/{tid}/maps",
            )
        raise KernelError(
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


def _pack(call: Call) -> bytes:
    args = [value & arch.NO_SYSCALL for value in call.args]
    return _CALL.pack(call.nr, *args, *([0] * (6 - len(args))), 0)


def _checked(tid: int, nr: int, args: tuple[int, ...], result: int) -> int:
    if -_MAX_ERRNO <= result < 0:
        name = arch.syscall_name(nr)
        shown = ", ".join(hex(arg) for arg in args)
        raise KernelError(
            f"{name}({shown}) inside thread {tid}: {error_name(result)}",
            f"snap check {tid}",
        )
    return result


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


def dispositions(pid: int, every: bool = False) -> tuple[int, int]:
    """Signals with a handler, and those that the process ignores and that may be sent to it
    without any effect (`every`: all that it says it ignores), bit n-1 for signal n."""
    with open(f"/proc/{pid}/status", "rb", buffering=0) as file:
        found = dict(_SIGNALS.findall(file.readall()))
    caught, ignored = int(found[b"SigCgt"], 16), int(found[b"SigIgn"], 16)
    if every:
        return caught, ignored
    return caught, (ignored | _IGNORED_BY_DEFAULT) & ~caught & ~_JOB_CONTROL


def find_room(tracee: Tracee) -> tuple[int, int]:
    """Addresses of a `syscall` instruction and, in the padding behind the vdso, of room for the
    guard (0: there is none)."""
    tid = tracee.tid
    try:
        with open(f"/proc/{tid}/auxv", "rb", buffering=0) as file:
            auxv = file.readall()
        with open(f"/proc/{tid}/maps", "rb", buffering=0) as maps:
            words = struct.iter_unpack("QQ", auxv[: len(auxv) & ~15])
            vdso = next((value for key, value in words if key == arch.AT_SYSINFO_EHDR), 0)
            end = _executable_end(maps.fileno(), vdso) if vdso else 0
        data = tracee.read(vdso, min(end - vdso, _VDSO_MAX)) if end else b""
    except OSError as error:
        raise TargetError(f"process {tid}: {error.strerror}", f"ps -p {tid}") from None
    found = data.find(arch.SYSCALL_INSTRUCTION)
    if found < 0 or not data.startswith(b"\x7fELF"):
        return find_syscall(tracee), 0
    return vdso + found, vdso + room if (room := _padding(data)) else 0


def _padding(vdso: bytes) -> int:
    """Offset of zeros at the end that hold the guard, or of a guard that was left by one who died;
    0: there is no such place."""
    length = ffi.new("uint64_t *")
    code = lib.snap_guard_code(length)
    left = vdso.find(bytes(ffi.buffer(code, length[0])))
    if left >= 0:
        return left
    start = align_up(len(vdso.rstrip(b"\0")) + 8, 16)
    return start if start + lib.snap_guard_size() <= len(vdso) else 0


def find_syscall(tracee: Tracee) -> int:
    """Address of a `syscall` instruction in executable memory of the target: in its vdso, which
    the auxiliary vector names, or else in any executable mapping."""
    tid = tracee.tid
    try:
        with open(f"/proc/{tid}/auxv", "rb", buffering=0) as file:
            auxv = file.readall()
        with open(f"/proc/{tid}/maps", "rb", buffering=0) as maps:
            words = struct.iter_unpack("QQ", auxv[: len(auxv) & ~15])
            vdso = next((value for key, value in words if key == arch.AT_SYSINFO_EHDR), 0)
            end = _executable_end(maps.fileno(), vdso) if vdso else 0
            if end and (found := _scan(tracee, vdso, end)):
                return found
            ranges = _executable_ranges(maps.readall())
    except OSError as error:
        raise TargetError(f"process {tid}: {error.strerror}", f"ps -p {tid}") from None
    if not ranges and not os.path.exists(f"/proc/{tid}/exe"):
        raise TargetError(f"process {tid} has ended", f"ps -p {tid}")
    for start, stop in ranges:
        if found := _scan(tracee, start, stop):
            return found
    raise UnsupportedError(
        f"process {tid} has no `syscall` instruction to borrow",
        [f"{len(ranges)} executable mappings, vdso at {vdso:#x}"],
        f"cat /proc/{tid}/maps",
    )


def _executable_end(maps: int, address: int) -> int:
    """End of the executable mapping that starts at or holds `address`; 0 if there is none, or the
    kernel cannot tell (PROCMAP_QUERY, Linux 6.11: one mapping without reading all of maps)."""
    query = bytearray(struct.pack("13Q", 13 * 8, _PROCMAP_EXECUTABLE, address, *([0] * 10)))
    try:
        fcntl.ioctl(maps, _PROCMAP_QUERY, query)
    except OSError:
        return 0
    end: int = struct.unpack_from("13Q", query)[4]
    return end


def _executable_ranges(text: bytes) -> list[tuple[int, int]]:
    """Executable mappings of a /proc/PID/maps, the vdso first, vsyscall left out."""
    found: list[tuple[int, int]] = []
    for line in text.splitlines():
        fields = line.split(None, 5)
        name = fields[5] if len(fields) > 5 else b""
        if fields[1][2:3] != b"x" or name == b"[vsyscall]":
            continue
        start, _, end = fields[0].partition(b"-")
        found.insert(0 if name == b"[vdso]" else len(found), (int(start, 16), int(end, 16)))
    return found


def _scan(tracee: Tracee, start: int, end: int) -> int:
    """Address of the first `syscall` instruction of [start, end); 0 when there is none."""
    step = 1 << 20
    for address in range(start, end, step):
        length = min(step + 1, end - address)  # one more: an instruction across the seam
        offset = tracee.read(address, length).find(arch.SYSCALL_INSTRUCTION)
        if offset >= 0:
            return address + offset
    return 0
