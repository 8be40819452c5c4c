"""The bench: `snap` and its peers in turn on the same targets.

    python -m bench run [--quick] [--mib N]... [--rounds N] [CASE ...] [--out FILE.jsonl]
    python -m bench report FILE.jsonl
    python -m bench compare REV [--quick] [CASE ...]

What it starts it ends, also when it is ended by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated

import typer

from tests.harness import processes

from . import cases, compare, report
from .commands import Failed, installed, of_checkout
from .figures import Rows
from .machine import ROOT
from .session import OURS, Bench, Choice, session

OUT = Path("build/bench/run.jsonl")
app = typer.Typer(
    help="Measure snap and its peers in turn on the same targets. Needs root.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
CasesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CASE]...", help=f"Of {', '.join(cases.CASES)} (all)."),
]
QuickOption = Annotated[bool, typer.Option("--quick", help="Small and few: two minutes.")]
MibOption = Annotated[
    list[int] | None,
    typer.Option("--mib", metavar="N", min=1, help="This size and no other; may be repeated."),
]
RoundsOption = Annotated[
    int | None, typer.Option("--rounds", metavar="N", min=1, help="So many of everything.")
]
OutOption = Annotated[Path, typer.Option("--out", metavar="FILE", help="Lines of JSON.")]


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


@app.command("run", help="Measure: a line of JSON for each measurement, tables on stdout.")
def run_(
    case: CasesArgument = None,
    quick: QuickOption = False,
    mib: MibOption = None,
    rounds: RoundsOption = None,
    out: OutOption = OUT,
) -> None:
    choice = Choice(quick, mib or (), rounds)
    rows = measured(_names(case), choice, out, {OURS: installed()})
    for name in cases.CASES:
        if some := rows.where(case=name):
            print(f"\n## {name}\n\n{report.text_of(report.parts(name, some))}")
    print(f"\n{report.machine_text(rows)}")
    _complain(rows)


@app.command("report", help="Put tables and plots of a run into docs/benchmarks.md.")
def report_(file: Path) -> None:
    say(f"written: {', '.join(report.write(report.read(file)))}")


@app.command("compare", help="The snap of another revision beside this checkout's.")
def compare_(
    revision: Annotated[str, typer.Argument(metavar="REV")],
    case: CasesArgument = None,
    quick: QuickOption = False,
    mib: MibOption = None,
    rounds: RoundsOption = None,
    out: OutOption = OUT,
) -> None:
    names = _names(case)
    with compare.checkout(revision) as tree:
        other = f"snap@{revision}"
        # Both by the same way in: the installed script starts differently.
        snaps = {OURS: of_checkout(ROOT), other: of_checkout(tree)}
        rows_ = measured(names, Choice(quick, mib or (), rounds), out, snaps)
    print(compare.table(rows_, other).markdown())
    _complain(rows_)


def _complain(rows: Rows) -> None:
    if names := report.failures(rows):
        raise Failed(f"failed: {', '.join(names)}")


def _names(given: list[str] | None) -> list[str]:
    if unknown := [name for name in given or [] if name not in cases.CASES]:
        raise typer.BadParameter(f"no case {', '.join(unknown)}; try: python -m bench run --help")
    return given or list(cases.CASES)


def measured(names: list[str], choice: Choice, out: Path, snaps: dict[str, list[str]]) -> Rows:
    if os.geteuid() != 0:
        raise Failed("the bench needs root: sudo make bench")
    processes.become_subreaper()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with out.open("w") as lines, session(lines, snaps, choice, say) as bench:
            for name in names:
                run_case(bench, name)
                processes.kill_all(processes.descendants(os.getpid()))  # none, unless it failed
            return bench.rows
    finally:
        processes.kill_all(processes.descendants(os.getpid()))


def run_case(bench: Bench, name: str) -> None:
    """What fails in one of them says so in a row of its own, and the others go on."""
    began = time.monotonic()
    try:
        cases.CASES[name].run(bench)
    except Exception as error:
        traceback.print_exc()
        bench.failed(name, f"{type(error).__name__}: {error}")
    say(f"{name}: {time.monotonic() - began:.0f} s")


def main() -> None:
    try:
        app(prog_name="python -m bench")
    except Failed as error:
        say(str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
