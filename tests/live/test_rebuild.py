"""A process is stopped, copied whole and killed; what is rebuilt from the copy goes on."""

from __future__ import annotations

import mmap
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

import pytest

from snapshot.errors import RestoreError, SnapError
from snapshot.kernel import procfs
from snapshot.kernel.arch_x86_64 import NO_SYSCALL, Registers
from snapshot.manifest import Mapping, Thread
from snapshot.maps import Line, parse_smaps
from snapshot.rebuild import final_registers
from snapshot.restore import Restored, restore
from tests.harness.processes import become_subreaper, wait_until
from tests.harness.victims import Victim, c_victim, python_app
from tests.live.servers import await_end
from tests.live.stopped_copy import StoppedCopy, copy

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sudo pytest tests/live"),
]
Modes = pytest.mark.parametrize("mode", ["eager", "lazy"])
Pids = pytest.mark.parametrize("pid", ["keep", "new"])
Pid = Literal["keep", "new"]


@pytest.fixture(autouse=True, scope="module")
def _reaps() -> None:
    become_subreaper()


@pytest.fixture(autouse=True)
def _no_server_stays() -> Iterator[None]:
    yield
    await_end()


@pytest.fixture
def again(tmp_path: Path) -> Iterator[Callable[..., Restored]]:
    """Restores a copy; what was restored ends with the test."""
    made: list[Restored] = []

    def run(copied: StoppedCopy, mode: str = "eager", pid: Pid = "keep") -> Restored:
        name = f"{mode}-{pid}-{len(made)}"
        with copied.put(tmp_path / name) as image:
            restored = restore(image, lazy=mode == "lazy", pid=pid)
        made.append(restored)
        assert restored.mode == mode
        return restored

    yield run
    for restored in made:
        end(restored)


def end(restored: Restored) -> None:
    with suppress(ProcessLookupError):
        os.kill(restored.pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        restored.wait()
    restored.complete()


VICTIMS: dict[str, Callable[[Path], Victim]] = {
    "threads16": lambda path: c_victim(path, "threads16"),
    "writer": lambda path: c_victim(path, "writer"),
    "python": lambda path: python_app(path),
}


@Modes
@Pids
@pytest.mark.parametrize("name", VICTIMS)
def test_it_goes_on(
    name: str, mode: str, pid: Pid, tmp_path: Path, again: Callable[..., Restored]
) -> None:
    victim = VICTIMS[name](tmp_path)
    try:
        victim.goes_on()
        copied = copy(victim.pid)
        victim.kill()
        before = victim.status()
        restored = again(copied, mode, pid)
        assert restored.warnings == []
        assert (restored.pid == victim.process.pid) == (pid == "keep")
        victim.became(restored.pid)
        after = victim.goes_on()
        assert after.pid == before.pid  # what the process itself sees
        if name != "threads16":
            victim.verify()
        assert restored.complete() is None
        victim.goes_on()
    finally:
        victim.kill()


@Modes
def test_mappings_and_memory_are_those_of_the_image(
    mode: str, tmp_path: Path, again: Callable[..., Restored]
) -> None:
    """Line by line, and every page, while the restored process is stopped again."""
    victim = c_victim(tmp_path, "edges")
    try:
        copied = copy(victim.pid)
        victim.kill()
        restored = again(copied, mode)
        assert restored.complete() is None
        victim.became(restored.pid)
        second = copy(restored.pid)
        assert shape(second) == shape(copied)
    finally:
        victim.kill()


Area = tuple[int, int, tuple[object, ...]]
"""Start, end and what else it is."""


def without_boundaries(areas: Iterable[tuple[Area, bool]]) -> list[Area]:
    """Whether each is anonymous is said as well: of two such neighbours that are alike, which the
    kernel would make one of, there may have been two anon_vma, which a new process has not."""
    found: list[Area] = []
    for (start, end, what), anonymous in areas:
        if anonymous and found and found[-1][1:] == (start, what):
            start = found.pop()[0]
        found.append((start, end, what))
    return found


def shape(copied: StoppedCopy) -> list[Area]:
    """Of each mapping what a restore must bring back. The kernel adds and removes some flags by
    itself: "sd" (soft-dirty), "ac" (accounted) of memory that cannot be written."""
    found: list[tuple[Area, bool]] = []
    for mapping in copied.manifest.processes[0].mappings:
        flags = frozenset(mapping.vm_flags) - {"sd"}
        if mapping.kind == "anon" and not mapping.prot & 2:
            flags -= {"ac"}  # lost by mprotect of memory that is still empty
        name = b"" if mapping.object is not None else mapping.name
        what = (mapping.prot, mapping.shared, mapping.kind, mapping.offset, name, flags)
        found.append(((mapping.start, mapping.end, what), mapping.kind == "anon"))
    return without_boundaries(found)


def test_the_same_image_five_times(tmp_path: Path, again: Callable[..., Restored]) -> None:
    victim = c_victim(tmp_path, "threads16")
    try:
        copied = copy(victim.pid)
        victim.kill()
        for _ in range(5):
            restored = again(copied)
            victim.became(restored.pid)
            victim.goes_on()
            end(restored)
    finally:
        victim.kill()


def test_a_copy_of_a_restored_process(tmp_path: Path, again: Callable[..., Restored]) -> None:
    victim = python_app(tmp_path)
    try:
        copied = copy(victim.pid)
        victim.kill()
        for mode in ("lazy", "eager", "lazy"):
            restored = again(copied, mode)
            victim.became(restored.pid)
            victim.goes_on()
            assert restored.complete() is None
            copied = copy(restored.pid)
            end(restored)
    finally:
        victim.kill()


def test_exit_status(tmp_path: Path, again: Callable[..., Restored]) -> None:
    script = "import os, time\nwhile not os.path.exists('end'): time.sleep(0.01)\nos._exit(7)"
    with python(script, tmp_path) as victim:
        copied = copied_and_killed(victim)
    for pid in ("keep", "new"):
        restored = again(copied, pid=pid)
        (tmp_path / "end").touch()
        assert restored.wait() == 7
        (tmp_path / "end").unlink()


def test_a_signal_ends_it(tmp_path: Path, again: Callable[..., Restored]) -> None:
    with python("import time\nwhile True: time.sleep(100)", tmp_path) as victim:
        copied = copied_and_killed(victim)
    for pid, expected in (("keep", -signal.SIGTERM), ("new", 128 + signal.SIGTERM)):
        restored = again(copied, pid=pid)
        os.kill(restored.pid, signal.SIGTERM)
        assert restored.wait() == expected


def python(script: str, directory: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-S", "-c", script], cwd=directory, stdin=subprocess.DEVNULL
    )


def copied_and_killed(victim: subprocess.Popen[bytes]) -> StoppedCopy:
    at_rest(victim)
    copied = copy(victim.pid)
    victim.kill()
    victim.wait()
    return copied


def at_rest(victim: subprocess.Popen[bytes]) -> None:
    """Until it sleeps in a system call, not for a disk: it may still be importing then."""
    pattern = re.compile(r"^(230|35|34|0|7) ")
    path = Path(f"/proc/{victim.pid}/syscall")

    def sleeps() -> bool:
        return bool(pattern.match(path.read_text())) and procfs.status(victim.pid).state == "S"

    wait_until(sleeps, "a sleeping victim")


def test_a_pid_in_use(tmp_path: Path, again: Callable[..., Restored]) -> None:
    with python("import time\nwhile True: time.sleep(100)", tmp_path) as victim:
        try:
            copied = copy(victim.pid)
            with pytest.raises(RestoreError) as caught:
                again(copied)
            assert f"pid {victim.pid} is in use by process {victim.pid}" in caught.value.message
            assert caught.value.hint.endswith("--pid new")
            restored = again(copied, pid="new")
            assert restored.pid != victim.pid
        finally:
            victim.kill()


@Modes
def test_changed_and_missing_files_are_all_named(mode: str, tmp_path: Path) -> None:
    script = (
        "import mmap, time\n"
        "files = [open(name) for name in 'abc']\n"
        "maps = [mmap.mmap(file.fileno(), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ)"
        " for file in files]\n"
        "[file.close() for file in files]\n"
        "while True: time.sleep(100)"
    )
    for name in "abc":
        (tmp_path / name).write_bytes(bytes(4096))
    with python(script, tmp_path) as victim:
        copied = copied_and_killed(victim)
    with copied.put(tmp_path / "store") as image:
        assert image.manifest
        (tmp_path / "a").unlink()
        (tmp_path / "b").write_bytes(bytes(5000))
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(RestoreError) as caught:
            restore(image, lazy=mode == "lazy")
        assert set(os.listdir("/proc/self/fd")) <= before
    assert f"{tmp_path}/a: No such file" in caught.value.message
    assert f"{tmp_path}/b: 5000 bytes now, 4096 at T0" in caught.value.message
    assert f"{tmp_path}/c" not in caught.value.message
    assert not Path(f"/proc/{victim.pid}").exists()


def test_a_failing_hook_leaves_nothing(tmp_path: Path) -> None:
    from snapshot.errors import HookError
    from snapshot.hooks import Hooks

    seen: list[tuple[str, int]] = []

    def refuse(context: object) -> None:
        raise ValueError("no")

    hooks = Hooks(
        {"before-restore": lambda c: seen.append((c.stage, c.pid)), "rebuilt": refuse},
        installed=False,
    )
    with python("import time\nwhile True: time.sleep(100)", tmp_path) as victim:
        copied = copied_and_killed(victim)
    for mode in ("eager", "lazy"):
        with copied.put(tmp_path / mode) as image, pytest.raises(HookError):
            restore(image, lazy=mode == "lazy", hooks=hooks)
        assert not Path(f"/proc/{victim.pid}").exists()
    assert seen == [("before-restore", 0)] * 2


@Modes
def test_hooks_run_in_order(mode: str, tmp_path: Path) -> None:
    from snapshot.hooks import RESTORE_STAGES, Hooks

    seen: list[str] = []
    hooks = Hooks({stage: lambda c: seen.append(c.stage) for stage in RESTORE_STAGES})
    with python("import time\nwhile True: time.sleep(100)", tmp_path) as victim:
        copied = copied_and_killed(victim)
    with copied.put(tmp_path / "store") as image:
        restored = restore(image, lazy=mode == "lazy", hooks=hooks)
    try:
        wait_until(lambda: len(seen) == 4, "the last hook")
        assert seen == list(RESTORE_STAGES)
    finally:
        end(restored)


def test_shared_memory_is_shared_again(tmp_path: Path, again: Callable[..., Restored]) -> None:
    """Two windows of one memfd, shared anonymous memory, a file on tmpfs: a write through one
    window shows in the other."""
    script = """
import mmap, os, time
fd = os.memfd_create("window")
os.ftruncate(fd, 8192)
one, two = mmap.mmap(fd, 8192), mmap.mmap(fd, 4096, offset=4096)
shared = mmap.mmap(-1, 3 * 4096)
shared[:5] = b"hello"
path = "/dev/shm/snap-test-" + str(os.getpid())
file = os.open(path, os.O_RDWR | os.O_CREAT)
os.ftruncate(file, 4096)
tmpfs = mmap.mmap(file, 4096)
tmpfs[:4] = b"tmp0"
one[4096:4100] = b"same"
while not os.path.exists("go"): time.sleep(0.01)
one[4100:4103] = b"new"
found = two[:7] + shared[:5] + tmpfs[:4] + os.pread(fd, 7, 4096) + os.pread(file, 4, 0)
open("result", "wb").write(found)
os.unlink(path)
while True: time.sleep(100)
"""
    with python(script, tmp_path) as victim:
        copied = copied_and_killed(victim)
    path = Path(f"/dev/shm/snap-test-{victim.pid}")
    try:
        path.write_bytes(b"else" * 1024)  # after T0: the bytes of T0 come back
        restored = again(copied)
        assert restored.warnings == []
        (tmp_path / "go").touch()
        wait_until((tmp_path / "result").exists, "the result")
        expected = b"samenew" + b"hello" + b"tmp0" + b"samenew" + b"tmp0"
        assert (tmp_path / "result").read_bytes() == expected
    finally:
        path.unlink(missing_ok=True)


def test_flags_names_and_advice_come_back(tmp_path: Path, again: Callable[..., Restored]) -> None:
    script = """
import ctypes, mmap, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
def area(prot=3, flags=0x22, pages=4):
    return libc.mmap(None, ctypes.c_size_t(pages * 4096), prot, flags, -1, 0)
def advise(at, what): assert libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(16384), what) == 0
keep = []
for advice in (10, 14, 15, 16, 18, 1, 2):
    keep.append(area()); advise(keep[-1], advice)
    area(prot=0)
locked = area(); assert libc.mlock(ctypes.c_void_p(locked), ctypes.c_size_t(16384)) == 0
area(prot=0)
grows = area(flags=0x122); area(prot=0)
spare = area(flags=0x4022); area(prot=0)
named = area()
libc.prctl(0x53564d41, 0, ctypes.c_void_p(named), ctypes.c_size_t(16384), b"my memory")
while True: time.sleep(100)
"""
    with python(script, tmp_path) as victim:
        copied = copied_and_killed(victim)
    # Its name is compared as well, on kernels with CONFIG_ANON_VMA_NAME.
    assert {"dc", "hg", "nh", "dd", "wf", "rr", "sr", "lo", "gd", "nr"} <= flags_of(copied)
    restored = again(copied)
    assert shape(copy(restored.pid)) == shape(copied)


def flags_of(copied: StoppedCopy) -> set[str]:
    mappings: tuple[Mapping, ...] = copied.manifest.processes[0].mappings
    return {flag for mapping in mappings for flag in mapping.vm_flags}


@Modes
def test_many_mappings(mode: str, tmp_path: Path, again: Callable[..., Restored]) -> None:
    """More than fit into one message or one batch."""
    script = """
import mmap, os, time
areas = [mmap.mmap(-1, 8192, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 1 + 2 * (n % 2)) for n in
         range(16000)]
for n in range(1, 16000, 2):
    areas[n][:8] = n.to_bytes(8, "little")
while not os.path.exists("go"): time.sleep(0.01)
right = all(areas[n][:8] == (n * (n % 2)).to_bytes(8, "little") for n in range(16000))
open("result", "w").write(str(right))
while True: time.sleep(100)
"""
    with python(script, tmp_path) as victim:
        copied = copied_and_killed(victim)
    assert len(copied.manifest.processes[0].mappings) > 8000
    again(copied, mode)
    (tmp_path / "go").touch()
    wait_until((tmp_path / "result").exists, "the result")
    wait_until(lambda: bool((tmp_path / "result").read_text()), "the result")
    assert (tmp_path / "result").read_text() == "True"


def test_proc_shows_the_same(tmp_path: Path, again: Callable[..., Restored]) -> None:
    with python("import time\nwhile True: time.sleep(100)", tmp_path) as victim:
        at_rest(victim)
        before = shown(victim.pid)
        copied = copied_and_killed(victim)
    restored = again(copied)
    assert shown(restored.pid) == before


def shown(pid: int) -> dict[str, object]:
    status = Path(f"/proc/{pid}/status").read_text()
    kept = re.findall(
        r"^((?:Name|Umask|Uid|Gid|Groups|Sig\w+|Cap\w+|NoNewPrivs|Seccomp):.*)", status
    )
    return {
        "status": kept,
        "comm": Path(f"/proc/{pid}/comm").read_text(),
        "cmdline": Path(f"/proc/{pid}/cmdline").read_bytes(),
        "environ": Path(f"/proc/{pid}/environ").read_bytes(),
        "auxv": Path(f"/proc/{pid}/auxv").read_bytes(),
        "exe": os.readlink(f"/proc/{pid}/exe"),
        "cwd": os.readlink(f"/proc/{pid}/cwd"),
        "limits": Path(f"/proc/{pid}/limits").read_text(),
    }


def joined(mappings: Iterable[Mapping | Line]) -> list[Area]:
    """Protection and name of each."""
    return without_boundaries(
        ((one.start, one.end, (one.prot, one.name)), not one.inode) for one in mappings
    )


def test_nothing_of_the_stub_stays(tmp_path: Path, again: Callable[..., Restored]) -> None:
    with python("import time\nwhile True: time.sleep(100)", tmp_path) as victim:
        copied = copied_and_killed(victim)
    restored = again(copied)
    status = Path(f"/proc/{restored.pid}/status").read_text()
    assert "TracerPid:\t0\n" in status
    lines = parse_smaps(Path(f"/proc/{restored.pid}/smaps").read_bytes())
    assert joined(lines) == joined(copied.manifest.processes[0].mappings)
    descriptors = {one.fd for one in copied.manifest.processes[0].descriptors}
    assert set(map(int, os.listdir(f"/proc/{restored.pid}/fd"))) == descriptors


CODE = bytes.fromhex("4989ca b823000000 0f05".replace(" ", "")).rjust(64, b"\x90")
"""mov r10, rcx; mov eax, 35 (nanosleep); syscall: ends at 0x1040"""


def read(address: int, length: int) -> bytes:
    assert 0x1000 <= address <= address + length <= 0x1040
    return CODE[address - 0x1000 :][:length]


def thread(rax: int, orig_rax: int, rip: int = 0x1040) -> Thread:
    registers = Registers(*[0] * 27)._replace(
        rax=rax & NO_SYSCALL, orig_rax=orig_rax & NO_SYSCALL, rip=rip
    )
    return Thread(tid=1, comm=b"", registers=registers.pack(), xstate=b"", signal_mask=0)


@pytest.mark.parametrize("result", [-512, -513, -514, -4, 0, 5])
def test_the_kernel_restarts_these_by_itself(result: int) -> None:
    one = thread(result, 0)
    assert final_registers(one, read) == one.registers


@pytest.mark.parametrize("number", [35, 219])
def test_a_call_with_a_restart_block_is_made_again(number: int) -> None:
    """Also one that was restarted before and is in restart_syscall (219) now."""
    found = Registers.unpack(final_registers(thread(-516, number), read))
    assert (found.rax, found.rip, found.orig_rax) == (35, 0x103E, NO_SYSCALL)


@pytest.mark.parametrize("number", [35, -1])
def test_a_restart_that_was_prepared_is_undone(number: int) -> None:
    found = Registers.unpack(final_registers(thread(219, number, 0x103E), read))
    assert (found.rax, found.rip, found.orig_rax) == (35, 0x103E, NO_SYSCALL)


def test_219_elsewhere_is_only_a_number() -> None:
    one = thread(219, -1, 0x1020)
    assert final_registers(one, read) == one.registers


def test_an_image_of_another_kernel_is_refused(
    tmp_path: Path, again: Callable[..., Restored]
) -> None:
    import msgspec

    with python("import time\nwhile True: time.sleep(100)", tmp_path) as victim:
        copied = copied_and_killed(victim)
    host = msgspec.structs.replace(copied.manifest.host, vdso=b"x" * 16, machine="aarch64")
    copied.manifest = msgspec.structs.replace(copied.manifest, host=host)
    with pytest.raises(SnapError, match=r"aarch64[\s\S]*vdso"):
        again(copied)
    assert mmap.PAGESIZE == 4096
