"""The command as others see it: a process with arguments, two streams and an exit code."""

from __future__ import annotations

import json
import os
import pty
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import typer

from snapshot import arguments, pace
from snapshot.door import door
from snapshot.manifest import Descriptor, OpenFile, TakeStats
from snapshot.store import Store
from snapshot.units import CHUNK

from .images import BASE, manifest, process, raw

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("take", "restore", "list", "show", "read", "verify", "rm", "gc", "check")
CONTENT = bytes(range(256)) * (CHUNK // 256)


def snap(
    *arguments: object, environment: Mapping[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, ROOT / "cli.py", *map(str, arguments)],
        capture_output="stdout" not in options,
        timeout=60,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        **options,
    )


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with one image, named "first"."""
    path = tmp_path / "store"
    target = process()
    files = (OpenFile(id=0, kind="sockets", label="tcp 10.0.0.1:80 → 10.0.0.2:5", closed=True),)
    descriptors = (Descriptor(fd=5, file=0, cloexec=True),)
    values = {name: getattr(target, name) for name in target.__struct_fields__}
    target = type(target)(**{**values, "files": files, "descriptors": descriptors})
    stats = TakeStats(threads=1, pause_us=870, saved_bytes=CHUNK, stages_us={"freeze": 40})
    with Store.open(path, create=True) as opened, opened.begin("first") as writer:
        writer.put([raw(CONTENT)])
        writer.commit(manifest("first", target, stats=stats))
    return path


def test_help_is_quick_and_lists_the_commands() -> None:
    """Less than 0.3 s. Processor time is what is measured: it does not depend on the neighbours."""
    result = snap("--help")  # bytecode is cached from here on
    assert result.returncode == 0
    for command in COMMANDS:
        assert f"  {command} " in result.stdout.decode()
    spent = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        snap("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.3


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys, cli\n"
        "try: cli.app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'rich', 'lmdb', 'msgspec', 'zstandard', 'blake3', 'snapshot.kernel._native'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or None)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr.decode()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = snap(command, "--help")
    assert result.returncode == 0
    text = result.stdout.decode()
    assert f"Example: snap {command}" in text
    assert "--store" in text


def test_version() -> None:
    assert snap("--version").stdout.startswith(b"snap ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("frobnicate",), "frobnicate"),
        (("take",), "PID"),
        (("take", "x"), "PID"),
        (("take", "0"), "PID"),
        (("take", "1", "--hook", "frosen=true"), "before-freeze, frozen, resumed"),
        (("take", "1", "--hook", "frozen"), "STAGE=COMMAND"),
        (("take", "1", "--memory", "much"), "size"),
        (("take", "1", "--pace", "fast"), "pace"),
        (("take", "1", "--pace", "0"), "pace"),
        (("read", "latest", "q", "1"), "address"),
        (("read", "latest", "0", "-1"), ""),
    ],
)
def test_wrong_usage_is_2(arguments: tuple[str, ...], said: str, store: Path) -> None:
    result = snap(*arguments, "--store", store)
    assert result.returncode == 2
    assert result.stdout == b""
    assert said in result.stderr.decode()


def test_list(store: Path) -> None:
    (one,) = json.loads(snap("list", "--store", store, "--json").stdout)
    assert one["image"] == "first"
    assert set(one) >= {"image", "pid", "comm", "taken_at", "saved_bytes", "stored_bytes"}
    assert b"first" in snap("list", "--store", store).stdout


def test_store_by_environment_and_before_the_command(store: Path) -> None:
    assert b"first" in snap("list", environment={"SNAP_STORE": str(store)}).stdout
    assert b"first" in snap("--store", store, "list").stdout


def test_show(store: Path) -> None:
    shown = json.loads(snap("show", "first", "--store", store, "--json").stdout)
    (target,) = shown["processes"]
    assert (target["pid"], target["comm"]) == (100, "cat")
    assert target["threads"] == [{"tid": 100, "comm": "cat"}]
    assert target["mappings"][0]["start"] == BASE
    assert target["mappings"][0]["permissions"] == "rw-p"
    assert target["descriptors"][0]["fd"] == 5
    assert shown["closed_connections"] == ["tcp 10.0.0.1:80 → 10.0.0.2:5"]
    assert shown["stats"]["pause_us"] == 870
    text = snap("show", "first", "--store", store).stdout.decode()
    for part in (f"{BASE:012x}", "870 µs", "freeze 40 µs", "comes back closed"):
        assert part in text


def test_read(store: Path) -> None:
    result = snap("read", "first", hex(BASE + 16), "4K", "--store", store)
    assert result.returncode == 0
    assert result.stdout == CONTENT[16 : 16 + 4096]
    assert snap("read", "first", "0x1000", 8, "--store", store).returncode == 6


def test_verify_rm_gc(store: Path) -> None:
    good = snap("verify", "first", "--store", store, "--json")
    assert json.loads(good.stdout) == {"images": [{"image": "first", "damaged": []}], "ok": True}
    assert good.returncode == 0
    removed = snap("rm", "first", "--store", store, "--json")
    assert json.loads(removed.stdout) == {"removed": ["first"]}
    freed = json.loads(snap("gc", "--store", store, "--json").stdout)
    assert freed["freed_bytes"] > 0
    assert json.loads(snap("list", "--store", store, "--json").stdout) == []


def test_verify_names_what_is_damaged(store: Path) -> None:
    data = store / "data.mdb"
    content = bytearray(data.read_bytes())
    at = content.index(CONTENT[:64]) if CONTENT[:64] in content else content.index(b"\x28\xb5\x2f")
    content[at + 8] ^= 1
    data.write_bytes(content)
    result = snap("verify", "first", "--store", store, "--json")
    assert result.returncode == 7
    answer = json.loads(result.stdout)
    assert not answer["ok"]
    assert f"{BASE:#x}" in answer["images"][0]["damaged"][0]
    assert snap("read", "first", hex(BASE), 16, "--store", store).returncode == 7


@pytest.mark.parametrize("command", ["show", "verify", "rm"])
def test_unknown_image_is_6_with_a_hint(command: str, store: Path) -> None:
    result = snap(command, "nosuch", "--store", store)
    assert result.returncode == 6
    assert result.stdout == b""
    first, hint, *_ = result.stderr.decode().splitlines()
    assert first.startswith("snap: ")
    assert "nosuch" in first
    assert hint.startswith("hint: snap ")


def test_error_with_json_is_one_object_on_stdout(store: Path) -> None:
    result = snap("show", "nosuch", "--store", store, "--json")
    answer = json.loads(result.stdout)
    assert set(answer) == {"error", "hint", "exit_code"}
    assert answer["exit_code"] == result.returncode == 6


def test_a_store_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "file"):
        result = snap("list", "--store", path)
        assert result.returncode == 6, path
        assert result.stderr.startswith(b"snap: ")


def test_no_such_process_is_3(store: Path) -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    result = snap("take", gone.pid, "--store", store)
    assert result.returncode == 3, result.stderr.decode()
    assert b"hint: " in result.stderr
    assert b"Traceback" not in result.stderr


def test_traceback_only_under_v(store: Path) -> None:
    assert b"Traceback" not in snap("show", "nosuch", "--store", store).stderr
    assert b"Traceback" in snap("show", "nosuch", "--store", store, "-v").stderr


def test_unexpected_error_is_1_and_short(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["snap"])

    @door
    def broken(verbose: int = 0) -> None:
        raise KeyError("what")

    with pytest.raises(typer.Exit) as caught:
        broken()
    assert caught.value.exit_code == 1
    said = capsys.readouterr().err
    assert said.splitlines() == [
        "snap: KeyError: 'what'",
        "hint: the same command with -v shows where",
    ]


@pytest.mark.parametrize(("number", "code"), [("INT", 130), ("TERM", 143), ("HUP", 129)])
def test_signals_end_it_with_128_and_the_number(number: str, code: int, tmp_path: Path) -> None:
    script = (
        "import cli, os, signal, time\n"
        "from snapshot.door import door\n"
        "@cli.app.command()\n"
        "@door\n"
        "def wait() -> None:\n"
        f"    os.kill(os.getpid(), signal.SIG{number})\n"
        "    time.sleep(60)\n"
        "cli.app(['wait'])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=60, check=False
    )
    assert result.returncode == code
    assert result.stderr == b"snap: interrupted\n"


def test_closed_stdout_is_quiet(store: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, ROOT / "cli.py", "show", "first", "--store", store],
        stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    os.close(writer)
    assert process.stderr == b""
    assert process.returncode == 141


@pytest.mark.parametrize(
    ("given", "value"),
    [("4096", 4096), ("0x1000", 4096), ("64K", 65536), ("256M", 256 << 20), ("1.5G", 3 << 29),
     ("256 MiB", 256 << 20), ("1kb", 1024), ("0", 0)],
)  # fmt: skip
def test_sizes(given: str, value: int) -> None:
    assert arguments.size(given) == value


@pytest.mark.parametrize("given", ["", "-1", "K", "1X", "0x1000K", "nan", "1e400"])
def test_no_sizes(given: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        arguments.size(given)


@pytest.mark.parametrize(
    ("given", "parsed"),
    [("100M", (100 << 20, 0)), ("64k/s", (65536, 0)), ("1.5G", (3 << 29, 0)), ("50%", (0, 50)),
     (" 200% ", (0, 200))],
)  # fmt: skip
def test_paces(given: str, parsed: tuple[int, int]) -> None:
    assert pace.parse(given) == parsed


@pytest.mark.parametrize("given", ["", "0", "4K", "-1M", "0%", "-5%", "1.5%", "%", "fast", "9e9%"])
def test_no_paces(given: str) -> None:
    with pytest.raises(ValueError, match="not a pace"):
        pace.parse(given)


def test_progress_is_nothing_without_a_terminal_and_one_line_with() -> None:
    script = (
        "import time\n"
        "from snapshot import progress\n"
        "from snapshot.stats import Progress\n"
        "progress.QUIET_SECONDS = 0\n"
        "with progress.shown() as report:\n"
        "    print(report is not None)\n"
        "    if report:\n"
        "        report(Progress('saving', 1 << 20, 4 << 20, 7, 0.5))\n"
        "        time.sleep(0.3)\n"
    )
    arguments = [sys.executable, "-c", script]
    quiet = subprocess.run(arguments, cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert (quiet.stdout, quiet.stderr) == (b"False\n", b"")
    ours, theirs = pty.openpty()
    terminal = {**os.environ, "COLUMNS": "120", "TERM": "xterm"}
    with subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs, env=terminal
    ) as process:
        os.close(theirs)
        drawn = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:
                break
            if not piece:
                break
            drawn += piece
        assert process.stdout is not None
        assert process.stdout.read() == b"True\n"
    os.close(ours)
    assert b"1.0 MiB of 4.0 MiB" in drawn
    assert b"7 faults" in drawn


def test_import_is_cheap_and_the_functions_stay_functions() -> None:
    script = (
        "import sys, snapshot\n"
        "heavy = {'rich', 'lmdb', 'msgspec', 'typer', 'subprocess'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import snapshot.take\n"
        "assert callable(snapshot.take) and callable(snapshot.restore)\n"
        "from snapshot.take import default_name\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr.decode()
