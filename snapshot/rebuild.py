"""From an image to a stopped process that only has to be let go.

`snap` spawns a nearly empty process with the old pid, takes it with ptrace and rebuilds it through
system calls made inside it; resources/stages.py says what is put back when. With EXITKILL set it
dies with `snap` until it is let go: nothing half-built is ever left behind.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from msgspec import Struct, field

from . import address_space, fill, hugepages, objects
from .errors import DeniedError, RestoreError, SnapError, UnsupportedError
from .image import Image
from .kernel import arch_x86_64 as arch
from .kernel import procfs, ptrace, vdso
from .kernel import spawn as spawning
from .kernel.arch_x86_64 import NR, Registers
from .kernel.errnames import error_name
from .kernel.ptrace import Tracee
from .kernel.remote import Call, Remote
from .kernel.spawn import Spawned
from .manifest import Manifest, Mapping, Process, Thread
from .maps import HIGHEST, LOWEST
from .originals import Originals
from .ranges import Ranges
from .resources import descriptors, stages, threads
from .resources.context import demand

_CLONE_THREAD = 0x100 | 0x200 | 0x400 | 0x800 | 0x10000 | 0x40000 | 0x2000
"""VM, FS, FILES, SIGHAND, THREAD, SYSVSEM, PTRACE"""
_CLONE_ARGS = struct.Struct("<11Q")
_PR_SET_PDEATHSIG = 1
_AT_FDCWD = -100


class Context(Struct, eq=False):
    """What the modules of a restore share, and where they report."""

    manifest: Manifest
    image: Image
    stdio: Sequence[int] = (0, 1, 2)
    warnings: list[str] = field(default_factory=list)
    closed_connections: list[str] = field(default_factory=list)
    objects: dict[int, int] = field(default_factory=dict)  # SharedObject.id -> fd in snap


Memory = Callable[[Process, Remote, Context], None]


def fill_all(
    process: Process,
    remote: Remote,
    ctx: Context,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """All bytes now. `progress` is told how many."""
    everything = Ranges([(LOWEST, HIGHEST)])
    fill.fill(ctx.image, process, everything, remote.tracee, progress)


class Rebuilt:
    """A process that stands stopped, all in place but its registers. All calls from the thread
    that made it."""

    def __init__(
        self, process: Process, spawned: Spawned, tracees: dict[int, Tracee], remote: Remote
    ) -> None:
        self.process = process
        self.spawned = spawned
        self.tracees = tracees  # by Thread.tid
        self.remote = remote

    @property
    def pid(self) -> int:
        """As seen from here."""
        return self.spawned.pid

    @property
    def leader(self) -> Tracee:
        return self.tracees[self.process.threads[0].tid]

    def remotes(self) -> dict[int, Remote]:
        own = self.remote.tracee
        return {
            tid: self.remote if tracee is own else self.remote.on(tracee)
            for tid, tracee in self.tracees.items()
        }

    def finish(self, ctx: Context, *, parent_stays: bool) -> None:
        """The last stages: afterwards only `run` may follow."""
        stages.last(self.process, self.remotes(), ctx, parent_stays=parent_stays)
        self.remote.close()
        for address, data in threads.critical_sections(self.process):
            self.leader.write(address, data)
        for thread in self.process.threads:
            tracee = self.tracees[thread.tid]
            tracee.set_registers(final_registers(thread, tracee.read))
            _set_xstate(tracee, thread, ctx.manifest)
            tracee.set_signal_mask(thread.signal_mask)

    def run(self) -> None:
        """Lets every thread go. From here on nothing of ours is in the process."""
        ptrace.detach_all(list(self.tracees.values()))
        self.spawned.close()


@contextmanager
def rebuild(
    process: Process,
    ctx: Context,
    *,
    namespace: bool = False,
    memory: Memory = fill_all,
) -> Iterator[Rebuilt]:
    """The process of an image, stopped, until `Rebuilt.run`; if that has not come by the end of
    the block, it is killed and nothing of it is left.

    `memory` sees to it that the bytes come: called when all mappings are made and empty, and the
    descriptors placed. `namespace`: in a pid namespace of its own.
    Raises RestoreError and others of snapshot/errors.py.
    """
    check(ctx.manifest)
    hugepages.check(ctx.manifest, ctx.image)
    with ExitStack() as stack:
        originals = Originals(ctx.manifest, ctx.warnings)
        stack.callback(originals.close)
        ctx.objects.update(objects.open_all(ctx.manifest.objects, ctx.image, ctx.warnings))
        stack.callback(_close_all, ctx.objects)
        opened = descriptors.open_all(process, ctx)
        stack.callback(_close_all, opened)
        keep = {*originals.descriptors, *ctx.objects.values(), *opened.values()}
        spawned = spawning.spawn(process.pid, sorted(keep), namespace)
        stack.callback(_kill_unless_running, spawned)
        tracee = _take(spawned)
        remote = Remote(tracee, timeout=60.0)
        remote.open(address_space.free_place(process, tracee.tid, remote.scratch_size))
        remote.batch([Call(NR.prctl, (_PR_SET_PDEATHSIG, 0, 0, 0, 0))])
        stages.early(process, remote, ctx)
        _map(process, remote, ctx, originals)
        descriptors.place(process, opened, remote, ctx)
        _close_all(opened)
        memory(process, remote, ctx)
        address_space.protect(process, remote)
        address_space.lock(process, remote, ctx)
        tracees = _threads(process, spawned, remote)
        rebuilt = Rebuilt(process, spawned, tracees, remote)
        for thread in process.threads:
            stages.thread(process, thread, rebuilt.remotes()[thread.tid], ctx)
        _place(process, remote, ctx)
        yield rebuilt


def check(manifest: Manifest) -> None:
    """Refuses an image that cannot run on this machine."""
    machine, kernel = os.uname().machine, os.uname().release
    host = manifest.host
    things = []
    if host.machine != machine:
        things.append(f"it was taken on {host.machine}, this is {machine}")
    if host.vdso and host.vdso != vdso.digest():
        things.append(f"the vdso of Linux {kernel} is another than that of {host.kernel}")
    if things:
        hint = f"boot Linux {host.kernel}, then: snap restore {manifest.image}"
        raise UnsupportedError(f"image {manifest.image} cannot be restored here", things, hint)


def final_registers(thread: Thread, read: Callable[[int, int], bytes]) -> bytes:
    """The registers to go on with; `read` gives (address, length) of the memory of the process.

    The kernel restarts an interrupted system call by what they say (-512, -513, -514). -516 needs a
    restart block, which a new process does not have: that call is simply made again, and a relative
    time starts over. The same when the kernel had prepared the restart already (arch/x86/kernel/
    signal.c, arch_do_signal_or_restart) and the thread stood before restart_syscall(2), which
    would return EINTR.
    """
    registers = Registers.unpack(thread.registers)
    instruction = registers.rip
    if registers.result == arch.ERESTART_RESTARTBLOCK:
        instruction -= len(arch.SYSCALL_INSTRUCTION)
    elif registers.rax != NR.restart_syscall or not _is_syscall(instruction, read):
        return thread.registers
    number: int | None = arch.signed(registers.orig_rax)
    if number is None or number < 0 or number == NR.restart_syscall:
        end = instruction + len(arch.SYSCALL_INSTRUCTION)
        number = arch.call_number_before(arch.code_before(end, read))
    if number is None:
        return thread.registers  # EINTR, as after a signal
    again = registers._replace(rax=number, rip=instruction, orig_rax=arch.NO_SYSCALL)
    return again.pack()


def _is_syscall(address: int, read: Callable[[int, int], bytes]) -> bool:
    return arch.code_before(address + 2, read).endswith(arch.SYSCALL_INSTRUCTION)


def _take(spawned: Spawned) -> Tracee:
    tracee = ptrace.seize(spawned.pid, ptrace.EXITKILL)
    tracee.interrupt()
    tracee.halt()
    if tracee.rseq() is not None:  # or the kernel would write to it when its memory is gone
        raise RestoreError("the stub has an rseq registration", "snap check")
    return tracee


def _map(process: Process, remote: Remote, ctx: Context, originals: Originals) -> None:
    def descriptor(mapping: Mapping) -> int:
        if mapping.kind == "file":
            return originals.descriptor(mapping)
        assert mapping.object is not None
        return ctx.objects[mapping.object]

    address_space.clear(remote)
    address_space.put_vdso(process, remote)
    address_space.make(process.mappings, remote, descriptor)
    address_space.advise(process, remote, ctx)


def _threads(process: Process, spawned: Spawned, remote: Remote) -> dict[int, Tracee]:
    """All threads but the leader, stopped from their birth. -> by Thread.tid."""
    leader, *others = process.threads
    found = {leader.tid: remote.tracee}
    args_end = _CLONE_ARGS.size
    size = args_end + 8
    per_round = remote.data_size // size
    for first in range(0, len(others), per_round):
        steps = []
        data = bytearray()
        for i, thread in enumerate(others[first : first + per_round]):
            tid_at = remote.data + i * size + args_end
            data += _CLONE_ARGS.pack(_CLONE_THREAD, 0, 0, 0, 0, 0, 0, 0, tid_at, 1, 0)
            data += struct.pack("<q", thread.tid)
            call = Call(NR.clone3, (remote.data + i * size, args_end))
            steps.append((thread.tid, call))
        remote.put(bytes(data))
        results = remote.batch([call for _, call in steps])
        for (tid, call), result in zip(steps, results, strict=True):
            if result < 0:
                _again(tid, call, -result, remote, spawned)
    by_inner = procfs.inner_tids(spawned.pid)
    for thread in others:
        found[thread.tid] = ptrace.adopt(by_inner[thread.tid], remote.tracee.options)
    return found


def _again(tid: int, call: Call, error: int, remote: Remote, spawned: Spawned) -> None:
    """A thread that could not be made: makes it when its number becomes free, or raises."""
    if error == errno.EEXIST:
        for _ in spawning.attempts(tid) if not spawned.namespace else ():
            if remote.batch([call])[0] >= 0:
                return
        raise spawning.in_use(tid)
    name = error_name(error)
    if error == errno.EPERM:
        raise DeniedError(f"clone3(set_tid={tid}): {name}", "sudo snap check")
    raise RestoreError(f"thread {tid}: clone3: {name}", spawning.PID_NEW)


def _place(process: Process, remote: Remote, ctx: Context) -> None:
    """stages.placed with a descriptor of the executable, for /proc/PID/exe."""
    (fd,) = remote.batch(
        [Call(NR.openat, (_AT_FDCWD, remote.put(process.exe + b"\0"), os.O_RDONLY, 0))]
    )
    if fd < 0:
        ctx.warnings.append(f"/proc/PID/exe: {os.fsdecode(process.exe)}: {os.strerror(-fd)}")
    stages.placed(process, remote, ctx, exe_fd=fd)
    if fd >= 0:
        demand(remote, [("close", Call(NR.close, (fd,)))])


def _set_xstate(tracee: Tracee, thread: Thread, manifest: Manifest) -> None:
    try:
        tracee.set_xstate(thread.xstate)
    except SnapError as error:
        raise UnsupportedError(
            f"the CPU state of thread {thread.tid} does not fit this machine",
            [f"{len(thread.xstate)} bytes, features {manifest.host.xcr0:#x}", error.message],
            f"restore on the machine where {manifest.image} was taken",
        ) from None


def _kill_unless_running(spawned: Spawned) -> None:
    if spawned.pidfd >= 0:
        spawned.kill()


def _close_all(opened: dict[int, int]) -> None:
    for fd in opened.values():
        os.close(fd)
    opened.clear()
