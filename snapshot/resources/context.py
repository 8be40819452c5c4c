"""What a resource module needs to know of the restore it is part of, and how it reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from ..errors import RestoreError
from ..kernel.errnames import error_name

if TYPE_CHECKING:
    from ..kernel.remote import Call, Remote


class Context(Protocol):
    """The part of rebuild.Context that is used here."""

    warnings: list[str]


def attempt(remote: Remote, ctx: Context, steps: Sequence[tuple[str, Call]]) -> list[int]:
    """Make calls that the kernel may refuse; each refusal is a warning that says what is lost."""
    results = remote.batch([call for _, call in steps]) if steps else []
    for (what, _), result in zip(steps, results, strict=True):
        if result < 0:
            ctx.warnings.append(f"{what}: not restored ({error_name(result)})")
    return results


def demand(remote: Remote, steps: Sequence[tuple[str, Call]]) -> list[int]:
    """Make calls without which the process would be wrong. RestoreError names the first refusal."""
    results = remote.batch([call for _, call in steps]) if steps else []
    for (what, call), result in zip(steps, results, strict=True):
        if result < 0:
            raise RestoreError(
                f"{what}: {error_name(result)} (system call {call.nr})", "snap check"
            )
    return results
