"""The `snap` command: wiring only. Each command imports what it needs when it runs, so that
`snap --help` is quick; `door` is the one way from an error to an exit code.

Results (JSON with --json) go to stdout, everything that is for people's eyes to stderr.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from snapshot.errors import SnapError

if TYPE_CHECKING:
    from snapshot.hooks import Hooks
    from snapshot.store import Store

app = typer.Typer(
    help="Take a snapshot of a running Linux process, and bring the process back.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich costs more than all of `snap --help`
    pretty_exceptions_enable=False,
)

StoreOption = Annotated[
    Path | None,
    typer.Option(
        "--store", metavar="DIR", envvar="SNAP_STORE", help="The store of images (else the user's)."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
VerboseOption = Annotated[
    int,
    typer.Option("--verbose", "-v", count=True, show_default=False, help="Say more (-vv: all)."),
]
HookOption = Annotated[
    list[str] | None,
    typer.Option("--hook", metavar="STAGE=COMMAND", help="Run COMMAND at STAGE (repeatable)."),
]
StatsOption = Annotated[bool, typer.Option("--stats", help="Print what was measured.")]
ImageArgument = Annotated[str, typer.Argument(metavar="IMAGE", show_default=False)]


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: unwinds like Ctrl-C, so that a target is let go on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def door(command: Callable[..., int | None]) -> Callable[..., None]:
    """The one door from an error to an exit code. `command` returns its exit status (None: 0)."""

    @wraps(command)
    def guarded(*args: Any, **options: Any) -> NoReturn:
        verbose = int(options.get("verbose", 0))
        _log(verbose)
        try:
            with _termination():
                status = command(*args, **options) or 0
                sys.stdout.flush()
        except SnapError as error:
            status = _failed(error.message, error.hint, error.exit_code, options)
            if verbose:
                _traceback()
        except KeyboardInterrupt as interrupt:
            number = interrupt.number if isinstance(interrupt, Terminated) else signal.SIGINT
            status = _failed("interrupted", "", 128 + number, options)
        except BrokenPipeError:
            _discard_stdout()
            status = 128 + signal.SIGPIPE
        except typer.BadParameter:
            raise
        except Exception as error:
            hint = "" if verbose else "the same command with -v shows where"
            status = _failed(f"{type(error).__name__}: {error}", hint, 1, options)
            if verbose:
                _traceback()
        raise typer.Exit(status)

    return guarded


@app.command(help="Snapshot a running process.", epilog="Example: snap take 4711 --name before")
@door
def take(
    pid: Annotated[int, typer.Argument(metavar="PID", min=1)],
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Of the image (else made up).")
    ] = None,
    memory: Annotated[
        str, typer.Option("--memory", metavar="SIZE", help="Staging memory at most.")
    ] = "256M",
    attempts: Annotated[
        int, typer.Option("--attempts", metavar="N", min=1, help="Instants tried at most.")
    ] = 3,
    hook: HookOption = None,
    stats: StatsOption = False,
    store: StoreOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    from snapshot import describe, progress, store_path
    from snapshot.hooks import TAKE_STAGES
    from snapshot.take import take as run

    hooks = _hooks(hook, TAKE_STAGES)
    limit = size(memory)
    with progress.shown() as report:
        image = run(
            pid,
            store=store_path(store),
            name=name,
            memory=limit,
            hooks=hooks,
            progress=report,
            attempts=attempts,
        )
    with image:
        manifest = image.manifest
    _note(describe.summary(manifest) + _warnings(hooks.warnings))
    if stats:
        _note(describe.statistics_text(manifest.stats))
    if json:
        _json({**describe.taken(manifest), "warnings": [*manifest.warnings, *hooks.warnings]})
    else:
        print(manifest.image)


@app.command(help="Bring a process back.", epilog="Example: snap restore before --lazy --wait")
@door
def restore(
    image: ImageArgument,
    lazy: Annotated[
        bool, typer.Option("--lazy/--eager", help="Run before the memory is there, or after.")
    ] = False,
    pid: Annotated[
        str, typer.Option("--pid", metavar="keep|new", help="The same pids, or a pid namespace.")
    ] = "keep",
    wait: Annotated[
        bool, typer.Option("--wait", help="Until it ends; pass signals on, return its status.")
    ] = False,
    hook: HookOption = None,
    stats: StatsOption = False,
    store: StoreOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> int | None:
    from snapshot import describe, progress
    from snapshot.hooks import RESTORE_STAGES
    from snapshot.restore import restore as run

    if pid not in ("keep", "new"):
        raise typer.BadParameter(f"{pid!r} is neither keep nor new", param_hint="--pid")
    hooks = _hooks(hook, RESTORE_STAGES)
    with _store(store) as opened, opened.image(image) as source, progress.shown() as report:
        restored = run(source, lazy=lazy, pid=pid, hooks=hooks, progress=report)
    _note(describe.restored_text(restored) + _warnings(hooks.warnings))
    if json:
        _json({**describe.restored(restored), "warnings": [*restored.warnings, *hooks.warnings]})
    else:
        print(restored.pid, flush=True)
    return _wait(restored) if wait else None


@app.command("list", help="The images of the store.", epilog="Example: snap list")
@door
def list_(store: StoreOption = None, json: JsonOption = False, verbose: VerboseOption = 0) -> None:
    from snapshot import describe

    with _store(store) as opened:
        images = [describe.listed(one) for one in opened.images()]
    if json:
        _json(images)
    elif images:
        print(*describe.images_table(images), sep="\n")


@app.command(help="What is in an image.", epilog="Example: snap show before")
@door
def show(
    image: ImageArgument,
    store: StoreOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    from snapshot import describe

    with _store(store) as opened, opened.image(image) as source:
        manifest = source.manifest
    if json:
        _json(describe.shown(manifest))
    else:
        print(*describe.details(manifest), sep="\n")


@app.command(
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
    from snapshot.units import MIB

    start, count = _number(address), size(length)
    with _store(store) as opened, opened.image(image) as source:
        for offset in range(0, count, MIB):
            piece = source.read(start + offset, min(MIB, count - offset), pid=pid)
            sys.stdout.buffer.write(piece)


@app.command(help="Check every byte of images.", epilog="Example: snap verify before")
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
        _json({"images": results, "ok": not bad})
    else:
        for one in results:
            print(f"{one['image']}: " + ("damaged" if one["damaged"] else "good"))
            for line in one["damaged"]:
                print(f"  {line}")
    return DamagedError.exit_code if bad else None


@app.command(help="Remove images.", epilog="Example: snap rm before")
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
        _json({"removed": images})


@app.command(help="Free what no image needs.", epilog="Example: snap gc")
@door
def gc(store: StoreOption = None, json: JsonOption = False, verbose: VerboseOption = 0) -> None:
    from snapshot.units import mib

    with _store(store) as opened:
        freed = opened.collect()
    if json:
        _json({"freed_bytes": freed})
    else:
        print(f"freed {mib(freed)}")


@app.command(
    help="What this kernel, this user and a target allow.", epilog="Example: snap check 4711"
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
        _json(checks.as_json(items, pid))
    else:
        print(*checks.as_text(items), sep="\n")
    return checks.exit_code(items)


def size(given: str) -> int:
    """Bytes of `4096`, `0x1000`, `64K`, `256M`, `1.5G`, `256 MiB`; a usage error otherwise."""
    number = given.strip().upper().removesuffix("IB").removesuffix("B").strip()
    factor = 1
    if not number.startswith("0X") and number[-1:] in ("K", "M", "G", "T"):
        factor = 1024 ** ("KMGT".index(number[-1]) + 1)
        number = number[:-1].strip()
    try:
        value = int(float(number) * factor) if "." in number else int(number, 0) * factor
    except (ValueError, OverflowError):
        value = -1
    if value < 0:
        raise typer.BadParameter(f"{given!r} is not a size like 4096, 64K or 1.5G")
    return value


def _number(given: str) -> int:
    """An address: `0x7ffd5000`, or as in /proc/PID/maps without 0x when it has a hex letter."""
    for base in (0, 16):
        with suppress(ValueError):
            if (value := int(given, base)) >= 0:
                return value
    raise typer.BadParameter(f"{given!r} is not an address like 0x7ffd5000")


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


def _wait(restored: Any) -> int:
    """Its exit status, 128+n for a signal; signals that reach `snap` meanwhile are passed on."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(restored.pid, number)

    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), pass_on)
    status = int(restored.wait())
    return 128 - status if status < 0 else status


@contextmanager
def _termination() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Terminated; a SIGHUP that is ignored (nohup) stays ignored."""

    def unwind(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    before = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, unwind)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _log(verbose: int) -> None:
    import logging

    level = {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG)
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)


def _warnings(warnings: list[str]) -> list[str]:
    return [f"warning: {warning}" for warning in warnings]


def _note(lines: list[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr)


def _json(value: Any) -> None:
    import msgspec

    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
    sys.stdout.buffer.flush()


def _failed(message: str, hint: str, code: int, options: dict[str, Any]) -> int:
    _note([f"snap: {message}"] + ([f"hint: {hint}"] if hint else []))
    if options.get("json"):
        with suppress(BrokenPipeError):
            _json({"error": message, "hint": hint, "exit_code": code})
    return code


def _traceback() -> None:
    import traceback

    traceback.print_exc()


def _discard_stdout() -> None:
    """The reader of stdout is gone: keep the interpreter from saying so once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


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
        Path | None, typer.Option("--store", metavar="DIR", help="The same as after a command.")
    ] = None,
) -> None:
    """Take a snapshot of a running Linux process, and bring the process back."""
    if store is not None:
        os.environ["SNAP_STORE"] = str(store)  # for hooks and the page server too


def main() -> None:
    app(prog_name="snap")


if __name__ == "__main__":
    main()
