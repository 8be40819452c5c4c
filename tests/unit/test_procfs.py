"""Reading /proc: hostile names, processes that are gone, kernel threads, zombies, deleted files."""

import ctypes
import mmap
import os
import resource
from pathlib import Path

import pytest

from snapshot.errors import DeniedError, TargetError
from snapshot.kernel import procfs

PR_SET_NAME = 15


def set_name(name: bytes) -> None:
    ctypes.CDLL(None).prctl(PR_SET_NAME, name, 0, 0, 0)


@pytest.mark.parametrize(
    "name", [b"plain", b"a) R (b c", b") S 1 2", b"new\nline", b"\xff \\x", b""]
)
def test_comm_and_stat(name: bytes) -> None:
    before = procfs.comm(os.getpid())
    set_name(name)
    try:
        found = procfs.stat(os.getpid())
        assert procfs.comm(os.getpid()) == name
        status = procfs.status(os.getpid())
    finally:
        set_name(before)
    assert found.comm == name
    assert found.pid == os.getpid()
    assert found.ppid == os.getppid() == status.number("PPid")
    assert found.pgid == os.getpgid(0)
    assert found.sid == os.getsid(0)
    assert found.nice == os.nice(0)
    assert found.state in "RS"


def test_layout_of_stat() -> None:
    text = b"7 (a) b) S " + b" ".join(b"%d" % field for field in range(4, 53)) + b"\n"
    found = procfs.parse_stat(text)
    assert found.comm == b"a) b"
    assert (found.ppid, found.pgid, found.sid, found.tty) == (4, 5, 6, 7)
    assert (found.priority, found.nice, found.start_ticks) == (18, 19, 22)
    assert (found.start_code, found.end_code, found.start_stack) == (26, 27, 28)
    assert (found.rt_priority, found.policy) == (40, 41)
    assert (found.start_data, found.end_data, found.start_brk) == (45, 46, 47)
    assert (found.arg_start, found.arg_end, found.env_start, found.env_end) == (48, 49, 50, 51)


def test_status() -> None:
    status = procfs.status(os.getpid())
    assert status.uids == (*os.getresuid(), os.geteuid())
    assert status.gids == (*os.getresgid(), os.getegid())
    assert set(status.groups) == set(os.getgroups())
    mask = os.umask(0o027)
    try:
        assert procfs.status(os.getpid()).umask == 0o027
    finally:
        os.umask(mask)
    assert status.namespace_pids[-1] == os.getpid()
    assert not status.kernel_thread
    assert status.mask("SigCgt") & (1 << 1)  # Python handles SIGINT


def test_limits() -> None:
    found = procfs.limits(os.getpid())
    assert sorted(found) == list(range(16))
    for number, pair in found.items():
        assert tuple(value % (1 << 64) for value in resource.getrlimit(number)) == pair


def test_cmdline_threads_auxv() -> None:
    assert procfs.cmdline(os.getpid())[0] == Path("/proc/self/cmdline").read_bytes().split(b"\0")[0]
    assert procfs.threads(os.getpid())[0] == os.getpid()
    assert procfs.auxv(os.getpid())[-16:-8] == bytes(8)
    assert len(procfs.boot_id()) == 36


def gone() -> int:
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_gone() -> None:
    pid = gone()
    for read in (procfs.stat, procfs.status, procfs.maps, procfs.threads, procfs.auxv):
        with pytest.raises(TargetError, match=str(pid)):
            read(pid)


def test_zombie() -> None:
    pid = os.fork()
    if not pid:
        os._exit(0)
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert procfs.stat(pid).state == "Z"
        assert not procfs.status(pid).kernel_thread
        assert procfs.maps(pid) == []
        with pytest.raises(TargetError, match="zombie"):
            procfs.link(pid, "exe")
    finally:
        os.waitpid(pid, 0)


def test_denied() -> None:
    if os.geteuid() == 0:
        pid = os.fork()
        if not pid:
            os.setuid(65534)
            try:
                procfs.maps(1)
            except DeniedError:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    else:
        with pytest.raises(DeniedError):
            procfs.maps(1)


@pytest.mark.skipif(os.geteuid() != 0, reason="map_files needs CAP_CHECKPOINT_RESTORE: run as root")
@pytest.mark.parametrize("name", ["plain", "x (deleted)", "a\nb", "back\\012slash"])
@pytest.mark.parametrize("unlinked", [False, True])
def test_mapped_path(tmp_path: Path, name: str, unlinked: bool) -> None:
    file = tmp_path / name
    file.write_bytes(b"x" * 4096)
    if name == "x (deleted)":
        (tmp_path / "x").write_bytes(b"another file")
    with file.open("rb") as opened:
        inode = os.fstat(opened.fileno()).st_ino
        area = mmap.mmap(opened.fileno(), 4096, prot=mmap.PROT_READ)
    if unlinked:
        file.unlink()
    (line,) = [one for one in procfs.maps(os.getpid()) if one.inode == inode and one.offset == 0]
    found = procfs.mapped_path(os.getpid(), line)
    area.close()
    assert procfs.mapped_path(os.getpid(), line) is None
    assert found is not None
    assert found.path == os.fsencode(file)
    assert found.named is not unlinked
    assert found.stat.st_ino == inode


@pytest.mark.skipif(os.geteuid() != 0, reason="chroot and map_files need root: run as root")
def test_mapped_path_in_a_chroot(tmp_path: Path) -> None:
    """The kernel prints it as seen from our root, and it has its name."""
    file = tmp_path / "mapped"
    file.write_bytes(b"x" * 4096)
    inode = file.stat().st_ino
    ready, child_ready = os.pipe()
    go, child_go = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(child_go)
        with file.open("rb") as opened:
            area = mmap.mmap(opened.fileno(), 4096, prot=mmap.PROT_READ)
        os.chroot(tmp_path)
        os.write(child_ready, b"x")
        os.read(go, 1)
        area.close()
        os._exit(0)
    os.read(ready, 1)
    try:
        (line,) = [one for one in procfs.maps(pid) if one.inode == inode]
        found = procfs.mapped_path(pid, line)
    finally:
        for fd in (ready, child_ready, go, child_go):
            os.close(fd)
        os.waitpid(pid, 0)
    assert found is not None
    assert found.path == os.fsencode(file)
    assert found.named
