"""Hooks: real shell commands, real entry points of a small installed program."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from snapshot import hooks
from snapshot.errors import HookError
from snapshot.hooks import HookContext, Hooks


def test_callables_run_in_order_with_their_context() -> None:
    seen: list[tuple[str, HookContext]] = []
    given = Hooks(
        {
            "before-freeze": lambda context: seen.append(("one", context)),
            "frozen": [
                lambda context: seen.append(("two", context)),
                lambda context: seen.append(("three", context)),
            ],
        },
        installed=False,
    )
    given.run("before-freeze", pid=7, image="img")
    given.run("frozen", pid=7, image="img", attempt=2)
    given.run("resumed", pid=7, image="img")
    assert [name for name, _ in seen] == ["one", "two", "three"]
    assert seen[0][1] == HookContext("before-freeze", 7, "img", {})
    assert seen[2][1].extra == {"attempt": 2}


def test_wants_says_whether_a_stage_has_hooks() -> None:
    given = Hooks({"frozen": print}, [("committed", "true")], installed=False)
    assert given.wants("frozen")
    assert given.wants("committed")
    assert not given.wants("resumed")


def test_command_gets_pid_image_and_stage(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = f'echo "$SNAP_PID $SNAP_IMAGE $SNAP_STAGE" | tee {tmp_path}/out'
    Hooks(commands=[("frozen", command)], installed=False).run("frozen", pid=42, image="an image")
    assert (tmp_path / "out").read_text() == "42 an image frozen\n"
    captured = capfd.readouterr()
    assert captured.out == ""  # stdout is for results alone
    assert captured.err == "42 an image frozen\n"


def test_failed_stage_carries_the_error(tmp_path: Path) -> None:
    command = f'printf %s "$SNAP_ERROR" > {tmp_path}/out'
    given = Hooks(commands=[("failed", command)], installed=False)
    given.run("failed", pid=1, image="x", error="disk full")
    assert (tmp_path / "out").read_text() == "disk full"


@pytest.mark.parametrize("stage", sorted(hooks.FATAL))
def test_failure_before_t0_ends_it(stage: str) -> None:
    reached = []
    given = Hooks(
        {stage: [_fail, lambda context: reached.append(context)]},
        installed=False,
    )
    with pytest.raises(HookError, match="no more room") as caught:
        given.run(stage, pid=1, image="x")
    assert caught.value.exit_code == 10
    assert not reached


@pytest.mark.parametrize("stage", sorted(set(hooks.STAGES) - hooks.FATAL))
def test_later_failure_is_a_warning_and_the_others_run(stage: str) -> None:
    reached: list[HookContext] = []
    given = Hooks({stage: [_fail, reached.append]}, [(stage, "exit 3")], installed=False)
    given.run(stage, pid=1, image="x")
    assert len(reached) == 1
    assert len(given.warnings) == 2
    assert "no more room" in given.warnings[0]
    assert "exit status 3" in given.warnings[1]


def test_a_command_has_no_signal_blocked_that_a_take_blocks(tmp_path: Path) -> None:
    command = f"grep SigBlk /proc/self/status > {tmp_path}/out"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    try:
        Hooks(commands=[("frozen", command)], installed=False).run("frozen", pid=42, image="one")
        assert signal.SIGCHLD in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    blocked = int((tmp_path / "out").read_text().split()[1], 16)
    assert not blocked >> signal.SIGCHLD - 1 & 1


@pytest.mark.parametrize(
    ("command", "reason"),
    [("exit 3", "exit status 3"), ("kill -TERM $$", "SIGTERM"), ("no-such-program-x", "127")],
)
def test_failing_command_says_how(command: str, reason: str) -> None:
    with pytest.raises(HookError, match=reason) as caught:
        Hooks(commands=[("before-freeze", command)], installed=False).run(
            "before-freeze", pid=1, image="x"
        )
    assert command in caught.value.message
    assert caught.value.hint


def test_command_at_frozen_has_a_limit_and_leaves_nothing_behind(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    command = f"mkfifo {fifo}; sleep 600 & echo $! > {tmp_path}/pid; cat {fifo}"
    given = Hooks(commands=[("frozen", command)], installed=False, frozen_limit=0.5)
    begin = time.monotonic()
    with pytest.raises(HookError, match=r"not done after 0\.5 s"):
        given.run("frozen", pid=1, image="x")
    assert time.monotonic() - begin < 10
    sleeper = Path("/proc", (tmp_path / "pid").read_text().strip())
    deadline = time.monotonic() + 10
    while _runs(sleeper) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _runs(sleeper)


def test_frozen_does_not_wait_for_what_a_command_leaves_in_the_background(tmp_path: Path) -> None:
    command = f"sleep 600 & echo $! > {tmp_path}/pid"
    given = Hooks(commands=[("frozen", command)], installed=False, frozen_limit=10)
    given.run("frozen", pid=1, image="x")
    pid = int((tmp_path / "pid").read_text())
    assert _runs(Path("/proc", str(pid)))
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("frosen=true", "no stage 'frosen'; stages: before-freeze, frozen"),
        ("frozen", "not STAGE=COMMAND"),
        ("frozen= ", "not STAGE=COMMAND"),
        ("rebuilt=true", "'rebuilt' is a stage of restore; here: before-freeze"),
    ],
)
def test_wrong_hook_option_names_the_stages(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hooks.parse(spec, hooks.TAKE_STAGES)


def test_hook_option_keeps_later_equal_signs() -> None:
    assert hooks.parse("frozen=A=b env") == ("frozen", "A=b env")


def test_unknown_stage_in_a_mapping_or_run() -> None:
    with pytest.raises(ValueError, match="no stage 'freeze'"):
        Hooks({"freeze": print}, installed=False)
    with pytest.raises(ValueError, match="no stage 'done'"):
        Hooks(installed=False).run("done", pid=1, image="x")


def _install(where: Path, module: str, value: str, source: str) -> None:
    """What pip leaves of a program with one entry point."""
    (where / f"{module}.py").write_text(source)
    info = where / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[snapshot.hooks]\n{module} = {module}:{value}\n")


def test_installed_program_joins_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(tmp_path, "joiner", "seen.append", "seen = []\n")
    monkeypatch.syspath_prepend(tmp_path)
    given = Hooks()
    given.run("before-freeze", pid=1, image="x")
    given.run("committed", pid=1, image="x")
    stages = [context.stage for context in sys.modules["joiner"].seen]
    assert stages == ["before-freeze", "committed"]
    Hooks(installed=False).run("frozen", pid=1, image="x")
    assert len(sys.modules["joiner"].seen) == 2


def test_installed_program_may_name_its_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(tmp_path, "chooser", "hooks", "seen = []\nhooks = {'frozen': seen.append}\n")
    monkeypatch.syspath_prepend(tmp_path)
    given = Hooks()
    assert given.wants("frozen")
    assert not given.wants("committed")


@pytest.mark.parametrize(
    ("source", "why"), [("hooks = 3\n", "neither callable"), ("import no_such_module_x\n", "named")]
)
def test_installed_program_that_does_not_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, why: str
) -> None:
    module = f"broken_{why[:5]}"
    _install(tmp_path, module, "hooks", source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(HookError, match=why) as caught:
        Hooks()
    assert f"pip uninstall {module}" in caught.value.hint


def test_a_program_installed_as_a_zip_file_joins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    _install(inside, "zipped", "seen.append", "seen = []\n")
    monkeypatch.syspath_prepend(shutil.make_archive(str(tmp_path / "zipped"), "zip", inside))
    Hooks().run("committed", pid=1, image="x")
    assert [context.stage for context in sys.modules["zipped"].seen] == ["committed"]


def _fail(context: HookContext) -> None:
    raise RuntimeError("no more room")


def _runs(proc: Path) -> bool:
    try:
        return (proc / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
