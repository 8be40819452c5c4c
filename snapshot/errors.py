"""One class per kind of failure: a message with quantities, a hint to try next, an exit code.

The exit codes are the contract of docs/cli-contract.md. 0 is success and 2 is wrong usage (typer).
"""

from __future__ import annotations


class SnapError(Exception):
    """A failure that a user can understand. `hint` ends in a command to try, or is empty."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class TargetError(SnapError):
    """No such process, or one that has no memory to take: a kernel thread, a zombie."""

    exit_code = 3


class DeniedError(SnapError):
    """The kernel does not let this user do it."""

    exit_code = 4


class UnsupportedError(SnapError):
    """The target, the image or the kernel has things that cannot be handled; all are listed."""

    exit_code = 5

    def __init__(self, message: str, things: list[str], hint: str = "") -> None:
        super().__init__("\n  - ".join([message, *things]), hint)
        self.things = things


class StoreError(SnapError):
    """Not a store, not writable, no such image, no space left."""

    exit_code = 6


class DamagedError(SnapError):
    """Bytes of the store are not what was written. The message names image, process, address."""

    exit_code = 7


class TakeError(SnapError):
    """The image could not be made exact (memory lost, target gone); nothing was kept."""

    exit_code = 8


class RestoreError(SnapError):
    """The process could not be rebuilt (pid in use, a file that changed, …)."""

    exit_code = 9


class HookError(SnapError):
    """A hook failed before T0, or before the restored process ran."""

    exit_code = 10


class KernelError(SnapError):
    """A system call failed that should not have; names the call, its errno and its object."""

    exit_code = 11
