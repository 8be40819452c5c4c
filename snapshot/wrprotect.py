"""The userfaultfd of a target: made inside it, held outside it, gone from it at once.

A userfaultfd belongs to the address space in which it was created, so the target creates it, by
injected calls; `pidfd_getfd` brings a duplicate here and the target closes its own. From then on
only this process holds it: its last close, also by SIGKILL, ends all protection and wakes all
writers, which is what makes a dying `snap` harmless (fs/userfaultfd.c, userfaultfd_release).
"""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress

from . import faults
from .errors import DeniedError, KernelError
from .freeze import Frozen
from .kernel import pidfd
from .kernel._native import ffi, lib
from .kernel.arch_x86_64 import NR
from .kernel.closing import Closing
from .kernel.errnames import error_name
from .kernel.remote import Call
from .kernel.uffd import FEATURES, WP, Uffd, UffdError
from .resources.threads import PR_GET_TID_ADDRESS
from .units import PAGE

NEEDED = ("PAGEFAULT_FLAG_WP", "EVENT_REMAP", "EVENT_REMOVE", "EVENT_UNMAP", "WP_HUGETLBFS_SHMEM")
"""EVENT_FORK only where shared memory is armed, which a child could write to unseen. Without it a
child drops the userfaultfd and runs free, its parent stays armed, and a fork costs nothing."""
DEVICE = "/dev/userfaultfd"
USERFAULTFD_IOC_NEW = 0xAA00  # _IO(0xAA, 0), include/uapi/linux/userfaultfd.h
FLAGS = os.O_CLOEXEC | os.O_NONBLOCK
MAKING = Call(NR.userfaultfd, (FLAGS,))
SOCKET_FLAGS = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC


class WriteProtection(Closing):
    """A target's userfaultfd, handshake done. `close` (or the end of the process) ends it."""

    def __init__(
        self,
        uffd: Uffd,
        *,
        forks: bool,
        empties: bool = False,
        clear_child_tid: int = 0,
        passes: bool = False,
    ) -> None:
        self.uffd = uffd
        self.passes = passes
        """Whether writers wait for nobody, and nothing tells of them (WP_ASYNC)."""
        self.clear_child_tid = clear_child_tid
        """Where the kernel writes when a thread ends, if that is one place for all threads; 0: it
        is beside the robust list of each (native/spare.c)."""
        self.forks = forks
        """Whether it tells of children (EVENT_FORK)."""
        self.empties = empties
        """Whether protecting covers empty pages, so that every first write is told of."""

    @classmethod
    def create(
        cls,
        frozen: Frozen,
        *,
        forks: bool = False,
        passes: bool = False,
        empties: bool = False,
        fetched: int | None = None,
    ) -> WriteProtection:
        """Inject the creation into the stopped target; nothing of it stays there. `forks`: it shall
        tell of children, if that is allowed (CAP_SYS_PTRACE). `passes`: writers shall wait for
        nobody. `empties`: protecting shall cover empty pages. Both take `shows_empty_pages`.
        `fetched`: what has come of MAKING, if that has been tried (`Frozen.make`).

        Raises DeniedError when neither userfaultfd(2) nor /dev/userfaultfd is allowed,
        UnsupportedError when the kernel lacks one of NEEDED.
        """
        made = _make(frozen, MAKING) if fetched is None else fetched
        if made in (-errno.EPERM, -errno.ENOSYS):
            # A target without CAP_SYS_PTRACE may not, whoever injects it; through the device it
            # may, when the device was opened by somebody who was allowed to.
            made = _through_device(frozen)
        if made < 0:
            raise KernelError(
                f"userfaultfd in process {frozen.pid}: {error_name(made)}",
                f"snap check {frozen.pid}",
            )
        uffd = Uffd(made)
        try:
            forks = _handshake(uffd, forks, empties, passes)
            told = passes or lib.snap_pump_has_robust_list(frozen.pid)
            clear = 0 if told else _clear_child_tid(frozen)
        except BaseException:
            uffd.close()
            raise
        return cls(uffd, forks=forks, empties=empties, clear_child_tid=clear, passes=passes)

    def register(self, runs: Iterable[tuple[int, int]]) -> bool:
        """While the target runs: all that is mapped in these [start, end), which end where nothing
        of it can grow, so that no mapping is split. What is mapped later is not. False: something
        is there that cannot be."""
        try:
            for start, end in runs:
                self.uffd.register(start, end - start, WP)
        except UffdError:
            return False
        return True

    def registered(self, pagemap: int, addresses: Iterable[int]) -> bool:
        """Whether at each address something is mapped, and registered so that its writers wait for
        nobody. `pagemap`: a descriptor of that file of the target's."""
        first = ffi.new("uint64_t *")
        wanted = lib.SNAP_PAGE_WPALLOWED
        return all(
            lib.snap_pagemap_first(pagemap, at, at + PAGE, 0, wanted, 0, first) == 1
            for at in addresses
        )

    def close(self) -> None:
        self.uffd.close()


def shows_empty_pages() -> bool:
    """Whether pagemap shows which pages are empty (CAP_SYS_ADMIN). Without that writers that were
    let through cannot be found."""
    return bool(lib.snap_pagemap_tells())


def _handshake(uffd: Uffd, forks: bool, empties: bool, passes: bool) -> bool:
    """-> whether it tells of forks."""
    needed = sum(FEATURES[name] for name in NEEDED)
    needed |= FEATURES["WP_UNPOPULATED"] if empties else 0
    needed |= FEATURES["WP_ASYNC"] if passes else 0  # Linux 6.7, like PAGEMAP_SCAN
    if forks:
        with suppress(DeniedError):
            uffd.api(needed | FEATURES["EVENT_FORK"])
            return True
    uffd.api(needed)
    return False


def _clear_child_tid(frozen: Frozen) -> int:
    """That of a thread; 0: it has none, or the kernel does not tell (CONFIG_CHECKPOINT_RESTORE)."""
    remote = frozen.remote
    remote.put(bytes(8))
    remote.batch([Call(NR.prctl, (PR_GET_TID_ADDRESS, remote.data))])
    return int.from_bytes(remote.get(remote.data, 8), "little")


def _make(frozen: Frozen, call: Call) -> int:
    """A duplicate here of the descriptor that a call inside the target makes, or -errno; the
    target's own is closed, come what may."""
    with frozen.remote.making(call) as made:
        if made < 0:
            return made
        faults.point("made")
        fetched = pidfd.getfd(frozen.pidfd, made)
        faults.point("fetched")
        return fetched


def _through_device(frozen: Frozen) -> int:
    """A userfaultfd of the target's, made from /dev/userfaultfd, or -errno.

    The device is opened here and handed to the target over a socketpair of its own; these three
    descriptors are closed with the scratch.
    """
    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise DeniedError(
            f"process {frozen.pid} may not use userfaultfd, and {DEVICE}: {error.strerror}",
            f"sudo setfacl -m u:{os.geteuid()}:rw {DEVICE}",
        ) from None
    remote = frozen.remote
    mine = -1
    try:
        owed = remote.owe()
        remote.call(NR.socketpair, socket.AF_UNIX, SOCKET_FLAGS, 0, owed)
        theirs = struct.unpack("2i", remote.get(owed, 8))
        faults.point("paired")
        mine = pidfd.getfd(frozen.pidfd, theirs[0])
        with socket.socket(fileno=os.dup(mine)) as sender:
            rights = array.array("i", [device])
            sender.sendmsg([b"u"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        received = _receive(frozen, theirs[1], owed + 8)
        if received < 0:
            return received
        faults.point("passed")
        return _make(frozen, Call(NR.ioctl, (received, USERFAULTFD_IOC_NEW, FLAGS)))
    finally:
        if mine >= 0:
            os.close(mine)
        os.close(device)


def _receive(frozen: Frozen, fd: int, control: int) -> int:
    """recvmsg inside the target → the descriptor that came, or -errno. `control`: 20 bytes for
    struct cmsghdr and the descriptor."""
    remote = frozen.remote
    base = remote.data
    # struct msghdr at 0, struct iovec at 64, the byte at 80.
    header = struct.pack("QI4xQQQQi4x", 0, 0, base + 64, 1, control, 24, 0)
    remote.put(header.ljust(64, b"\0") + struct.pack("QQ", base + 80, 1))
    received = remote.batch([Call(NR.recvmsg, (fd, base, socket.MSG_CMSG_CLOEXEC))])[0]
    if received < 0:
        return received
    length, level, kind, descriptor = struct.unpack("Qiii", remote.get(control, 20))
    if length != 20 or (level, kind) != (socket.SOL_SOCKET, socket.SCM_RIGHTS):
        return -errno.EPROTO
    return int(descriptor)
