"""Every kind of process: a take works, the target runs on as before, and a restore brings it back;
or a clear error says what cannot be handled."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import snapshot
from snapshot.errors import TargetError
from tests.conftest import Snap, Spawn
from tests.harness import processes
from tests.harness.processes import wait_until
from tests.harness.takes import compared, restored
from tests.harness.victims import BIN, Victim, build
from tests.live.freezing import Victim as Waiting
from tests.live.test_harmless import lasting_changes, observed, settled
from tests.live.test_late import VFORK

pytestmark = pytest.mark.live

MODES = pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
CAPS = "cap_checkpoint_restore"


def taken(victim: Victim, store: Path) -> None:
    """An exact image, after which the victim is as it was."""
    for _ in range(2):
        victim.writes()

    def observe() -> dict[str, str]:
        return observed(victim.pid)

    before = settled(observe)
    assert compared(victim.pid, store, "image") == []
    assert lasting_changes(before, observe) == ""
    victim.goes_on()


def comes_back(victim: Victim, store: Path, lazy: bool) -> None:
    victim.kill()
    with restored(victim, "image", store, lazy) as back:
        victim.goes_on()
        assert back.complete() is None
        victim.goes_on()


@MODES
@pytest.mark.parametrize("what", ["maps", "threads", "undumpable", "errno", "kill"])
def test_in_itself(spawn: Spawn, store: Path, what: str, lazy: bool) -> None:
    """10,000 mappings, 2,000 threads, dumpable 0, a seccomp filter that answers userfaultfd,
    ptrace and socket with EPERM, or kills for them (no filter is restored, with a warning)."""
    victim = spawn("kinds", what=what)
    taken(victim, store)
    comes_back(victim, store, lazy)


@MODES
@pytest.mark.parametrize("name", ["kinds-static", "kinds-musl", "nolibc"])
def test_other_libraries(spawn: Spawn, store: Path, name: str, lazy: bool) -> None:
    build()
    if not (BIN / name).exists():
        pytest.skip("no musl-gcc here: apt-get install musl-tools")
    victim = spawn(name)
    taken(victim, store)
    comes_back(victim, store, lazy)


@MODES
def test_no_new_privs(spawn: Spawn, store: Path, lazy: bool) -> None:
    victim = spawn.by(("setpriv", "--no-new-privs"), "kinds")
    taken(victim, store)
    comes_back(victim, store, lazy)


def page_tables(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("VmPTE:")[1].split()[0]) * 1024


@MODES
def test_reserved_addresses(spawn: Spawn, store: Path, lazy: bool) -> None:
    """Twice 1 TiB, as Go and Java reserve it: the target's page tables do not grow, and the take
    is as quick as one of a small process."""
    victim = spawn("kinds", what="reserve")
    victim.goes_on()
    before = page_tables(victim.pid)
    image = snapshot.take(victim.pid, name="image", store=store)
    with image:
        stats = image.manifest.stats
        assert stats.saved_bytes < 16 << 20
        assert stats.seconds < 10
        assert stats.longest_stop_us < 1_000_000
    victim.goes_on()
    assert page_tables(victim.pid) - before < 1 << 20
    comes_back(victim, store, lazy)


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that everybody may use."""
    path = Path(tempfile.mkdtemp(prefix="snap-public-"))
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def nobody(public: Path) -> Iterator[Victim]:
    """`kinds` as an unprivileged user."""
    build()
    program = public / "kinds"
    shutil.copy(BIN / "kinds", program)
    victim = Victim(public, [*NOBODY, str(program)])
    yield victim
    victim.kill()


@MODES
def test_an_unprivileged_user(nobody: Victim, store: Path, lazy: bool) -> None:
    """Taken and restored by root: it is the same user's afterwards."""
    taken(nobody, store)
    comes_back_as_nobody(nobody, store, lazy)


def comes_back_as_nobody(victim: Victim, store: Path, lazy: bool) -> None:
    victim.kill()
    with restored(victim, "image", store, lazy) as back:
        victim.goes_on()
        status = Path(f"/proc/{back.pid}/status").read_text()
        assert "Uid:\t65534\t65534\t65534\t65534" in status
        assert "CapEff:\t0000000000000000" in status


@MODES
def test_namespaces(spawn: Spawn, store: Path, lazy: bool) -> None:
    """Other pid, mount and network namespaces: taken by its pid here, and it runs on. Restored in
    the namespaces of snap, as the image says, but for its pid, which the program knows."""
    own = ("unshare", "--pid", "--fork", "--kill-child", "--mount", "--net")
    outer = spawn.by((*own, "sh", "-c", '"$0" "$@" & wait'), "kinds")
    (first,) = processes.children(outer.pid)
    (inner,) = processes.children(first)
    outer_pid, outer.pid = outer.pid, inner
    try:
        taken(outer, store)
        with snapshot.open_image("image", store=store) as image:
            said = " ".join(image.manifest.warnings)
        for name in ("mnt", "net"):
            assert f"another {name} namespace" in said
    finally:
        outer.pid = outer_pid
    outer.kill()
    processes.has_ended(inner)
    with restored(outer, "image", store, lazy, pid="new"):
        outer.goes_on()


def test_another_user_namespace(spawn: Spawn, snap: Snap) -> None:
    """Refused, by name, before anything is touched."""
    victim = spawn.by(("unshare", "--user", "--map-root-user"), "kinds")
    ran = snap("take", victim.pid, ok=False)
    assert ran.code == 5
    assert "another user namespace" in ran.json["error"]
    victim.goes_on()
    checked = snap("check", victim.pid, ok=False)
    assert checked.code == 5
    assert any("another user namespace" in item["detail"] for item in checked.json["items"])


def test_a_tracer(spawn: Spawn, store: Path) -> None:
    """A process that traces another: it is taken and goes on tracing; the other one is refused."""
    victim = spawn("kinds", what="tracer")
    victim.goes_on()
    compared_at_once = compared(victim.pid, store, "image")
    assert compared_at_once == []
    victim.goes_on()
    (child,) = processes.children(victim.pid)
    with pytest.raises(TargetError, match=f"traced by process {victim.pid}"):
        snapshot.take(child, name="child", store=store)
    victim.goes_on()


def test_in_a_vfork_wait(snap: Snap) -> None:
    """A bounded wait, then an error that names the thread; afterwards the take works."""
    with Waiting(VFORK) as victim:
        ran = snap("take", victim.pid, ok=False)
        assert ran.code == 11
        assert f"{victim.pid} (" in ran.json["error"]
        assert "state D" in ran.json["error"]
        count = victim.get("count")
        wait_until(lambda: victim.get("count") > count + 3, "the other thread going on")
        victim.wake()
        wait_until(lambda: victim.get("returned") == 1, "it came back from vfork")
        snap("take", victim.pid, "--name", "image")


def without_power(*capabilities: str) -> tuple[str, ...]:
    kept = "".join(f",+{one}" for one in capabilities)
    return ("setpriv", f"--bounding-set=-all{kept}", f"--inh-caps=-all{kept}")


def test_an_ordinary_user_takes_his_own(spawn: Spawn, snap: Snap) -> None:
    """Without any capability a take of one's own process is refused, and `snap check` names what
    is missing; with CAP_CHECKPOINT_RESTORE it works. (Uid 0 without capabilities is such a user,
    one who owns /dev/userfaultfd.)"""
    victim = spawn.by(without_power(), "kinds")
    ran = snap("take", victim.pid, prefix=without_power(), ok=False)
    checked = snap("check", victim.pid, prefix=without_power(), ok=False)
    assert (ran.code, checked.code) == (4, 4), (ran.err, checked.out)
    missing = [item for item in checked.json["items"] if item["state"] == "missing"]
    assert "/proc/PID/map_files" in [item["item"] for item in missing]
    assert all(item["command"] for item in missing)
    victim.goes_on()
    prefix = without_power("checkpoint_restore")
    snap("take", victim.pid, "--name", "image", prefix=prefix)
    assert snap("verify", "image").json["ok"]
    victim.goes_on()
