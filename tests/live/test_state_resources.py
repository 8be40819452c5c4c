"""State that is neither memory nor descriptors: captured from a live victim, rebuilt in another
process, compared by what both report with their own system calls.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from snapshot.errors import RestoreError
from snapshot.freeze import freeze
from snapshot.kernel import procfs
from snapshot.kernel.arch_x86_64 import NR
from snapshot.manifest import unpack
from snapshot.resources import preflight
from snapshot.resources.capture import gather
from snapshot.resources.credentials import State as Credentials
from snapshot.resources.limits import State as Limits
from snapshot.resources.scheduling import State as Scheduling
from snapshot.resources.timers import State as Timers

from .state_victim import build, capture, changed, outside, rebuild, running, without_times

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="changes users, limits, priorities: run as root"),
]

SI_QUEUE = -1


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("state"))


@pytest.mark.parametrize("mode", ["blank", "state", "creds"])
def test_capture_leaves_no_trace(program: Path, tmp_path: Path, mode: str) -> None:
    with running(program, mode, tmp_path) as victim:
        before, seen_before = victim.ask("report"), outside(victim.pid)
        first = capture(victim.pid)
        second = capture(victim.pid)
        assert outside(victim.pid) == seen_before
        after = victim.ask("report")
        assert without_times(after) == without_times(before)
        for number, (_, left) in before["timers"].items():
            assert after["timers"][number][1] <= left
        pending = victim.ask("drain")
        assert len(pending["threads"][0]["signals"]) == (7 if mode == "state" else 0)
    assert [thread.tid for thread in first.threads] == [thread.tid for thread in second.threads]
    assert first.pending == second.pending
    assert first.state["signals"] == second.state["signals"]


def test_what_is_captured(program: Path, tmp_path: Path) -> None:
    with running(program, "state", tmp_path, start_new_session=True) as victim:
        report = victim.ask("report")
        process = capture(victim.pid)
        pid = victim.pid
        tids = procfs.threads(pid)
    assert (process.pid, process.pgid, process.sid, process.ppid) == (pid, pid, pid, os.getpid())
    assert process.comm == b"le(a) der"
    assert process.threads[2].comm == b"wor) R k|2"
    assert process.cmdline == (os.fsencode(program), b"state", os.fsencode(tmp_path))
    assert process.cwd == os.fsencode(tmp_path)
    assert process.root == b"/"
    assert process.exe == os.fsencode(program)
    assert process.umask == 0o031
    assert process.personality == report["threads"][0]["personality"]
    assert [thread.tid for thread in process.threads] == tids
    layout = process.layout
    assert layout.start_code < layout.end_code <= layout.start_data < layout.end_data
    assert layout.end_data <= layout.start_brk <= layout.brk
    assert layout.start_stack <= layout.arg_start < layout.arg_end <= layout.env_start
    assert len(layout.auxv) % 16 == 0
    for thread, told in zip(process.threads, report["threads"], strict=True):
        assert thread.signal_mask == told["blocked"]
        assert [*thread.altstack] == [told["stack"][0], told["stack"][1], told["stack"][2]] or (
            thread.altstack[1] == told["stack"][1] % (1 << 32) - (1 << 32)
        )
        assert [*thread.robust_list] == told["robust"]
        assert thread.clear_child_tid == told["clear"]
        assert thread.rseq is not None
        assert len(thread.registers) == 216
        assert len(thread.xstate) >= 576
        assert all(len(info) == 128 for info in thread.pending)
    assert [len(thread.pending) for thread in process.threads] == [0, 3, 3, 3]
    timers = unpack(process.state["timers"], Timers)
    assert sorted(timer.id for timer in timers.posix) == [2, 3, 7, 150, 151, 152]
    by_id = {timer.id: timer for timer in timers.posix}
    assert (by_id[2].notify, by_id[3].notify, by_id[7].notify) == (0, 4, 1)
    assert by_id[3].target == pid
    assert by_id[2].value == 0xABCDEF02
    assert by_id[150].clock == -6  # the process's own CPU clock
    assert [timer.which for timer in timers.intervals] == [0, 2]


def test_rebuilt_state(program: Path, tmp_path: Path) -> None:
    with running(program, "state", tmp_path, start_new_session=True) as victim:
        Path(f"/proc/{victim.pid}/oom_score_adj").write_text("321")
        Path(f"/proc/{victim.pid}/coredump_filter").write_text("0x21")
        process = capture(victim.pid)
        expected = victim.ask("report")
        signals = victim.ask("drain")
    with running(program, "blank", tmp_path) as other:
        warnings = rebuild(process, other.pid)
        found = other.ask("report")
        assert without_times(found) == without_times(expected)
        for number, (_, left) in expected["timers"].items():
            assert abs(found["timers"][number][1] - left) < 60e9
        for (_, was), (_, now) in zip(expected["itimers"], found["itimers"], strict=True):
            assert abs(now - was) < 60e6
        assert other.ask("drain") == signals
        assert procfs.read(other.pid, "oom_score_adj") == b"321\n"
        assert procfs.read(other.pid, "coredump_filter") == b"00000021\n"
        assert procfs.link(other.pid, "cwd") == os.fsencode(tmp_path)
        again = capture(other.pid)
    assert warnings == []
    for name in ("signals", "settings", "limits"):
        assert again.state[name] == process.state[name]
    for thread, was in zip(again.threads, process.threads, strict=True):
        assert thread.state == was.state
        assert thread.rseq == was.rseq
        assert thread.altstack == was.altstack


def test_rebuilt_credentials(program: Path, tmp_path: Path) -> None:
    with running(program, "creds", tmp_path) as victim:
        process = capture(victim.pid)
        expected = victim.ask("report")
    with running(program, "blank", tmp_path) as other:
        warnings = rebuild(process, other.pid)
        found = other.ask("report")
    assert warnings == []
    assert found["threads"] == expected["threads"]
    assert found["dumpable"] == 1


def test_death_signal_needs_a_parent_that_stays(program: Path, tmp_path: Path) -> None:
    with running(program, "state", tmp_path) as victim:
        process = capture(victim.pid)
    with running(program, "blank", tmp_path) as other:
        warnings = rebuild(process, other.pid, parent_stays=False)
        found = other.ask("report")
    assert [thread["death"] for thread in found["threads"]] == [0, 0, 0, 0]
    assert len(warnings) == 3
    assert all("--wait" in warning for warning in warnings)


def test_chroot(program: Path, tmp_path: Path) -> None:
    jail = tmp_path / "jail"
    (jail / "inside").mkdir(parents=True)
    (jail / "proc").mkdir()
    with running(program, "blank", tmp_path) as victim:
        with freeze(victim.pid) as frozen:  # it would need /proc/self/exe inside otherwise
            frozen.remote.call(NR.chroot, frozen.remote.put(os.fsencode(jail) + b"\0"))
            frozen.remote.call(NR.chdir, frozen.remote.put(b"/inside\0"))
        process = capture(victim.pid)
    assert process.root == os.fsencode(jail)
    assert process.cwd == os.fsencode(jail / "inside")
    with running(program, "blank", tmp_path) as other:
        assert rebuild(process, other.pid) == []
        assert procfs.link(other.pid, "root") == os.fsencode(jail)
        assert other.ask("report")["cwd"] == "/inside"


def test_working_directory_that_is_gone(program: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    with running(program, "state", gone) as victim:
        gone.rmdir()
        process = capture(victim.pid)
    with running(program, "blank", tmp_path) as other:
        (warning,) = rebuild(process, other.pid)
        assert other.ask("report")["cwd"] == "/"
    assert str(gone) in warning
    assert "deleted" in warning


def test_the_kernel_refuses(program: Path, tmp_path: Path) -> None:
    """A new process without power: what it may not have becomes a warning with the quantity."""
    with running(program, "blank", tmp_path) as victim:
        process = capture(victim.pid)
    process = changed(process, "limits", Limits, limits={7: (5000, 1 << 40), 4: (0, 0)})
    process = changed(process, "scheduling", Scheduling, nice=-5, policy=1, priority=9)
    user: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": []}
    with running(program, "blank", Path("/"), **user) as other:
        warnings = rebuild(process, other.pid)
        report = other.ask("report")
    text = "\n".join(warnings)
    assert "nice -5: not restored (EACCES)" in text
    assert "policy 1, priority 9: not restored (EPERM)" in text
    assert "limit open files: 5000 (hard 1099511627776) became" in text
    assert report["limits"][7][0] == 5000
    assert report["limits"][4] == [0, 0]
    assert "uids (0, 0, 0, 0) became (65534, 65534, 65534, 65534)" in text
    assert "permitted" in text


def test_power_is_dropped_under_locked_securebits(program: Path, tmp_path: Path) -> None:
    with running(program, "creds", tmp_path) as victim:
        process = capture(victim.pid)
    process = changed(process, "credentials", Credentials, permitted=0, effective=0, ambient=0)
    with running(program, "blank", tmp_path) as other:
        with freeze(other.pid) as frozen:
            pr_set_securebits, no_setuid_fixup_locked = 28, 1 << 2 | 1 << 3
            frozen.remote.call(NR.prctl, pr_set_securebits, no_setuid_fixup_locked, 0, 0, 0)
        warnings = rebuild(process, other.pid)
        leader = other.ask("report")["threads"][0]
    assert leader["permitted"] == [0, 0]
    assert leader["uids"][:3] == [1001, 1002, 1003]
    assert any("securebits 0x44 became 0xc" in warning for warning in warnings)


def test_never_more_power_than_before(program: Path, tmp_path: Path) -> None:
    """A thread that cannot give up its power is no warning but an error: here uid 0 without any
    capability, which cannot become anybody else."""
    with running(program, "creds", tmp_path) as victim:
        process = capture(victim.pid)
    with running(program, "blank", tmp_path) as other:
        with freeze(other.pid) as frozen:
            version_3 = bytes.fromhex("2205082000000000")
            header = frozen.remote.put(version_3 + bytes(24))
            frozen.remote.call(NR.capset, header, header + len(version_3))
        with pytest.raises(RestoreError, match="would run as root"):
            rebuild(process, other.pid)


def test_stopped(program: Path, tmp_path: Path) -> None:
    with running(program, "state", tmp_path) as victim:
        os.kill(victim.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, victim.pid, os.WSTOPPED)
        process = capture(victim.pid)
        assert procfs.status(victim.pid).state == "T"
    assert process.stopped
    with running(program, "blank", tmp_path) as other:
        rebuild(process, other.pid)
        os.waitid(os.P_PID, other.pid, os.WSTOPPED)
        assert procfs.status(other.pid).state == "T"
        os.kill(other.pid, signal.SIGCONT)
        assert other.ask("report")["cwd"] == str(tmp_path)


def test_unprivileged(program: Path) -> None:
    """A user's own process, captured and rebuilt without any capability: nothing is lost."""

    def as_nobody() -> None:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        with running(program, "blank", Path("/")) as victim:
            expected = victim.ask("report")
            process = capture(victim.pid)
            assert victim.ask("report") == expected
        with running(program, "blank", Path("/")) as other:
            assert rebuild(process, other.pid) == []
            assert other.ask("report") == expected

    pid = os.fork()
    if not pid:
        try:
            as_nobody()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_signal_that_comes_in_the_pause_has_its_value(program: Path, tmp_path: Path) -> None:
    """Whenever it comes: what waits is in the image as it was sent, or not at all."""
    libc = ctypes.CDLL(None)
    info = struct.pack("<iiiiIIq", signal.SIGURG, 0, SI_QUEUE, 0, os.getpid(), 0, 42)
    with running(program, "blank", tmp_path) as victim, freeze(victim.pid) as frozen:
        gathered = gather(frozen)
        # Ignored, but a traced process has it queued.
        libc.syscall(NR.rt_sigqueueinfo, victim.pid, signal.SIGURG, info.ljust(128, b"\0"))
        thread = frozen.threads[0].tid
        libc.syscall(
            *(NR.rt_tgsigqueueinfo, victim.pid, thread, signal.SIGURG), info.ljust(128, b"\0")
        )
        gathered.complete()
    process = gathered.process(0, mappings=())
    for queue in (process.pending, process.threads[0].pending):
        assert [one[: len(info)] for one in queue] == [info]


def test_many_pending_signals(program: Path, tmp_path: Path) -> None:
    """More than fit in one round of injected calls."""
    with running(program, "state", tmp_path) as victim:
        process = capture(victim.pid)
    infos = tuple(
        (35).to_bytes(4, "little")
        + bytes(4)
        + (-1).to_bytes(4, "little", signed=True)
        + bytes(12)
        + number.to_bytes(8, "little")
        + bytes(96)
        for number in range(1000)
    )
    process = replace(process, pending=infos)
    with running(program, "blank", tmp_path) as other:
        rebuild(process, other.pid)
        signals = other.ask("drain")["threads"][0]["signals"]
    assert [one[4] for one in signals if one[0] == 35] == list(range(1000))


def test_traps_that_wait(program: Path, tmp_path: Path) -> None:
    """Injected calls end in a trap of their own, which must not be taken for these."""

    def info(value: int) -> bytes:
        head = struct.pack("<iiiiiiQ", signal.SIGTRAP, 0, -1, 0, 1, 2, value)
        return head.ljust(128, b"\0")

    for mode in ("blank", "state"):  # SIGTRAP at its default, and ignored
        with running(program, mode, tmp_path) as victim:
            process = capture(victim.pid)
        leader, first, *others = process.threads
        blocked = (1 << 64) - 1
        threads = (
            replace(leader, signal_mask=blocked),
            replace(first, pending=(info(7),), signal_mask=blocked),
            *(replace(other, signal_mask=blocked) for other in others),
        )
        process = replace(process, pending=(info(8),), threads=threads)
        with running(program, "blank", tmp_path) as other:
            assert rebuild(process, other.pid) == []
            assert other.ask("report")["actions"][4][0] == (mode == "state")
            answers = other.ask("drain")["threads"]
        assert [one[4] for one in answers[1]["signals"] if one[0] == 5] == [7]
        assert [one[4] for one in answers[0]["signals"] if one[0] == 5] == [8]


CONFINED = """
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
code = struct.pack("<HBBI", 0x20, 0, 0, 0)  # A = system call number
code += struct.pack("<HBBI", 0x15, 0, 1, 36)  # getitimer:
code += struct.pack("<HBBI", 0x06, 0, 0, 0x80000000)  # kill the process
code += struct.pack("<HBBI", 0x06, 0, 0, 0x7FFF0000)  # allow
buffer = ctypes.create_string_buffer(code)
program = struct.pack("<H6xQ", 4, ctypes.addressof(buffer))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, program, 0, 0) == 0
print("ready", flush=True)
input()
print("alive", flush=True)
"""


def test_seccomp_is_said_and_not_met(program: Path, tmp_path: Path) -> None:
    """A filter that kills for a call that a capture makes; a restore without it has a warning."""
    command = [sys.executable, "-c", CONFINED]
    confined = subprocess.Popen(command, stdin=-1, stdout=-1, text=True)
    try:
        assert confined.stdout is not None
        assert confined.stdout.readline() == "ready\n"
        (warning,) = preflight.warnings(confined.pid)
        assert "WITHOUT" in warning
        with freeze(confined.pid) as frozen:
            gathered = gather(frozen)
            gathered.complete()
        assert gathered.warnings() == [warning]
        answer, _ = confined.communicate("\n", timeout=30)
        assert answer == "alive\n"
        assert confined.returncode == 0
    finally:
        confined.kill()
        confined.communicate()
    who = unpack(gathered.threads()[0].state["credentials"], Credentials)
    assert who.seccomp == 2
    with running(program, "blank", tmp_path) as victim:
        process = changed(capture(victim.pid), "credentials", Credentials, seccomp=2)
    with running(program, "blank", tmp_path) as other:
        (warning,) = rebuild(process, other.pid)
    assert "WITHOUT" in warning


def test_preflight() -> None:
    assert preflight.unsupported(os.getpid()) == []
    assert preflight.warnings(os.getpid()) == []
    sleep = ["unshare", "--user", "--map-root-user", "--mount", "--uts", "sh", "-c"]
    process = subprocess.Popen([*sleep, "echo ready; read x"], stdin=-1, stdout=-1, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        (thing,) = preflight.unsupported(process.pid)
        assert "user namespace" in thing
        texts = preflight.warnings(process.pid)
        assert len(texts) == 2
        assert "mnt" in texts[0]
        assert "uts" in texts[1]
    finally:
        process.kill()
        process.communicate()
