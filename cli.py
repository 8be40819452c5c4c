"""The `snap` command: wiring only. Each command imports what it needs when it runs, so that
`snap --help` is quick; snapshot/door.py is the one way from an error to an exit code.
"""

# ruff: noqa: E402
from __future__ import annotations

from gc import disable, enable, freeze

disable()  # what is imported stays: to look through it for what goes takes some 5 ms

import os
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup
from typer.main import get_command_from_info

from snapshot.door import door, note, put_json

if TYPE_CHECKING:
    from snapshot.hooks import Hooks
    from snapshot.store import Store

T = TypeVar("T")
commands = typer.Typer()
"""What `snap` can do, for `_OneByOne`."""


class _OneByOne(TyperGroup):
    """Builds a command when it is asked for: all of them take longer than what most of them do."""

    def list_commands(self, ctx: Any) -> list[str]:
        self._build(None)
        return super().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # of whichever click typer brings
        self._build(cmd_name)
        return super().get_command(ctx, cmd_name)

    def _build(self, wanted: str | None) -> None:
        """One; all if there is none of this name, for the hint at those that are like it."""
        known = {one.name: one for one in commands.registered_commands}
        for name in [wanted] if wanted in known else known:
            if name and name not in self.commands:
                self.commands[name] = get_command_from_info(
                    known[name], pretty_exceptions_short=True, rich_markup_mode=None
                )


app = typer.Typer(
    cls=_OneByOne,
    help="Take a snapshot of a running Linux process, and bring the process back.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich costs more than all of `snap --help`
    pretty_exceptions_enable=False,
)

StoreOption = Annotated[
    Path | None,
    typer.Option(
        "--store",
        metavar="DIR",
        envvar="SNAP_STORE",
        help="The store of images (else the user's).",
        readable=False,  # a store that may not be read is a failure (6), not wrong usage (2)
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
VerboseOption = Annotated[
    int,
    typer.Option("--verbose", "-v", count=True, show_default=False, help="Say more (-vv: all)."),
]
TakeHooks = Annotated[
    list[str] | None,
    typer.Option(
        "--hook",
        metavar="STAGE=COMMAND",
        help="Repeatable. before-freeze, frozen, resumed, committed, failed.",
    ),
]
RestoreHooks = Annotated[
    list[str] | None,
    typer.Option(
        "--hook",
        metavar="STAGE=COMMAND",
        help="Repeatable. before-restore, rebuilt, running, complete.",
    ),
]
StatsOption = Annotated[bool, typer.Option("--stats", help="Print what was measured.")]


class Pids(StrEnum):
    """How a restored process gets its pids."""

    keep = "keep"
    new = "new"


class Guards(StrEnum):
    """Whether memory that is not saved when T0 comes can be lost."""

    auto = "auto"
    always = "always"
    never = "never"


class Writers(StrEnum):
    """What a first write ahead of T0 does."""

    auto = "auto"
    wait = "wait"
    pass_ = "pass"


ImageArgument = Annotated[str, typer.Argument(metavar="IMAGE", show_default=False)]


@commands.command(
    "take",
    help="Snapshot a running process.",
    epilog="Example: snap take 4711 --name before",
)
@door
def take(
    pid: Annotated[int, typer.Argument(metavar="PID", min=1)],
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Of the image (else made up).")
    ] = None,
    memory: Annotated[
        str, typer.Option("--memory", metavar="SIZE", help="Staging memory at most.")
    ] = "192M",
    now: Annotated[
        bool, typer.Option("--now", help="T0 at once, not when most has been copied.")
    ] = False,
    guard: Annotated[
        Guards,
        typer.Option(
            "--guard",
            metavar="auto|always|never",
            help="Copy what is left while it stands still: when memory was lost, always, never.",
        ),
    ] = Guards.auto,
    writers: Annotated[
        Writers,
        typer.Option(
            "--writers",
            metavar="auto|wait|pass",
            help="A first write waits for its page, or for nobody (what is left is copied then).",
        ),
    ] = Writers.auto,
    stall: Annotated[
        float,
        typer.Option(
            "--stall", metavar="SECONDS", min=1.0, help="Let go when nothing moves for so long."
        ),
    ] = 10.0,
    pace: Annotated[
        str | None,
        typer.Option(
            "--pace", metavar="RATE", help="Of copying: bytes a second, or % of a processor."
        ),
    ] = None,
    attempts: Annotated[
        int, typer.Option("--attempts", metavar="N", min=1, help="Instants tried at most.")
    ] = 3,
    hook: TakeHooks = None,
    stats: StatsOption = False,
    store: StoreOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    from snapshot import arguments, describe, progress, store_path
    from snapshot import pace as paces
    from snapshot.hooks import TAKE_STAGES
    from snapshot.take import take as run

    hooks = _hooks(hook, TAKE_STAGES)
    limit = _parsed(arguments.size, memory, "--memory")
    speed = paces.ANY if pace is None else _parsed(paces.parse, pace, "--pace")
    if now and writers is Writers.pass_:
        raise typer.BadParameter("with --now everything has to wait", param_hint="--writers")
    with progress.shown() as report:
        image = run(
            pid,
            store=store_path(store),
            name=name,
            memory=limit,
            hooks=hooks,
            progress=report,
            now=now,
            guard=guard.value,
            writers=writers.value,
            stall=stall,
            pace=speed,
            attempts=attempts,
        )
    with image:
        manifest = image.manifest
    note(describe.summary(manifest))
    if stats:
        note(describe.statistics_text(manifest.stats))
    if json:
        put_json({**describe.taken(manifest), "warnings": [*manifest.warnings, *hooks.warnings]})
    else:
        print(manifest.image)


@commands.command(
    "restore",
    help="Bring a process back.",
    epilog="Example: snap restore before --lazy --wait",
)
@door
def restore(
    image: ImageArgument,
    lazy: Annotated[
        bool, typer.Option("--lazy/--eager", help="Run before the memory is there, or after.")
    ] = False,
    pid: Annotated[
        Pids, typer.Option("--pid", metavar="keep|new", help="The same pids, or a pid namespace.")
    ] = Pids.keep,
    working_set: Annotated[
        bool,
        typer.Option(
            "--working-set/--no-working-set",
            help="With --lazy: first what was touched first the last time.",
        ),
    ] = True,
    wait: Annotated[
        bool, typer.Option("--wait", help="Until it ends; pass signals on, return its status.")
    ] = False,
    hook: RestoreHooks = None,
    store: StoreOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> int | None:
    from snapshot import progress
    from snapshot.hooks import RESTORE_STAGES
    from snapshot.restore import restore as run

    hooks = _hooks(hook, RESTORE_STAGES)
    with _store(store) as opened, opened.image(image) as source, progress.shown() as report:
        restored = run(
            source,
            lazy=lazy,
            pid=pid.value,
            hooks=hooks,
            progress=report,
            parent_stays=wait,
            alone=True,
            working_set=working_set,
        )
    from snapshot import describe, foreground  # not before it runs

    note(describe.restored_text(restored))
    if json:
        put_json({**describe.restored(restored), "warnings": [*restored.warnings, *hooks.warnings]})
    else:
        print(restored.pid, flush=True)
    return foreground.wait(restored) if wait else None


@commands.command("list", help="The images of the store.", epilog="Example: snap list")
@door
def list_(store: StoreOption = None, json: JsonOption = False, verbose: VerboseOption = 0) -> None:
    from snapshot import describe

    with _store(store) as opened:
        images = [describe.listed(one) for one in opened.images()]
    if json:
        put_json(images)
    elif images:
        print(*describe.images_table(images), sep="\n")


@commands.command("show", help="What is in an image.", epilog="Example: snap show before")
@door
def show(
    image: ImageArgument,
    store: StoreOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    from snapshot import describe

    with _store(store) as opened, opened.image(image) as source:
        held = describe.held_by(source)
        if json:
            put_json(describe.shown(source.manifest, held))
        else:
            print(*describe.details(source.manifest, held), sep="\n")


@commands.command(
    "read",
    help="Bytes of the memory at T0, to stdout.",
    epilog="Example: snap read before 0x7ffd5000 4K | xxd",
)
@door
def read(
    image: ImageArgument,
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="0x… or decimal.")],
    length: Annotated[str, typer.Argument(metavar="LENGTH", help="Bytes, or like 64K, 1M.")],
    pid: Annotated[
        int | None, typer.Option("--pid", metavar="PID", help="Which process of several.")
    ] = None,
    store: StoreOption = None,
    verbose: VerboseOption = 0,
) -> None:
    from snapshot import arguments
    from snapshot.units import MIB

    start = _parsed(arguments.address, address, "ADDRESS")
    count = _parsed(arguments.size, length, "LENGTH")
    with _store(store) as opened, opened.image(image) as source:
        for offset in range(0, count, MIB):
            piece = source.read(start + offset, min(MIB, count - offset), pid=pid)
            sys.stdout.buffer.write(piece)


@commands.command(
    "verify",
    help="Check every byte of images.",
    epilog="Example: snap verify before",
)
@door
def verify(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", show_default=False)],
    store: StoreOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> int | None:
    from snapshot.errors import DamagedError

    results = []
    with _store(store) as opened:
        for name in images:
            try:
                with opened.image(name) as image:
                    damage = [str(one) for one in image.verify()]
            except DamagedError as error:
                damage = [error.message]
            results.append({"image": name, "damaged": damage})
    bad = [one for one in results if one["damaged"]]
    if json:
        put_json({"images": results, "ok": not bad})
    else:
        for one in results:
            print(f"{one['image']}: " + ("damaged" if one["damaged"] else "good"))
            for line in one["damaged"]:
                print(f"  {line}")
    return DamagedError.exit_code if bad else None


@commands.command("rm", help="Remove images.", epilog="Example: snap rm before")
@door
def rm(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", show_default=False)],
    store: StoreOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    with _store(store) as opened:
        for name in images:
            opened.remove(name)
    if json:
        put_json({"removed": images})


@commands.command("gc", help="Free what no image needs.", epilog="Example: snap gc")
@door
def gc(store: StoreOption = None, json: JsonOption = False, verbose: VerboseOption = 0) -> None:
    from snapshot.units import mib

    with _store(store) as opened:
        freed = opened.collect()
    if json:
        put_json({"freed_bytes": freed})
    else:
        print(f"freed {mib(freed)}")


@commands.command(
    "check",
    help="What this kernel, this user and a target allow.",
    epilog="Example: snap check 4711",
)
@door
def check(
    pid: Annotated[int | None, typer.Argument(metavar="[PID]", min=1, show_default=False)] = None,
    store: StoreOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> int | None:
    from snapshot import checks, store_path

    items = checks.run(pid, store_path(store))
    if json:
        put_json(checks.as_json(items, pid))
    else:
        print(*checks.as_text(items), sep="\n")
    return checks.exit_code(items)


def _parsed(parse: Callable[[str], T], given: str, option: str) -> T:
    try:
        return parse(given)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def _hooks(specs: list[str] | None, stages: tuple[str, ...]) -> Hooks:
    from snapshot.hooks import Hooks, parse

    try:
        commands = [parse(spec, stages) for spec in specs or []]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--hook") from None
    return Hooks(commands=commands)


def _store(given: Path | None) -> Store:
    from snapshot import store_path
    from snapshot.store import Store

    return Store.open(store_path(given))


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"snap {version('livesnap')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
    store: Annotated[
        Path | None,
        typer.Option("--store", metavar="DIR", readable=False, help="The same as after a command."),
    ] = None,
) -> None:
    """Take a snapshot of a running Linux process, and bring the process back."""
    if store is not None:
        os.environ["SNAP_STORE"] = str(store)  # for hooks and the page server too


def main() -> None:
    """What has been imported stays until the end, and at the end everything goes: the collector
    would look through all of it again and again, a seventh of what a short command takes."""
    freeze()
    enable()
    try:
        app(prog_name="snap")
    finally:
        freeze()


if __name__ == "__main__":
    main()
