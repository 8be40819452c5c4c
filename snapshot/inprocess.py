"""A take of the calling process itself, made by a helper process.

A handler in the process that is snapshotted would wait for itself: a thread blocked in a write
fault may hold the interpreter lock that the handler needs. So `take(os.getpid())` starts a helper
(`python -m snapshot.inprocess`), lets it trace the caller, and sleeps in waitpid(2), without a
descriptor to the helper and without any lock but its own, until the image is committed.

T0 lies in the middle of that sleep. So the call returns twice, as fork() does: in the process that
went on, and in every process that is restored from the image. `restored(image)` tells which.

Of the caller's hooks `before-freeze`, `committed` and `failed` run here; `frozen` and `resumed`
cannot, as the process that would run them is the one that stands still. Hooks of installed
programs all run in the helper. No progress is reported.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from . import errors, open_image, store_path
from .errors import SnapError, TakeError
from .hooks import TAKE_STAGES, HookMapping, Hooks, check_stage
from .kernel import procfs, yama

if TYPE_CHECKING:
    from .image import Image

HERE = ("before-freeze", "committed", "failed")
"""The stages at which the caller's own hooks can run."""


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """What the helper is to do, on its standard input."""

    pid: int
    store: str
    name: str
    memory: int
    now: bool
    guard: Literal["auto", "always", "never"]
    writers: Literal["auto", "wait", "pass"]
    pace: str | None


class Reply(msgspec.Struct, forbid_unknown_fields=True):
    """How it went: `error` is the name of a class of snapshot/errors.py, or empty."""

    error: str = ""
    message: str = ""
    hint: str = ""
    things: list[str] = []


def take_self(
    *,
    name: str | None,
    store: str | os.PathLike[str] | None,
    memory: int,
    now: bool,
    guard: Literal["auto", "always", "never"],
    writers: Literal["auto", "wait", "pass"],
    pace: str | None,
    hooks: HookMapping | None,
) -> Image:
    """The image of the calling process; `snapshot.take` calls this for the own pid."""
    for stage in hooks or {}:
        if check_stage(stage, TAKE_STAGES) not in HERE:
            raise ValueError(
                f"{stage!r} cannot run in the process that is taken; here: {', '.join(HERE)}"
            )
    from .take import default_name

    pid, before = os.getpid(), _identity()
    # A restored process must know the name too, so it is chosen here and not by the helper.
    joined = Hooks(hooks, installed=False)
    where = str(store_path(store).absolute())
    request = Request(pid, where, name or default_name(pid), memory, now, guard, writers, pace)
    try:
        joined.run("before-freeze", pid=pid, image=request.name)
        reply = _ask(request)
        if _identity() != before:  # this is a restored process: what the helper said is long gone
            return open_image(request.name, store=request.store)
        if reply.error:
            raise _error(reply)
        image = open_image(request.name, store=request.store)
    except BaseException as error:
        joined.run("failed", pid=pid, image=request.name, error=str(error))
        raise
    joined.run("committed", pid=pid, image=request.name)
    return image


def restored(image: Image) -> bool:
    """After `image = take(os.getpid())`: False in the process that was taken, True in one that was
    restored from the image."""
    manifest = image.manifest
    return (manifest.host.boot_id, manifest.processes[0].start_ticks) != _identity()


def _identity() -> tuple[str, int]:
    """Of this process: the boot and its start. /proc/self, for in a pid namespace of its own
    (`--pid new`) its pid is not its name in /proc."""
    with open("/proc/self/stat", "rb") as file:
        return procfs.boot_id(), procfs.parse_stat(file.read()).start_ticks


def _ask(request: Request) -> Reply:
    """Runs the helper to its end, and sleeps meanwhile."""
    if not sys.executable:
        raise TakeError(
            "no Python interpreter to run the helper process with (sys.executable is not set)",
            f"snap take {request.pid}",
        )
    folder = Path(tempfile.mkdtemp(prefix="snap-"))
    reply, log = folder / "reply", folder / "log"
    helper = None
    try:
        with log.open("wb") as output:
            helper = subprocess.Popen(
                [sys.executable, "-P", "-m", "snapshot.inprocess", str(reply)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # Ctrl-C is for the caller, who then ends the helper
            )
        yama.allow_tracer(helper.pid)
        # The helper starts when its input ends; then nothing leads from here to it any more.
        helper.communicate(msgspec.json.encode(request))
        return _reply(reply, log)
    finally:
        _end(helper)
        yama.allow_tracer(0)
        for leftover in (reply, log):
            leftover.unlink(missing_ok=True)
        if folder.exists():
            folder.rmdir()


def _reply(path: Path, log: Path) -> Reply:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Reply)
    except (OSError, msgspec.MsgspecError):
        said = log.read_text(errors="replace").strip() if log.exists() else ""
        last = said.rpartition("\n")[2] or "without a word"
        return Reply("TakeError", f"the helper process ended: {last}", f"snap take {os.getpid()}")


def _end(helper: subprocess.Popen[bytes] | None) -> None:
    """After an interruption: the helper lets go of this process and leaves no image."""
    if helper is not None and helper.returncode is None:
        helper.terminate()
        helper.wait()


def _error(reply: Reply) -> SnapError:
    kind = getattr(errors, reply.error, TakeError)
    error: SnapError = kind.__new__(kind)
    SnapError.__init__(error, reply.message, reply.hint)
    if isinstance(error, errors.UnsupportedError):
        error.things = reply.things
    return error


# --- the helper -----------------------------------------------------------------------------------


def _help(request: Request) -> Reply:
    from . import pace as paces
    from .take import take

    try:
        take(
            request.pid,
            store=Path(request.store),
            name=request.name,
            memory=request.memory,
            now=request.now,
            guard=request.guard,
            writers=request.writers,
            pace=paces.parse(request.pace),
            hooks=Hooks(),
        ).close()
    except SnapError as error:
        known = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
        things: list[str] = getattr(error, "things", [])
        return Reply(known.__name__, error.message, error.hint, things)
    return Reply()


def _main(path: Path) -> None:
    def unwind(number: int, frame: FrameType | None) -> Any:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, unwind)
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    path.write_bytes(msgspec.json.encode(_help(request)))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
