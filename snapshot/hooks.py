"""Stages of take and restore at which other programs can join.

Three kinds of hook, run in this order: programs installed in the environment (entry points of the
group `snapshot.hooks`), Python callables of the library's caller, shell commands of `--hook`.

A hook that fails at a stage before T0 (before a restored process runs) raises HookError and ends
the take (the restore); at later stages nothing can be taken back, so it becomes a warning.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from shlex import quote
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field

from .errors import HookError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

TAKE_STAGES = ("before-freeze", "frozen", "resumed", "committed", "failed")
RESTORE_STAGES = ("before-restore", "rebuilt", "running", "complete")
STAGES = TAKE_STAGES + RESTORE_STAGES
FATAL = frozenset({"before-freeze", "frozen", "before-restore", "rebuilt"})
"""Stages at which a failing hook ends the take or restore."""
GROUP = "snapshot.hooks"
FROZEN_LIMIT = 10.0
"""Seconds that a command may take at `frozen`, while every thread of the target stands still."""


class HookContext(Struct, frozen=True):
    """What a hook is told. `pid` is the target's, or the restored process's once it exists (0
    before); `image` is the image's name; `extra` what the stage adds, e.g. `error` at `failed`."""

    stage: str
    pid: int
    image: str
    extra: Mapping[str, Any] = field(default_factory=dict)


Hook = Callable[[HookContext], object]
HookMapping = Mapping[str, Hook | Sequence[Hook]]


class _Entry(Struct, frozen=True):
    label: str
    stages: frozenset[str]
    call: Hook
    hint: str = ""


class Hooks:
    """All hooks of one take or restore.

    `callables` maps a stage to a callable, or several; `commands` are pairs (stage, shell
    command); `installed=False` leaves the entry points out. Everything is looked up and loaded
    here, so that nothing is imported while a target stands still.

    Raises ValueError for an unknown stage, HookError for an installed hook that does not load.
    """

    def __init__(
        self,
        callables: HookMapping | None = None,
        commands: Iterable[tuple[str, str]] = (),
        *,
        installed: bool = True,
        frozen_limit: float = FROZEN_LIMIT,
    ) -> None:
        self.warnings: list[str] = []
        self._entries: list[_Entry] = []
        if installed:
            for entry in _installed():
                self._entries += _load(entry)
        for stage, given in (callables or {}).items():
            self._entries += _of(stage, given)
        for stage, command in commands:
            check_stage(stage)
            call = _Command(command, frozen_limit)
            label, hint = f"{stage}={command}", f"SNAP_PID=PID sh -c {quote(command)}"
            self._entries.append(_Entry(label, frozenset({stage}), call, hint))

    def wants(self, stage: str) -> bool:
        """Whether any hook would run at `stage`."""
        return any(check_stage(stage) in entry.stages for entry in self._entries)

    def run(self, stage: str, *, pid: int, image: str, **extra: Any) -> None:
        """Run every hook of `stage`, in order, in the calling thread.

        Raises HookError at a FATAL stage (the hooks after the failing one do not run); elsewhere
        all run, and what fails is logged and added to `warnings`.
        """
        context = HookContext(check_stage(stage), pid, image, extra)
        for entry in self._entries:
            if stage not in entry.stages:
                continue
            try:
                entry.call(context)
            except Exception as error:
                message = f"hook {entry.label} failed: {_reason(error)}"
                if stage in FATAL:
                    raise HookError(message, entry.hint) from error
                self.warnings.append(message)
                logging.getLogger("snap").warning("%d: %s", pid, message)


def check_stage(stage: str, among: Sequence[str] = STAGES) -> str:
    """`stage`, or ValueError with the stages that there are."""
    if stage in among:
        return stage
    if stage in STAGES:
        other = "take" if stage in TAKE_STAGES else "restore"
        raise ValueError(f"{stage!r} is a stage of {other}; here: {', '.join(among)}")
    raise ValueError(f"no stage {stage!r}; stages: {', '.join(among)}")


def parse(spec: str, among: Sequence[str] = STAGES) -> tuple[str, str]:
    """`STAGE=COMMAND` to (stage, command); ValueError when it is not that."""
    stage, equals, command = spec.partition("=")
    if not equals or not command.strip():
        raise ValueError(f"{spec!r} is not STAGE=COMMAND; stages: {', '.join(among)}")
    return check_stage(stage.strip(), among), command


def _of(stage: str, given: Hook | Sequence[Hook], owner: str = "", hint: str = "") -> list[_Entry]:
    hooks = [given] if callable(given) else list(given)
    only = frozenset({check_stage(stage)})
    return [_Entry(f"{owner}{_name(hook)} at {stage}", only, hook, hint) for hook in hooks]


def _installed() -> Iterable[EntryPoint]:
    """The entry points of the group. importlib.metadata takes longer to import than a restore to
    rebuild a process, so it is only asked where anybody may have some."""
    if not any(map(_may_have_hooks, sys.path)):
        return ()
    from importlib.metadata import entry_points

    return entry_points(group=GROUP)


def _may_have_hooks(place: str) -> bool:
    """Whether an installed program in a directory of sys.path names the group. What is no directory
    (a zip file) may always."""
    try:
        names = os.listdir(place or ".")
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return any(map(partial(_names_group, place), names))


def _names_group(place: str, name: str) -> bool:
    if name.endswith(".egg"):
        return True
    if not name.endswith((".dist-info", ".egg-info")):
        return False
    try:
        with open(os.path.join(place, name, "entry_points.txt"), "rb") as file:
            return GROUP.encode() in file.read()
    except (FileNotFoundError, NotADirectoryError):
        return False


def _load(entry: EntryPoint) -> list[_Entry]:
    """An entry point is a mapping of stages to callables, or one callable for every stage."""
    label = f"{entry.name} ({entry.value})"
    distribution = entry.dist.name if entry.dist else entry.module
    hint = f"pip install -U {distribution}, or: pip uninstall {distribution}"
    try:
        loaded = entry.load()
        if isinstance(loaded, Mapping):
            return [
                one
                for stage, given in loaded.items()
                for one in _of(stage, given, f"{label} ", hint)
            ]
        if not callable(loaded):
            raise TypeError("neither callable nor a mapping of stages to callables")
    except Exception as error:
        raise HookError(f"installed hook {label} does not load: {error}", hint) from error
    return [_Entry(label, frozenset(STAGES), loaded, hint)]


def _name(hook: Hook) -> str:
    return getattr(hook, "__qualname__", None) or repr(hook)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


class _Failed(Exception):
    """A command hook that ended badly or took too long."""


class _Command:
    """A shell command with SNAP_PID, SNAP_IMAGE and SNAP_STAGE in its environment (SNAP_ERROR at
    `failed`). Reads nothing; what it prints goes to stderr, as stdout is for results."""

    def __init__(self, command: str, frozen_limit: float) -> None:
        self.command = command
        self.frozen_limit = frozen_limit

    def __call__(self, context: HookContext) -> None:
        limit = self.frozen_limit if context.stage == "frozen" else None
        environment = {
            **os.environ,
            "SNAP_PID": str(context.pid),
            "SNAP_IMAGE": context.image,
            "SNAP_STAGE": context.stage,
        }
        if "error" in context.extra:
            environment["SNAP_ERROR"] = str(context.extra["error"])
        # A take has it blocked (ptrace.child_signals).
        blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        try:
            # A session of its own: all that the shell started can be ended together.
            process = subprocess.Popen(
                ["/bin/sh", "-c", self.command],
                stdin=subprocess.DEVNULL,
                stdout=2,
                env=environment,
                start_new_session=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        try:
            status = process.wait(limit)
        except BaseException as error:
            # Ctrl-C may come when the shell has just been reaped; that is no other failure.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                waited = f"not done after {limit:g} s, with the target stopped"
                raise _Failed(f"{waited}; it was ended") from None
            raise
        if status < 0:
            raise _Failed(f"ended by {signal.Signals(-status).name}")
        if status:
            raise _Failed(f"exit status {status}")
