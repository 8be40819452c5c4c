"""userfaultfd(2): one class, one method per ioctl, named as the kernel names them.

Addresses are those of the process in which the userfaultfd was created, whoever calls; ranges are
(start, length) in bytes, page aligned. Source of facts: ioctl_userfaultfd(2), fs/userfaultfd.c.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import DeniedError, KernelError, UnsupportedError
from ._native import ffi, lib
from .closing import Closing
from .errnames import error_text

MESSAGE_BYTES = 32
"""sizeof(struct uffd_msg)"""

FEATURES: dict[str, int] = {
    name: int(getattr(lib, f"UFFD_FEATURE_{name}"))
    for name in (
        "PAGEFAULT_FLAG_WP",
        "EVENT_FORK",
        "EVENT_REMAP",
        "EVENT_REMOVE",
        "MISSING_HUGETLBFS",
        "MISSING_SHMEM",
        "EVENT_UNMAP",
        "SIGBUS",
        "THREAD_ID",
        "MINOR_HUGETLBFS",
        "MINOR_SHMEM",
        "EXACT_ADDRESS",
        "WP_HUGETLBFS_SHMEM",
        "WP_UNPOPULATED",
        "POISON",
        "WP_ASYNC",
        "MOVE",
    )
}
"""The kernel's features by name: FEATURES["EVENT_FORK"] is UFFD_FEATURE_EVENT_FORK."""

MISSING = int(lib.UFFDIO_REGISTER_MODE_MISSING)
WP = int(lib.UFFDIO_REGISTER_MODE_WP)
MINOR = int(lib.UFFDIO_REGISTER_MODE_MINOR)
DONTWAKE = int(lib.UFFDIO_COPY_MODE_DONTWAKE)
COPY_WP = int(lib.UFFDIO_COPY_MODE_WP)


class UffdError(KernelError):
    """A userfaultfd ioctl failed. `errno` is positive."""

    def __init__(self, call: str, error: int, what: str = "", hint: str = "") -> None:
        super().__init__(f"{call}{what}: {error_text(error)}", hint)
        self.errno = error


class Partial(NamedTuple):
    """What a copy or zeropage did. `done` bytes are in place even when `errno` is not 0."""

    done: int
    errno: int


class Filled(NamedTuple):
    """What `Uffd.fill` did, in pages. `wanted` has a bit for each page still to be done."""

    errno: int
    wanted: int
    copied: int
    zeroed: int
    present: int
    gone: int


def _filled(error: int, filled: Any) -> Filled:
    """What a function of C returned and wrote into a uffd_filled."""
    return Filled(
        -error, filled.wanted, filled.copied, filled.zeroed, filled.present, filled.gone
    )


def messages_at(memory: Any, offset: int, most: int) -> Any:
    """uffd_message[most] at `offset` of a writable buffer; ValueError when they do not fit."""
    if offset + most * MESSAGE_BYTES > len(memory):
        raise ValueError("messages would not fit into the buffer")
    address = ffi.cast("char *", ffi.from_buffer(memory, require_writable=True)) + offset
    return ffi.cast("uffd_message *", address)


def names(features: int) -> list[str]:
    """The names of feature bits; unknown ones as hex."""
    known = [name for name, bit in FEATURES.items() if features & bit]
    unknown = features & ~sum(FEATURES.values())
    return known + ([hex(unknown)] if unknown else [])


def available() -> int:
    """The features that this kernel knows. UnsupportedError without userfaultfd at all."""
    with Uffd.open() as probe:
        return probe.api(0)


class Uffd(Closing):
    """A userfaultfd: `fd` is ours to close."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def open(cls, flags: int = os.O_CLOEXEC | os.O_NONBLOCK) -> Uffd:
        """One of this process, through the system call or /dev/userfaultfd. No handshake yet."""
        fd = lib.uffd_open(flags)
        if fd == -errno.ENOSYS:
            raise UnsupportedError("the kernel has no userfaultfd", ["CONFIG_USERFAULTFD"])
        if fd in (-errno.EPERM, -errno.EACCES):
            raise DeniedError("userfaultfd(2) is not permitted", "sudo snap check")
        if fd < 0:
            raise UffdError("userfaultfd", -fd)
        return cls(fd)

    def fileno(self) -> int:
        return self.fd

    def close(self) -> None:
        """The last close of a userfaultfd releases everything and wakes all who wait: those who
        waited for a missing page then read zeros."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def api(self, features: int) -> int:
        """The handshake, once in the life of a userfaultfd. -> all features of the kernel.

        UnsupportedError names the wanted features that the kernel lacks.
        """
        wanted = ffi.new("uint64_t *", features)
        error = lib.uffd_api(self.fd, wanted, ffi.NULL)
        if error == 0:
            return int(wanted[0])
        if error == -errno.EPERM:
            raise DeniedError("userfaultfd EVENT_FORK needs CAP_SYS_PTRACE", "sudo snap check")
        missing = features & ~available() if error == -errno.EINVAL and features else 0
        if missing:
            raise UnsupportedError(
                "userfaultfd lacks features that are needed", names(missing), "snap check"
            )
        raise UffdError("UFFDIO_API", -error, f" {names(features)}")

    def register(self, start: int, length: int, mode: int) -> int:
        """-> bitmap of the ioctls that the range allows. EBUSY: another userfaultfd owns it."""
        ioctls = ffi.new("uint64_t *")
        self._check("UFFDIO_REGISTER", start, length, lib.uffd_register, mode, ioctls)
        return int(ioctls[0])

    def unregister(self, start: int, length: int) -> None:
        self._check("UFFDIO_UNREGISTER", start, length, lib.uffd_unregister)

    def writeprotect(self, start: int, length: int, on: bool, dontwake: bool = False) -> None:
        """UffdError with errno EAGAIN: an event must be read first, then call again."""
        mode = lib.UFFDIO_WRITEPROTECT_MODE_WP if on else 0
        if dontwake:
            mode |= lib.UFFDIO_WRITEPROTECT_MODE_DONTWAKE
        self._check("UFFDIO_WRITEPROTECT", start, length, lib.uffd_writeprotect, mode)

    def wake(self, start: int, length: int) -> None:
        """Wakes those who wait in the range; who still misses a page faults again."""
        self._check("UFFDIO_WAKE", start, length, lib.uffd_wake)

    def copy(self, dst: int, src: Any, length: int, mode: int = 0) -> Partial:
        """Puts `length` bytes of `src` (a buffer of this process) in place of missing pages."""
        done = ffi.new("int64_t *")
        error = lib.uffd_copy(self.fd, dst, ffi.from_buffer(src), length, mode, done)
        return Partial(int(done[0]), -error)

    def zeropage(self, start: int, length: int, mode: int = 0) -> Partial:
        done = ffi.new("int64_t *")
        error = lib.uffd_zeropage(self.fd, start, length, mode, done)
        return Partial(int(done[0]), -error)

    def fill(self, dst: int, src: Any, wanted: int, present: int) -> Filled:
        """Up to 16 pages at `dst`: those of the bitmap `wanted`, from `src` (64 KiB, the page of
        bit i at i * 4096) where `present` has the bit, zeros elsewhere.

        Pages that are there already and pages that are no longer mapped count as done. errno is
        0, EAGAIN (read an event, then call again with `Filled.wanted`), ESRCH (the process is
        gone) or something unexpected.
        """
        filled = ffi.new("uffd_filled *")
        error = lib.uffd_fill(self.fd, dst, ffi.from_buffer(src), wanted, present, filled)
        return _filled(error, filled)

    def fill_run(
        self, dst: int, src: Any, wanted: Sequence[int], present: Sequence[int], least: int
    ) -> tuple[int, Filled]:
        """The same for as many chunks of 64 KiB, one behind the other, as there are bitmaps; when
        `least` are done, until a message is there to be read. -> chunks that are done, and all of
        them summed up."""
        filled, done = ffi.new("uffd_filled *"), ffi.new("uint32_t *")
        count = len(wanted)
        bits = ffi.new("uint16_t[]", [*wanted, *present])
        error = lib.uffd_fill_run(
            self.fd, dst, ffi.from_buffer(src), count, least, bits, bits + count, done, filled
        )
        return int(done[0]), _filled(error, filled)

    def read_msgs(self, most: int = 64) -> bytes:
        """Up to `most` messages of 32 bytes (see snapshot/events.py); b"" when there is none."""
        messages = ffi.new("uffd_message[]", most)
        count = lib.uffd_read_msgs(self.fd, messages, most)
        if count < 0:
            raise UffdError("read(userfaultfd)", -count)
        return bytes(ffi.buffer(messages, count * MESSAGE_BYTES))

    def read_into(self, memory: Any, offset: int, most: int) -> int:
        """The same, straight into a writable buffer at `offset`; -> how many messages. The kernel
        has written all of them there even if this process is killed meanwhile."""
        count = lib.uffd_read_msgs(self.fd, messages_at(memory, offset, most), most)
        if count < 0:
            raise UffdError("read(userfaultfd)", -count)
        return int(count)

    def held_by(self, pid: int, number: int) -> bool:
        """Whether descriptor `number` of process `pid` is this very userfaultfd."""
        return bool(lib.uffd_is(self.fd, pid, number) == 1)

    def poll(self, timeout_ms: int) -> bool:
        """True when a message can be read, False after `timeout_ms` (-1: no limit)."""
        ready = lib.uffd_poll(self.fd, timeout_ms)
        if ready < 0 and ready != -errno.EINTR:
            raise UffdError("poll(userfaultfd)", -ready)
        return bool(ready > 0)

    def poll_us(self, timeout_us: int) -> bool:
        """The same, for less than a millisecond."""
        ready = lib.uffd_poll_us(self.fd, timeout_us)
        if ready < 0 and ready != -errno.EINTR:
            raise UffdError("ppoll(userfaultfd)", -ready)
        return bool(ready > 0)

    def _check(self, name: str, start: int, length: int, call: Any, *more: Any) -> None:
        error = call(self.fd, start, length, *more)
        if error:
            raise UffdError(name, -error, f" [{start:#x}, {start + length:#x})")
