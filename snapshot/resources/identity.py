"""Session, process group, umask, working directory and root of a process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import RestoreError
from ..kernel.arch_x86_64 import NR
from ..kernel.errnames import error_name
from ..kernel.remote import Call
from ..manifest import Process
from ..maps import DELETED
from .context import Context, demand

if TYPE_CHECKING:
    from ..kernel.remote import Remote


def rebuild_group(process: Process, remote: Remote, ctx: Context) -> None:
    """A session or group leader becomes one again. Otherwise it stays in snap's session and group,
    as a program started by it would: the old ones belong to a shell that knows nothing of it."""
    if process.sid == process.pid:
        demand(remote, [("new session (setsid)", Call(NR.setsid))])
    elif process.pgid == process.pid:
        demand(remote, [("new process group (setpgid)", Call(NR.setpgid, (0, 0)))])


def rebuild_place(process: Process, remote: Remote, ctx: Context) -> None:
    """umask, working directory, root. A directory that is gone is a warning (it is then /), a root
    that cannot be set a RestoreError: the process would see files that were hidden from it."""
    cwd = process.cwd
    _, changed = remote.batch(
        [Call(NR.umask, (process.umask,)), Call(NR.chdir, (remote.put(cwd + b"\0"),))]
    )
    if changed < 0:
        why = "it was deleted" if cwd.endswith(DELETED) else error_name(changed)
        ctx.warnings.append(f"working directory {cwd.decode(errors='replace')}: {why}; now /")
        remote.call(NR.chdir, remote.put(b"/\0"))
    if process.root != b"/":
        (result,) = remote.batch([Call(NR.chroot, (remote.put(process.root + b"\0"),))])
        if result < 0:
            raise RestoreError(
                f"root directory {process.root.decode(errors='replace')}: {error_name(result)}",
                "sudo snap restore IMAGE",
            )
