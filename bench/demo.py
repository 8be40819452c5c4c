"""`make demo`: a busy redis-server is snapshotted, killed with SIGKILL, and lives again.

    bench/demo.py [--mib N] [--clients N] [--python]

Without redis-server (or with --python) the bundled Python program takes its place. Everything that
is started here is ended here, and the store is removed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a file, Python looks for modules beside it alone

from bench.commands import Failed, Ran, Snap  # noqa: E402
from tests.harness import ledger, processes, redis, victims  # noqa: E402
from tests.harness.ledger import Ledger, Report  # noqa: E402
from tests.harness.victims import PyApp  # noqa: E402

MIB = 1 << 20
console = Console(highlight=False, soft_wrap=True)


class Shown(Snap):
    """The command, with what was typed."""

    def __call__(self, *arguments: object) -> Ran:
        console.print(f"\n[bold]$ snap {' '.join(map(str, arguments))}[/bold]")
        return super().__call__(*arguments)


def place(stack: ExitStack) -> Path:
    """A directory for the store and the program's files, as long as `stack`."""
    made = tempfile.TemporaryDirectory(prefix="snap-demo-", ignore_cleanup_errors=True)
    return Path(stack.enter_context(made))


def say(text: str) -> None:
    console.print(f"  {text}")


def size(count: int) -> str:
    return f"{count / MIB:,.1f} MiB"


def demo_redis(mib: int, clients: int) -> Table:
    with ExitStack() as stack:
        directory = place(stack)
        snap = Shown(directory / "store")
        server = redis.Redis(directory)
        stack.callback(server.kill)
        stack.callback(snap.end)
        console.print(f"[bold]redis-server {server.pid}[/bold]")
        keys = server.fill(mib)
        say(f"{keys:,} keys, {mib} MiB of values; now {clients} clients write without pause")
        load = Ledger(server.socket_path, clients)
        stack.callback(load.kill)
        load.works(20 * clients)
        quiet = _second_of(load)
        load.ask("mark")
        taken = snap("take", str(server.pid), "--name", "demo").answer
        say(f"the server went on serving: it stood still for {taken['pause_us'] / 1000:.2f} ms")
        load.works(20 * clients)
        busy = load.stop()
        if busy.errors:
            raise Failed(f"the clients saw errors: {busy.first_error}")
        console.print(f"\n[bold]$ kill -9 {server.pid}[/bold]")
        server.kill()
        started = time.perf_counter()
        back = snap("restore", "demo", "--lazy").answer
        with server.client() as client:
            client("GET", "key:0")
            first = time.perf_counter() - started
            say(f"process {back['pid']} answers again")
            found = ledger.read(client, clients)
        broken = [text for counts in found if (text := ledger.problems(counts))]
        wrong = server.wrong_values()
        again = Ledger(server.socket_path, clients)
        stack.callback(again.kill)
        again.works(100 * clients)
        after = again.stop()
        with server.client() as client:
            saved = client("SAVE") == "OK"
        table = _table(taken, back, first)
        _latencies(table, quiet, busy)
        good = not broken and not wrong and not after.errors and saved
        table.add_row("ledgers: a ≥ b ≥ c ≥ a-1", f"{clients - len(broken)} of {clients} hold")
        table.add_row("values of T0", f"{keys - len(wrong):,} of {keys:,} right")
        table.add_row(
            "new writes after the restore", f"{after.operations:,}, {after.errors} errors"
        )
        table.add_row("SAVE by the restored server", "works" if saved else "failed")
        if not good:
            console.print(table)
            raise Failed(f"{broken[:3]} {wrong[:3]} {after.first_error}")
        return table


def _second_of(load: Ledger) -> Report:
    """What the clients see without a snapshot, for about a second."""
    load.ask("mark")
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        time.sleep(0.05)
    return load.ask("stat")


def _latencies(table: Table, quiet: Report, busy: Report) -> None:
    def of(report: Report) -> str:
        rate = report.marked_operations / report.seconds
        return (
            f"p50 {report.p50_ms:.2f}  p99 {report.p99_ms:.2f}  max {report.max_ms:.1f} ms, "
            f"{rate:,.0f}/s"
        )

    table.add_row("clients before", of(quiet))
    table.add_row("clients during the take", of(busy))


def demo_python(mib: int) -> Table:
    with ExitStack() as stack:
        directory = place(stack)
        snap = Shown(directory / "store")
        app: PyApp = victims.python_app(directory, mib=mib)
        stack.callback(app.kill)
        stack.callback(snap.end)
        console.print(f"[bold]a Python server {app.pid}[/bold]")
        say(f"threads, sqlite3 in memory, an asyncio server, {mib} MiB of data")
        app.goes_on()
        at_take = app.ask()["progress"]["bank"]
        taken = snap("take", str(app.pid), "--name", "demo").answer
        say(f"it went on serving: it stood still for {taken['pause_us'] / 1000:.2f} ms")
        app.goes_on()
        console.print(f"\n[bold]$ kill -9 {app.pid}[/bold]")
        app.kill()
        started = time.perf_counter()
        back = snap("restore", "demo", "--lazy").answer
        answer = app.ask()
        first = time.perf_counter() - started
        app.became(back["pid"])
        say(f"process {back['pid']} answers again")
        app.verify()
        app.goes_on()
        table = _table(taken, back, first)
        table.add_row(
            "transfers in sqlite3",
            f"{at_take:,} at the take, {answer['progress']['bank']:,} when asked again",
        )
        table.add_row("its own checks", "the sums, the log, every byte of its data: right")
        return table


def _table(taken: dict[str, Any], back: dict[str, Any], first: float) -> Table:
    table = Table(show_header=False, title="\nwhat happened", title_justify="left")
    ratio = taken["stored_bytes"] / max(taken["saved_bytes"], 1)
    table.add_row("the target stood still", f"{taken['pause_us'] / 1000:.2f} ms")
    table.add_row("the whole take", f"{taken['seconds']:.2f} s beside the running process")
    table.add_row(
        "memory saved",
        f"{size(taken['saved_bytes'])}, stored in {size(taken['stored_bytes'])} ({ratio:.0%})",
    )
    table.add_row("first writes that waited", f"{taken['faults']:,}")
    table.add_row("restored, it ran after", f"{back['ready_us'] / 1000:.1f} ms")
    table.add_row("first reply after", f"{first * 1000:.0f} ms (the command's own start included)")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/demo.py")
    parser.add_argument("--mib", type=int, default=256, help="of data (default: 256)")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--python", action="store_true", help="the Python program, not redis")
    options = parser.parse_args()
    if os.geteuid() != 0:
        console.print("make demo needs root (ptrace, the same pids): sudo make demo")
        return 4
    processes.become_subreaper()
    try:
        if redis.SERVER and not options.python:
            table = demo_redis(options.mib, options.clients)
        else:
            if not options.python:
                console.print("no redis-server here (apt-get install redis-server):")
            table = demo_python(min(options.mib, 64))
    except (Failed, AssertionError, OSError, redis.RedisError) as error:
        console.print(f"\n[red]the demo failed:[/red] {error}", markup=True)
        return 1
    finally:
        processes.kill_all(processes.descendants(os.getpid()))
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
