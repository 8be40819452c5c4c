"""The one door from an error to an exit code, and what goes through it to stdout and stderr.

Results (JSON with --json) go to stdout, everything that is for people's eyes to stderr. The codes
are the table of docs/cli-contract.md.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from types import FrameType
from typing import Any, NoReturn

import typer

from .errors import SnapError


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


@contextmanager
def _termination() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Terminated; a SIGHUP that is ignored (nohup) stays ignored. Ctrl-Z
    does nothing: a target might have to wait until somebody says `fg`. By a handler, which a
    program that is started from here does not inherit."""

    def unwind(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    before: dict[signal.Signals, Any] = {}
    before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, lambda *_: None)
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


def note(lines: list[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr)


def put_json(value: Any) -> None:
    import msgspec

    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
    sys.stdout.buffer.flush()


def _failed(message: str, hint: str, code: int, options: dict[str, Any]) -> int:
    note([f"snap: {message}"] + ([f"hint: {hint}"] if hint else []))
    if options.get("json"):
        with suppress(BrokenPipeError):
            put_json({"error": message, "hint": hint, "exit_code": code})
    return code


def _traceback() -> None:
    import traceback

    traceback.print_exc()


def _discard_stdout() -> None:
    """The reader of stdout is gone: keep the interpreter from saying so once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
