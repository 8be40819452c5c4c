"""The bench: `snap` and its peers in turn on the same targets.

    python -m bench run [--quick] [CASE ...] [--out FILE.jsonl]
    python -m bench report FILE.jsonl
    python -m bench compare REV [--quick] [CASE ...]

`run` writes a line of JSON for each single measurement and shows tables; `report` puts tables and
plots into docs/benchmarks.md; `compare` runs the `snap` of another revision beside this one's.
Needs root. What it starts it ends, also when it is ended by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from tests.harness import processes

from . import cases, compare, report
from .commands import Failed, installed, of_checkout
from .figures import Rows
from .machine import ROOT
from .session import OURS, session

OUT = ROOT / "build" / "bench" / "run.jsonl"


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def run(names: list[str], quick: bool, out: Path, snaps: dict[str, list[str]]) -> Rows:
    out.parent.mkdir(parents=True, exist_ok=True)
    before = frozenset(processes.descendants(os.getpid()))
    try:
        with out.open("w") as lines, session(lines, quick, say, snaps) as bench:
            for name in names:
                cases.CASES[name].run(bench)
            return bench.rows
    finally:
        left = [pid for pid in processes.descendants(os.getpid()) if pid not in before]
        processes.kill_all(left)


def show(rows: Rows) -> None:
    for name, case in cases.CASES.items():
        if some := rows.where(case=name):
            print(f"\n## {name}\n\n{report.text_of(case.report(some))}")
    print(f"\n{report.machine_text(rows)}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    known = ", ".join(cases.CASES)
    one = commands.add_parser("run", help="measure")
    two = commands.add_parser("report", help="tables and plots into docs/benchmarks.md")
    three = commands.add_parser("compare", help="two revisions of snap, in turn")
    two.add_argument("file", type=Path)
    three.add_argument("revision")
    for some in (one, three):
        some.add_argument("case", nargs="*", help=f"of {known} (all)")
        some.add_argument("--quick", action="store_true", help="small and few")
        some.add_argument("--out", type=Path, default=OUT, metavar="FILE", help=f"({OUT})")
    return parser.parse_args()


def main() -> int:
    options = parsed()
    if options.command == "report":
        say(f"written: {', '.join(report.write(report.read(options.file)))}")
        return 0
    if os.geteuid() != 0:
        say("the bench needs root: sudo make bench")
        return 4
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    processes.become_subreaper()
    try:
        names = compare.names(options.case, list(cases.CASES))
        if options.command == "run":
            show(run(names, options.quick, options.out, {OURS: installed()}))
            return 0
        with compare.checkout(options.revision) as tree:
            other = f"snap@{options.revision}"
            # Both by the same way in: the installed script starts differently.
            snaps = {OURS: of_checkout(ROOT), other: of_checkout(tree)}
            rows = run(names, options.quick, options.out, snaps)
        print(compare.table(rows, other).markdown())
    except (Failed, ValueError) as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
