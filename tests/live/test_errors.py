"""What goes wrong ends in one clear error: the exit code of the table, a message with a name or a
quantity, something to try; the target unharmed, and no half image in the store."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import ROOT, Ran, Reap, Snap, Spawn
from tests.harness import processes
from tests.harness.processes import wait_until
from tests.harness.victims import Victim

pytestmark = pytest.mark.live


def one_error(ran: Ran, code: int, *words: str) -> str:
    """The message, checked: right code, JSON and stderr agree, no traceback, a hint."""
    assert ran.code == code, ran.err
    assert ran.json == {"error": ran.json["error"], "hint": ran.json["hint"], "exit_code": code}
    message, hint = ran.json["error"], ran.json["hint"]
    assert "Traceback" not in ran.err
    assert ran.err.count("snap: ") == 1, ran.err
    assert f"snap: {message}" in ran.err
    assert hint, f"no hint: {message}"
    assert f"hint: {hint}" in ran.err
    for word in words:
        assert word in message, message
    return str(message)


@contextmanager
def unharmed(victim: Victim, snap: Snap) -> Iterator[None]:
    """Around a take that fails: the victim goes on, nothing of an image is in the store."""
    before = snap.names()
    yield
    assert snap.names() == before
    victim.verify()
    victim.goes_on()


@pytest.fixture
def victim(spawn: Spawn) -> Victim:
    return spawn("writer", kind="mixed", mib=16)


def test_no_such_process(snap: Snap) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    one_error(snap("take", gone.pid, ok=False), 3, str(gone.pid))
    assert snap.names() == []


def test_kernel_thread(snap: Snap) -> None:
    if processes.stat_fields(2)[1:2] != ["0"]:
        pytest.skip("pid 2 is no kernel thread in this pid namespace: run on the host")
    one_error(snap("take", 2, ok=False), 3, "2", "kernel thread")
    assert snap.names() == []


def test_writers_who_cannot_pass(snap: Snap, spawn: Spawn) -> None:
    victim = spawn("writer", kind="memfd", mib=8, threads=1, rate=100)
    ran = snap("take", victim.pid, "--writers", "pass", ok=False)
    one_error(ran, 8, "have to wait")
    wrong = snap("take", victim.pid, "--writers", "pass", "--now", ok=False)
    assert (wrong.code, "--writers" in wrong.err) == (2, True)
    assert snap.names() == []
    assert snap("take", victim.pid).json["writers"] == "wait"
    victim.goes_on()


def test_zombie(snap: Snap) -> None:
    with subprocess.Popen(["true"]) as zombie:
        wait_until(lambda: processes.state(zombie.pid) == "Z", "a zombie")
        one_error(snap("take", zombie.pid, ok=False), 3, str(zombie.pid), "zombie")
        assert snap.names() == []


def tracer_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("TracerPid:")[1].split()[0])


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace: apt-get install strace")
def test_traced(snap: Snap, victim: Victim) -> None:
    with subprocess.Popen(
        ["strace", "-f", "-o", "/dev/null", "-e", "trace=none", "-p", str(victim.pid)],
        stderr=subprocess.DEVNULL,
    ) as strace:
        try:
            wait_until(lambda: tracer_of(victim.pid) == strace.pid, "strace attaching")
            with unharmed(victim, snap):
                ran = snap("take", victim.pid, ok=False)
                one_error(ran, 3, str(victim.pid), "strace", str(strace.pid))
            assert tracer_of(victim.pid) == strace.pid
        finally:
            strace.terminate()
    snap("take", victim.pid, "--name", "afterwards")


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that everybody may use."""
    path = Path(tempfile.mkdtemp(prefix="snap-public-"))
    path.chmod(0o1777)  # as /tmp: without the sticky bit no store is trusted there
    yield path
    shutil.rmtree(path)


UNPRIVILEGED = {
    "nobody": ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
    "no-capabilities": ("setpriv", "--bounding-set=-all", "--inh-caps=-all"),
}


@pytest.mark.parametrize("who", UNPRIVILEGED)
def test_not_permitted(snap: Snap, victim: Victim, public: Path, who: str) -> None:
    prefix = UNPRIVILEGED[who]
    probe = subprocess.run([*prefix, *snap.command, "--version"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip(f"{who} may not run {snap.command[0]}: install it where everybody can read it")
    with unharmed(victim, snap):
        ran = snap("take", victim.pid, store=public / "store", prefix=prefix, ok=False)
        one_error(ran, 4, str(victim.pid))
    # No store may be there; if one is, it is empty.
    if (public / "store").exists():
        assert snap("list", store=public / "store", prefix=prefix).json == []


def test_store_is_a_file(snap: Snap, victim: Victim, tmp_path: Path) -> None:
    file = tmp_path / "letter"
    file.write_text("Dear Sir or Madam")
    with unharmed(victim, snap):
        one_error(snap("take", victim.pid, store=file, ok=False), 6, str(file))
    one_error(snap("list", store=file, ok=False), 6, str(file))
    assert file.read_text() == "Dear Sir or Madam"


def test_store_is_something_else(snap: Snap, victim: Victim, tmp_path: Path) -> None:
    other = tmp_path / "photographs"
    other.mkdir()
    (other / "cat.jpg").write_bytes(b"\xff\xd8\xff")
    (other / "data.mdb").write_bytes(b"no database of ours" * 1000)
    with unharmed(victim, snap):
        one_error(snap("take", victim.pid, store=other, ok=False), 6, str(other))
    one_error(snap("list", store=other, ok=False), 6, str(other))
    assert sorted(path.name for path in other.iterdir()) == ["cat.jpg", "data.mdb"]


def test_no_store(snap: Snap, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    one_error(snap("list", store=nowhere, ok=False), 6, str(nowhere))
    one_error(snap("restore", "image", store=nowhere, ok=False), 6, str(nowhere))
    assert not nowhere.exists()


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv: apt install util-linux")
def test_a_store_that_may_not_be_read(snap: Snap, victim: Victim) -> None:
    """A failure of the store (6), not wrong usage (2)."""
    snap("take", victim.pid)
    os.chown(snap.store, 65534, -1)
    try:
        prefix = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
        done = subprocess.run(
            [*prefix, sys.executable, ROOT / "cli.py", "list", "--store", snap.store],
            capture_output=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            timeout=60,
            check=False,
        )
    finally:
        os.chown(snap.store, 0, -1)
    assert done.returncode == 6, done.stderr


@pytest.mark.parametrize(
    "command",
    [("restore",), ("restore", "--lazy"), ("show",), ("verify",), ("rm",)],
    ids=" ".join,
)
def test_unknown_image(snap: Snap, victim: Victim, command: tuple[str, ...]) -> None:
    snap("take", victim.pid, "--name", "known")
    one_error(snap(command[0], "unheard-of", *command[1:], ok=False), 6, "unheard-of")
    assert snap.names() == ["known"]


def test_name_is_taken(snap: Snap, victim: Victim) -> None:
    snap("take", victim.pid, "--name", "mine")
    with unharmed(victim, snap):
        one_error(snap("take", victim.pid, "--name", "mine", ok=False), 6, "mine")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a tmpfs of so many MiB."""
    mounted: list[Path] = []

    def mount(mib: int) -> Path:
        place = tmp_path / f"disk-{len(mounted)}"
        place.mkdir()
        options = f"size={mib}m"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("mib", [1, 8, 40])
def test_full_disk(snap: Snap, spawn: Spawn, small_disk: Callable[[int], Path], mib: int) -> None:
    """64 MiB that do not compress, on a disk with less: at the store's birth, early, late."""
    victim = spawn("writer", kind="anon", mib=64)
    snap.store = small_disk(mib) / "store"
    refused = snap("take", victim.pid, ok=False)
    one_error(refused, 6, "space", *(["it takes 9.0 MiB"] if mib < 9 else []))
    assert snap.names() == []
    victim.verify()
    victim.goes_on()
    # What the failed take wrote is free again for an image that fits.
    small = spawn("exits", mib=1)
    if mib > 8:
        snap("take", small.pid, "--name", "small")
        assert snap("verify", "small").json["ok"]


def test_full_disk_beside_an_image(
    snap: Snap, spawn: Spawn, small_disk: Callable[[int], Path]
) -> None:
    """An image that is there stays whole when the next one does not fit."""
    snap.store = small_disk(40) / "store"
    small, large = spawn("exits", mib=4), spawn("writer", kind="anon", mib=96)
    snap("take", small.pid, "--name", "small")
    with unharmed(large, snap):
        one_error(snap("take", large.pid, ok=False), 6, "space")
    assert snap.names() == ["small"]
    assert snap("verify", "small").json["ok"]


@pytest.mark.parametrize("stage", ["before-freeze", "frozen"])
def test_failing_hook(snap: Snap, victim: Victim, stage: str) -> None:
    with unharmed(victim, snap):
        ran = snap("take", victim.pid, "--hook", f"{stage}=exit 3", ok=False)
        one_error(ran, 10, stage, "3")


def test_pid_in_use(snap: Snap, victim: Victim) -> None:
    """It still runs: its pid is named, and --pid new offered."""
    snap("take", victim.pid, "--name", "image")
    for mode in ("--lazy", "--eager"):
        ran = snap("restore", "image", mode, ok=False)
        one_error(ran, 9, str(victim.pid))
        assert "--pid new" in ran.json["hint"]
    victim.verify()
    victim.goes_on()


ODD = """
import ctypes, fcntl, mmap, os, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
parameters = (ctypes.c_uint32 * 30)()
ring = libc.syscall(425, 8, parameters)  # io_uring_setup
watch = libc.syscall(323, os.O_CLOEXEC)  # userfaultfd
if ring < 0 or watch < 0:
    os.write(int(sys.argv[1]), b"n")
    sys.exit()
area = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
start = ctypes.addressof(ctypes.c_char.from_buffer(area))
fcntl.ioctl(watch, 0xC018AA3F, bytearray(struct.pack("QQQ", 0xAA, 0, 0)))
fcntl.ioctl(watch, 0xC020AA00, bytearray(struct.pack("QQQQ", start, 1 << 20, 1, 0)))
os.write(int(sys.argv[1]), b"r")
time.sleep(600)
"""


def test_everything_unsupported_is_listed(snap: Snap, reap: Reap) -> None:
    """Both reasons in one error, before anything is touched."""
    ready, told = os.pipe()
    odd = subprocess.Popen([sys.executable, "-c", ODD, str(told)], pass_fds=(told,))
    reap.add(odd.pid)
    os.close(told)
    with os.fdopen(ready, "rb") as pipe:
        assert select.select([pipe], [], [], 30)[0]
        if pipe.read(1) != b"r":
            pytest.skip("no io_uring or no userfaultfd here (sysctl kernel.io_uring_disabled)")
    message = one_error(snap("take", odd.pid, ok=False), 5, str(odd.pid))
    assert "io_uring" in message
    assert "userfaultfd" in message
    assert message.count("\n  - ") >= 2
    assert snap.names() == []
    assert odd.poll() is None
    odd.kill()
    odd.wait()


def test_interrupted(snap: Snap, victim: Victim) -> None:
    """Ctrl-C in the middle: 130, and as if nothing had been."""
    with unharmed(victim, snap):
        ran = snap("take", victim.pid, "--hook", "resumed=kill -INT $PPID", ok=False)
        assert ran.code == 128 + signal.SIGINT, ran.err
        assert "Traceback" not in ran.err
