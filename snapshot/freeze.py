"""Stopping a process for an instant: every thread, and on again whatever happens.

    with freeze(pid) as frozen:
        frozen.registers(frozen.threads[0])  # as an image stores them
        frozen.remote.call(NR.getppid)       # a system call inside the process

Threads are halted with ptrace until /proc/PID/task shows none that is not ours. What a mere stop
would do to an interrupted system call is undone (`RESTARTED`): the program sees neither
EINTR nor an early return. A restarted relative timeout of epoll_wait, sigtimedwait, semtimedop or
a socket with SO_RCVTIMEO starts over, as after SIGSTOP and SIGCONT with SA_RESTART; those of
nanosleep, poll, select and futex do not.

All of it belongs to one OS thread (asserted). A child of this very process should be frozen from
another one: a waitpid(2) for it elsewhere in this process is told of our stops as if it had ended.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import NoReturn

from .errors import KernelError, SnapError, TargetError
from .kernel import arch_x86_64 as arch
from .kernel import ptrace, refusal, room
from .kernel._native import ffi, lib
from .kernel.arch_x86_64 import NR, Registers
from .kernel.ptrace import STOP_TIMEOUT, LateError, Reaper, StateRoom, States, Tracee
from .kernel.remote import NOTHING, Call, Interview, Packed, Remote, data_area, making
from .kernel.room import Room
from .kernel.urgency import urgent

DEFERRED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Held back while threads are being stopped or let go, so that no exception cuts that in two."""

_STOPPING = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
LATE_SECONDS = 5.0
"""How long a thread that did not stop in time (vfork, dead storage) is waited for, so that it can
be let go; the others run meanwhile."""
_ENDING_SECONDS = 50e-6
_EXEC_SECONDS = 1.0
"""While a thread replaces the program its leader is a zombie for a moment: no error before this."""

RESTARTED = frozenset(
    (
        NR.epoll_wait,
        NR.epoll_pwait,
        NR.epoll_pwait2,
        NR.rt_sigtimedwait,
        NR.semop,
        NR.semtimedop,
        NR.io_getevents,
        NR.io_pgetevents,
        NR.io_uring_enter,
        # Sockets with SO_RCVTIMEO or SO_SNDTIMEO (sock_intr_errno)
        NR.read,
        NR.readv,
        NR.write,
        NR.writev,
        NR.recvfrom,
        NR.recvmsg,
        NR.recvmmsg,
        NR.sendto,
        NR.sendmsg,
        NR.sendmmsg,
        NR.sendfile,
        NR.splice,
        NR.accept,
        NR.accept4,
        NR.connect,
    )
)
"""Calls that return EINTR for any wake-up, whatever SA_RESTART says, and have done nothing when
they do: signal(7), "Interruption of system calls and library functions by stop signals". Not
close(2), which must never be made twice."""


class Frozen:
    """A stopped process: the threads with the leader first, and calls inside it."""

    def __init__(
        self,
        pid: int,
        pidfd: int,
        earlier: Frozen | None = None,
        room: Room | None = None,
        scratch: int = 0,
    ) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.threads: list[Tracee] = []
        self.freeze_us = 0
        """From the first thread that is told to stop to the last that has."""
        self.stopped_us = 0
        """The pause: from the same to the last thread let go; known afterwards."""
        self._told_us = ffi.new("int64_t *")  # when the first thread was told to stop, or 0
        self.restarted = 0
        """Threads whose system call would have returned EINTR but for `RESTARTED`."""
        self._stays: Tracee | None = None
        self._late = 0
        self._gone: set[int] = set()
        """Threads that have ended, or are just ending, while they were ours."""
        self._remote: Remote | None = None
        self._earlier = earlier
        self._room: Room | None = earlier._room if earlier is not None else room
        self._calls_at: dict[int, tuple[tuple[int, int], int]] = {}
        """By tid: where (rip, rsp) a thread is in a call that goes on as restart_syscall, and its
        own number."""
        self._marks = b""
        """What is remarkable in the registers of each thread (`ptrace.marks`)."""
        self._registers: bytes | None = None
        """Of all threads in their order, as they stood."""
        self._restarting: list[tuple[Tracee, bytes]] = []
        """In restart_syscall, or about to make it, with their registers."""
        self._code: dict[int, tuple[int, bytes]] | None = None
        """By tid, where it is not read from the threads: code that was read of these, and its
        address."""
        self.scratch: int = earlier.scratch if earlier is not None else scratch
        """Where it was at its last use, or may be, and in it:"""
        self.data: tuple[int, int] = earlier.data if earlier is not None else (0, 0)
        """Where answers go: address and size."""
        self._owner = threading.get_native_id()

    @property
    def remote(self) -> Remote:
        """Calls inside the process, in its leader; the scratch is mapped at the first use."""
        return self._remote if self._remote is not None else self.open_remote()

    def open_remote(self, status_text: bytes = b"") -> Remote:
        """The same at the first use, with /proc/PID/status as it is now, if that has been read."""
        remote = Remote(self.threads[0], room=self._room)
        remote.open(near=self.scratch, status_text=status_text)
        self._remote, self._room, self.scratch = remote, remote.room, remote.scratch
        self.data = remote.data, remote.data_size
        return remote

    @classmethod
    def over(
        cls,
        earlier: Frozen,
        threads: list[Tracee],
        registers: bytes,
        marks: bytes,
        code: dict[int, tuple[int, bytes]],
    ) -> Frozen:
        """A stop that has been made elsewhere, and is over: its threads, the leader first, what was
        found in them, and, where that is needed, the code before where they stood."""
        made = cls(earlier.pid, -1, earlier)
        made.threads, made._registers, made._marks, made._code = threads, registers, marks, code
        made._note_interrupted(registers)
        made._earlier = None
        return made

    @property
    def guarded(self) -> range | None:
        """Where threads may stand that are still on their way home; None: that is to be found
        out in the stop."""
        return self._room.guarded if self._room is not None else None

    @property
    def group_stopped(self) -> bool:
        """Somebody has stopped the process (SIGSTOP, SIGTSTP, …); it stays so when let go. A seized
        thread reports the signal that stopped it then (ptrace(2), group-stop)."""
        return (self.threads[0].stop >> 8 & 0xFF) in _STOPPING

    def interview(
        self,
        first: Packed,
        others: Packed,
        tracees: Sequence[Tracee],
        status_text: bytes,
        pidfd: int = -1,
    ) -> Interview | None:
        """What the leader and others of these threads answer, in one go, with the scratch where it
        was the last time, or may be. None: they have to be asked step by step. `pidfd`: as of
        `Remote.interview`."""
        remote = self._remote = Remote(self.threads[0], room=self._room)
        found = remote.interview(self.scratch, first, others, tracees[1:], status_text, pidfd)
        self._remote, self._room = None, remote.room
        return found

    def make(self, call: Call, packed: Packed, status_text: bytes) -> Interview | None:
        """Likewise a descriptor that the leader makes by a call, and what else it is asked:
        `Interview.fetched`; its first answer is that of the call."""
        first = making(call, packed)
        if first is None:
            return None
        found = self.interview(first, NOTHING, self.threads[:1], status_text, self.pidfd)
        if found is not None:
            self.data = data_area(self.scratch)
        return found

    def states(self, room: StateRoom | None = None) -> States:
        """What every thread holds, in the order of `threads`; before the first use of `remote`.
        `room`: for that."""
        assert self._remote is None, "calls have been made"
        states = States(self.threads, room)
        states.read(self._registers)
        return states

    def restarting(self) -> dict[int, bytes]:
        """By tid: `registers` of the threads of which an image stores others than they have."""
        return {tracee.tid: self._as_image(tracee, data) for tracee, data in self._restarting}

    def registers(self, tracee: Tracee) -> bytes:
        """The registers as an image stores them, 216 bytes: those of the thread, in which a call
        that a stop would have made return EINTR says ERESTARTNOHAND (-514), so that a kernel makes
        it again. A thread that has been stopped before may be in restart_syscall (-516), or just
        about to make it, which means nothing in another process: here it is in, or about to make,
        the call itself, if the `earlier` freeze or the code of the program tells which.
        """
        data = self._remote.registers(tracee) if self._remote else tracee.registers()
        return self._as_image(tracee, data)

    def _as_image(self, tracee: Tracee, data: bytes) -> bytes:
        if NR.restart_syscall not in arch.CALL.unpack(data)[:2]:
            return data
        registers = Registers.unpack(data)
        if registers.orig_rax == NR.restart_syscall and registers.rax != NR.restart_syscall:
            number = self._call_before(tracee, registers.rip)
            return data if number is None else registers._replace(orig_rax=number).pack()
        if registers.rax == NR.restart_syscall:
            number = self._call_before(tracee, registers.rip + len(arch.SYSCALL_INSTRUCTION))
            if number is not None:
                return registers._replace(rax=number, orig_rax=arch.NO_SYSCALL).pack()
        return data

    def _call_before(self, tracee: Tracee, end: int) -> int | None:
        """The call whose `syscall` instruction ends at `end`; None: not known, or there is none."""
        code = arch.code_before(end, partial(self._read, tracee))
        if code and not code.endswith(arch.SYSCALL_INSTRUCTION):
            return None
        if tracee.tid in self._calls_at:
            return self._calls_at[tracee.tid][1]
        return arch.call_number_before(code)

    def _read(self, tracee: Tracee, address: int, length: int) -> bytes:
        if self._code is None:
            return tracee.read(address, length)
        start, code = self._code.get(tracee.tid, (0, b""))
        if not start <= address <= address + length <= start + len(code):
            raise TargetError(f"no code of thread {tracee.tid} at {address:#x}", "")
        return code[address - start : address - start + length]

    def close_remote(self) -> None:
        """Unmaps the scratch before the end of the block; the next use of `remote` maps it anew."""
        remote, self._remote = self._remote, None
        if remote is not None:
            remote.close()

    def stay(self) -> None:
        """At the end of the block one thread runs on, but stays seized by this OS thread and stops
        once more when it ends: it is to be served at once (kernel/exits.py). Not the leader, if
        there is another: a signal that nobody handles never reaches a process whose leader is not
        traced, but wakes one whose leader is, and what it is in may return EINTR.
        """
        self._stays = self.threads[min(1, len(self.threads) - 1)]
        with suppress(SnapError):  # killed
            self._stays.set_options(ptrace.TRACEEXIT)

    def _stop(self, timeout: float, reaper: Reaper) -> bytes:
        """Rounds of listing, seizing and waiting -> the registers of all, in the order of threads.

        A listing that is made while threads end can miss others (proc_task_readdir), so the end is
        told by their number: ours are stopped, they neither end nor make new ones. All but SIGKILL
        and an execve that was under way, which kills its siblings, stopped or not, and takes over
        the leader's tid: hence the look at ours afterwards.
        """
        began = time.monotonic()
        folder = f"/proc/{self.pid}/task"
        failed: dict[int, int] = {}
        while True:
            count = os.stat(folder).st_nlink - 2
            if count <= len(self.threads):
                self.threads.sort(key=lambda tracee: (tracee.tid != self.pid, tracee.tid))
                registers, gone = ptrace.registers_of(self.threads)
                if not gone and count == len(self.threads):
                    if not self._sent_home(registers):
                        return registers
                    continue
                self._gone.update(tracee.tid for tracee in gone)
                self.threads = [tracee for tracee in self.threads if tracee not in gone]
            if time.monotonic() > began + timeout:
                self._unstoppable(failed, timeout)
            known = {tracee.tid for tracee in self.threads}
            # Once each: what a thread in execve takes over is the tid of a leader that was listed.
            listed = dict.fromkeys(map(int, os.listdir(folder)))
            new = [tid for tid in listed if tid not in known]
            if not new:
                time.sleep(_ENDING_SECONDS)  # for those that are ending: we may be `urgent`
            try:
                stopped, failed = ptrace.seize_and_stop(
                    new, self.threads, reaper, timeout, RESTARTED, self._told_us
                )
            except LateError as late:
                self._begin_again(late)
                began = time.monotonic()
                continue
            self.threads += stopped
            self._gone.update(failed)
            if self.pid in failed:
                refusal.refused_for_good(self.pid)
                if time.monotonic() > began + _EXEC_SECONDS:
                    refusal.refused(self.pid, failed[self.pid])
            # The others that failed are ending (ESRCH, EPERM) and will not be listed again.

    def _stop_only(self, tid: int, timeout: float, reaper: Reaper) -> bytes:
        """One thread, while the others run -> its registers."""
        self.threads, failed = ptrace.seize_and_stop(
            [tid], (), reaper, timeout, RESTARTED, self._told_us
        )
        while True:
            registers, gone = ptrace.registers_of(self.threads)
            if failed or gone:
                raise TargetError(f"thread {tid} has ended", f"ls /proc/{self.pid}/task")
            if not self._sent_home(registers):
                return registers

    def _sent_home(self, all_registers: bytes) -> bool:
        """Lets threads go on that are still on their way home, since the end of a `snap` that was
        killed (kernel/remote.py): their registers say nothing, and what leads them may not be
        written over. Whether there were any. (What else is remarkable is noted: `_marks`.)"""
        if self._room is not None:
            guard = self._room.guarded
        else:
            places = [rip for _, _, rip, _ in arch.CALL.iter_unpack(all_registers)]
            guard = room.guard_left(self.threads[0], places) if places else range(0)
        self._marks = ptrace.marks(all_registers, guard, RESTARTED)
        late = self._marked(ptrace.MARK_GUARDED)
        for i in late:
            tracee = self.threads[i]
            with suppress(TargetError):  # it has ended
                tracee.cont()
                time.sleep(_ENDING_SECONDS)
                tracee.halt()
                lib.snap_make_again(tracee.tid, ptrace.call_set(RESTARTED))
        return bool(late)

    def _marked(self, what: int) -> list[int]:
        """Places in `threads`."""
        return [i for i, mark in enumerate(self._marks) if mark & what]

    def _begin_again(self, late: LateError) -> None:
        """Lets all go, those that are late as soon as they stop. Raises `late` when one does not,
        or when this was the second time."""
        threads, self.threads = self.threads, []
        ptrace.detach_all(threads)
        self._late += 1
        if not late.let_go(LATE_SECONDS) or self._late > 1:
            raise late

    def _unstoppable(self, failed: dict[int, int], timeout: float) -> NoReturn:
        for tid, number in failed.items():
            refusal.refused(tid, number)
        raise KernelError(
            f"process {self.pid} makes threads faster than they can be stopped: "
            f"{len(self.threads)} in {timeout:g} s",
            f"ls /proc/{self.pid}/task",
        )

    def _note_call(self, tid: int, number: int, place: tuple[int, int]) -> None:
        earlier = self._earlier._calls_at if self._earlier is not None else {}
        if number in arch.RESTARTABLE:
            self._calls_at[tid] = (place, number)
        elif tid in earlier and earlier[tid][0] == place:
            self._calls_at[tid] = earlier[tid]

    def _note_interrupted(self, all_registers: bytes) -> None:
        """The stop made some calls return EINTR to a program that got no signal: they are made
        again, by the kernel, which goes on from ERESTARTNOHAND as it does for pause(2): with a
        handler to run the program sees EINTR as it must, without one the call starts again. That
        is decided when the thread goes on, so a signal that arrives meanwhile is no race. Done in C
        as soon as a thread stands, in case that we die; here they are counted.
        """
        self.restarted = len(self._marked(ptrace.MARK_AGAIN))
        for i in self._marked(ptrace.MARK_RESTARTS):
            tracee, at = self.threads[i], i * arch.REGISTERS_SIZE
            result, number, rip, rsp = arch.CALL.unpack_from(all_registers, at)
            if result == arch.ERESTART_RESTARTBLOCK:
                self._note_call(tracee.tid, number, (rip, rsp))
            elif result == NR.restart_syscall:  # it stands before the instruction
                self._note_call(tracee.tid, number, (rip + len(arch.SYSCALL_INSTRUCTION), rsp))
            if NR.restart_syscall in (result, number):
                here = all_registers[at : at + arch.REGISTERS_SIZE]
                self._restarting.append((tracee, here))

    def _since_us(self) -> int:
        return time.monotonic_ns() // 1000 - self._told_us[0] if self._told_us[0] else 0

    def thaw(self) -> None:
        """Lets every thread go, with nothing of ours left in it."""
        assert threading.get_native_id() == self._owner, "freeze belongs to one OS thread"
        try:
            self.close_remote()
        except TargetError:
            pass  # it has ended: nothing is left to put back
        finally:
            if self._stays is not None:  # first: another could end it, and this stop at its end
                self._stays.run_on()
            ptrace.detach_all([tracee for tracee in self.threads if tracee is not self._stays])
            if self._gone:  # or they, and so their process, would never be gone
                ptrace.reap(sorted(self._gone))


@contextmanager
def freeze(
    pid: int,
    timeout: float = STOP_TIMEOUT,
    earlier: Frozen | None = None,
    room: Room | None = None,
    scratch: int = 0,
    only: int = 0,
) -> Iterator[Frozen]:
    """Stops every thread of a process for the length of a `with` block, or the one of this tid.

    Afterwards, and on any exception, the scratch is unmapped, registers and masks are the threads'
    own again, and all run on (or stay stopped, if somebody had sent SIGSTOP).

    `earlier`: a freeze of the same process that is over; see `Frozen.registers`. `room`: of it,
    found while it ran (kernel/room.py), if that is known; `scratch`: an address at which nothing
    was mapped then.

    TargetError: no such process, a zombie, a kernel thread, traced already, or it ended meanwhile.
    DeniedError: no permission. LateError: a thread (named) did not stop within `timeout` seconds:
    once, and not within five seconds more, or twice.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        refusal.refused(pid, error.errno or errno.ESRCH)
    frozen = Frozen(pid, pidfd, earlier, room, scratch)
    ended = select.poll()
    ended.register(pidfd, select.POLLIN)
    held = signal.pthread_sigmask(signal.SIG_BLOCK, DEFERRED)
    # In no other thread anything of Python's is interrupted.
    interruptible = threading.current_thread() is threading.main_thread()
    hurry = ExitStack()
    try:
        reaper = hurry.enter_context(Reaper(pid))
        hurry.enter_context(urgent())
        try:
            if only:
                registers = frozen._stop_only(only, timeout, reaper)
            else:
                registers = frozen._stop(timeout, reaper)
        except (FileNotFoundError, ProcessLookupError):
            raise TargetError(f"process {pid} has ended", f"ps -p {pid}") from None
        if ended.poll(0):
            raise TargetError(f"process {pid} has ended", f"ps -p {pid}")
        frozen._registers = registers
        frozen._note_interrupted(registers)
        frozen.freeze_us = frozen._since_us()
        if interruptible:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        yield frozen
    finally:
        frozen._earlier = None  # no chain of them
        try:
            if interruptible:
                signal.pthread_sigmask(signal.SIG_BLOCK, DEFERRED)
        finally:  # whatever Ctrl-C did to the line above
            frozen.thaw()
            frozen.stopped_us = frozen._since_us()
            hurry.close()
            os.close(pidfd)
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
