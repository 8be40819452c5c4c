"""`snap check`, on this machine as it is and on processes that cannot be targets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from snapshot import checks
from snapshot.kernel import procfs

ROOT = Path(__file__).resolve().parents[2]
PTRACE_TRACEME = 0


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def check(*arguments: object, prefix: tuple[str, ...] = ()) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [*prefix, sys.executable, str(ROOT / "cli.py"), "check", *map(str, arguments), "--json"],
        capture_output=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    answer = json.loads(done.stdout)
    assert answer["exit_code"] == done.returncode, done.stderr.decode()
    return done.returncode, answer


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def test_this_machine(tmp_path: Path) -> None:
    """Every item has a state, and one that is not ok says what is lost and what to try."""
    code, answer = check("--store", tmp_path / "store")
    names = [item["item"] for item in answer["items"]]
    assert len(names) == len(set(names))
    assert {"ptrace", "PAGEMAP_SCAN", "clone3 set_tid", "pidfd_getfd", "kcmp"} <= set(names)
    assert answer["ok"] == (code == 0)
    for item in answer["items"]:
        assert item["state"] in ("ok", "degraded", "missing")
        if item["state"] != "ok":
            assert item["lost"], item
            assert item["command"], item


def test_the_sample_is_gone_afterwards() -> None:
    with checks._sample() as sample:
        assert Path(f"/proc/{sample.pid}").exists()
    until(lambda: _ended(sample.pid), "the sample process did not end")


def test_a_live_target(tmp_path: Path) -> None:
    with started("cat") as target:
        assert target.stdin is not None
        assert target.stdout is not None
        target.stdin.write(b"started?\n")
        target.stdin.flush()
        target.stdout.readline()
        before = _untouched(target.pid)
        code, answer = check(target.pid, "--store", tmp_path / "store")
        assert _untouched(target.pid) == before
    items = {item["item"]: item for item in answer["items"]}
    assert items[f"process {target.pid}"]["detail"].startswith("cat, 1 thread, ")
    if code == 0:
        assert items["permission"]["state"] == "ok"
        assert items["mappings and descriptors"]["state"] == "ok"


def test_no_such_process_is_3() -> None:
    with started("true") as target:
        target.wait()
    assert check(target.pid)[0] == 3


def test_a_zombie_is_3() -> None:
    with started("true") as target:
        os.waitid(os.P_PID, target.pid, os.WEXITED | os.WNOWAIT)
        code, answer = check(target.pid)
    assert code == 3
    assert "zombie" in answer["items"][-1]["detail"]


def test_a_kernel_thread_is_3() -> None:
    threads = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    kernel = [pid for pid in threads if _kernel_thread(pid)]
    if not kernel:
        pytest.skip("no kernel thread to be seen in this pid namespace")
    code, answer = check(kernel[0])
    assert code == 3
    assert "kernel thread" in answer["items"][-1]["detail"]


def test_a_traced_process_is_3() -> None:
    """The tracer is a child of ours, so that a dead test leaves nothing that is stopped."""
    script = (
        "import ctypes, os, signal, sys\n"
        "pid = os.fork()\n"
        "if not pid:\n"
        f"    ctypes.CDLL(None).ptrace({PTRACE_TRACEME}, 0, 0, 0)\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    os._exit(0)\n"
        "os.waitpid(pid, 0)\n"
        "print(pid, flush=True)\n"
        "sys.stdin.read()\n"
        "os.kill(pid, signal.SIGKILL)\n"
        "os.waitpid(pid, 0)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as tracer:
        assert tracer.stdout is not None
        traced = int(tracer.stdout.readline())
        code, answer = check(traced)
        tracer.communicate()
    assert code == 3
    assert f"traced by process {tracer.pid}" in answer["items"][-1]["detail"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give up privileges: sudo make test")
def test_without_capabilities_it_is_4_and_says_why() -> None:
    """Root without any capability: /dev/userfaultfd can be opened, other things cannot be done."""
    drop = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
    with started("cat") as target:
        code, answer = check(target.pid, prefix=drop)
    items = {item["item"]: item for item in answer["items"]}
    assert code == 4
    assert items["clone3 set_tid"]["state"] == "missing"
    assert "EPERM" in items["clone3 set_tid"]["detail"]
    assert items["permission"]["state"] == "missing"
    assert f"sudo snap take {target.pid}" in items["permission"]["command"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give up privileges: sudo make test")
def test_without_a_userfaultfd_nothing_is_said_of_the_kernel(tmp_path: Path) -> None:
    """Neither CAP_SYS_PTRACE nor /dev/userfaultfd: it is the user who lacks something."""
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("everybody may use userfaultfd(2) here")
    closed = tmp_path / "closed"
    closed.touch(0o000)
    mount = f'mount --bind {closed} /dev/userfaultfd && exec "$@"'
    hide = ("unshare", "-m", "sh", "-c", mount)
    _, answer = check(prefix=(*hide, "sh", "setpriv", "--bounding-set=-all", "--inh-caps=-all"))
    items = {item["item"]: item for item in answer["items"]}
    assert items["userfaultfd"]["state"] == "missing"
    for name in ("userfaultfd features, take", "userfaultfd features, lazy", "missing faults"):
        assert "EPERM" in items[name]["detail"] or "not permitted" in items[name]["detail"]
        assert "uname" not in items[name]["command"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give up privileges: sudo make test")
def test_a_lazy_restore_needs_the_right_to_follow_forks() -> None:
    """/dev/userfaultfd alone gives takes, but no EVENT_FORK."""
    _, answer = check(prefix=("setpriv", "--bounding-set=-all", "--inh-caps=-all"))
    items = {item["item"]: item for item in answer["items"]}
    if items.get("/dev/userfaultfd", {}).get("state") != "ok":
        pytest.skip("no /dev/userfaultfd here")
    assert items["missing faults"]["state"] == "degraded"
    assert "CAP_SYS_PTRACE" in items["missing faults"]["detail"]
    assert items["missing faults"]["command"].startswith("sudo snap restore")


def test_what_a_target_has_that_cannot_be_taken_is_listed() -> None:
    """A pidfd: nothing that a take could handle."""
    script = (
        "import os, sys\n"
        "fd = os.pidfd_open(os.getpid())\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as target:
        assert target.stdout is not None
        target.stdout.readline()
        code, answer = check(target.pid)
        target.communicate()
    if any(item["item"] == "permission" and item["state"] != "ok" for item in answer["items"]):
        pytest.skip("may not look into other processes: sudo make test")
    assert code == 5
    (found,) = [item for item in answer["items"] if item["item"] == "mappings and descriptors"]
    assert "pidfd" in found["detail"]


def test_a_store_that_cannot_be_written_is_6(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    code, answer = check("--store", tmp_path / "file")
    (store,) = [item for item in answer["items"] if item["item"].startswith("store")]
    assert store["state"] == "missing"
    assert code == 6 or any(
        item["state"] == "missing" for item in answer["items"] if item is not store
    )


def _ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _kernel_thread(pid: int) -> bool:
    try:
        return procfs.status(pid).kernel_thread
    except Exception:
        return False


def _untouched(pid: int) -> tuple[object, ...]:
    status = procfs.status(pid)
    return (
        status.tracer,
        status["SigBlk"],
        status["Threads"],
        Path(f"/proc/{pid}/maps").read_bytes(),
        sorted(os.listdir(f"/proc/{pid}/fd")),
    )
