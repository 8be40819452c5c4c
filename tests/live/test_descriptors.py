"""Descriptors of a live process, captured while it is stopped and placed in a second process.

Files, devices, pipes and what is in them; sockets are in test_sockets.py.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from snapshot.errors import RestoreError
from snapshot.freeze import freeze
from snapshot.kernel.reading import Reading
from snapshot.manifest import unpack
from snapshot.resources import descriptors, eventfd
from tests.harness.processes import wait_until

from .interpreters import Interpreter, captured, pidfd_of, rebuilt

pytestmark = pytest.mark.live


def flags(process: Interpreter, fd: int) -> int:
    value: int = process.ask(f"fcntl.fcntl({fd}, fcntl.F_GETFL)")
    return value


def cloexec(process: Interpreter, fd: int) -> bool:
    return not process.ask(f"os.get_inheritable({fd})")


def link(process: Interpreter, fd: int) -> str:
    value: str = process.ask(f"os.readlink('/proc/self/fd/{fd}')")
    return value


def opened(process: Interpreter) -> set[int]:
    """All its descriptors."""
    return {int(name) for name in os.listdir(f"/proc/{process.pid}/fd")}


def readable(process: Interpreter, fd: int) -> bool:
    return bool(process.ask(f"select.select([{fd}], [], [], 0)[0]"))


def remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink()


# --- files ---------------------------------------------------------------------------------------


def test_files_flags_offsets_and_sharing(tmp_path: Path) -> None:
    path = tmp_path / "a file"
    path.write_bytes(b"0123456789")
    with Interpreter() as target:
        target.run(f"""
a = os.open({str(path)!r}, os.O_RDWR | os.O_CREAT)
b = os.dup2(a, 20)
c = os.open({str(path)!r}, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
os.lseek(a, 4, 0)
os.set_inheritable(20, True)
""")
        fds = {name: target.ask(name) for name in "abc"}
        with rebuilt(target) as new:
            for fd in fds.values():
                assert flags(new, fd) == flags(target, fd)
                assert cloexec(new, fd) == cloexec(target, fd)
                assert link(new, fd) == str(path)
            assert new.ask(f"os.read({fds['a']}, 2)") == b"45"
            assert new.ask(f"os.lseek({fds['b']}, 0, 1)") == 6
            assert new.ask(f"os.lseek({fds['c']}, 0, 1)") == 0
            assert opened(new) == {0, 1, 2, *fds.values()}
            assert new.context.warnings == []
        assert target.ask("os.lseek(a, 0, 1)") == 4


def test_a_table_is_understood_when_the_process_runs_on(tmp_path: Path) -> None:
    """Where nothing has to be asked: it is as it was, whatever the process has done since."""
    (tmp_path / "data").write_bytes(b"0123456789")
    code = """
import os
a = os.open("data", os.O_RDONLY)
os.lseek(a, 4, os.SEEK_SET)
b, c = os.dup(a), os.eventfd(7)
os.open("data", os.O_RDONLY)
os.rename("begin", "begun")
while not os.path.exists("go"):
    os.sched_yield()
os.lseek(a, 0, os.SEEK_SET)
os.eventfd_write(c, 1)
os.closerange(0, 100)
os.rename("begun", "closed")
while True:
    os.sched_yield()
"""
    (tmp_path / "begin").touch()
    null = subprocess.DEVNULL
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=null, stdout=null, stderr=null, cwd=tmp_path
    )
    try:
        wait_until((tmp_path / "begun").exists, "its files to be open")
        with freeze(process.pid) as frozen:
            reading = Reading(process.pid, [], 1)
            run, of = reading.errand
            run(of)
            table = descriptors.Capture(process.pid, frozen.pidfd, reading)
            table.ask()
            assert (table.needed, table.problems, table.direct_io) == ({}, [], False)
        (tmp_path / "go").touch()
        wait_until((tmp_path / "closed").exists, "it to close them")
        files, fds = table.complete()
        assert table.problems == []
        kinds = {file.id: file for file in files}
        found = {one.fd: kinds[one.file] for one in fds}
        assert [(found[fd].kind, found[fd].offset) for fd in (3, 4, 6)] == [
            *[("files", 4), ("files", 4), ("files", 0)]
        ]
        assert (found[3] is found[4], found[3] is found[6]) == (True, False)
        assert unpack(found[5].state, eventfd.State) == eventfd.State(count=7)
    finally:
        process.kill()
        process.wait()


def test_a_deleted_file_keeps_its_bytes(tmp_path: Path) -> None:
    with Interpreter() as target:
        target.run(f"""
path = {str(tmp_path / "gone")!r}
a = os.open(path, os.O_RDWR | os.O_CREAT)
b = os.open(path, os.O_RDONLY)
os.write(a, b"start")
os.pwrite(a, b"end", 5_000_000)
os.unlink(path)
""")
        a, b = target.ask("a"), target.ask("b")
        with rebuilt(target) as new:
            assert new.ask(f"os.fstat({a}).st_size") == 5_000_003
            assert new.ask(f"os.fstat({a}).st_nlink") == 0
            assert new.ask(f"os.fstat({a}).st_blocks * 512") < 1_000_000
            assert new.ask(f"os.pread({b}, 8, 0)") == b"start\0\0\0"
            assert new.ask(f"os.pread({a}, 9, 5_000_000)") == b"end"
            assert new.ask(f"os.lseek({a}, 0, 1), os.lseek({b}, 0, 1)") == (5, 0)
            new.run(f"os.pwrite({a}, b'S', 0)")
            assert new.ask(f"os.pread({b}, 5, 0)") == b"Start"
        assert target.ask("os.pread(a, 5, 0)") == b"start"


def test_a_large_deleted_file_is_refused(tmp_path: Path) -> None:
    with Interpreter() as target:
        target.run(f"""
path = {str(tmp_path / "gone")!r}
a = os.open(path, os.O_RDWR | os.O_CREAT)
for i in range(65):
    os.write(a, bytes(1 << 20))
os.unlink(path)
""")
        (reason,) = captured(target).cannot
        assert "deleted" in reason
        assert "65.0 MiB" in reason


def test_missing_files_are_listed_together(tmp_path: Path) -> None:
    names = [tmp_path / "one", tmp_path / "two"]
    with Interpreter() as target:
        for name in names:
            name.touch()
            target.run(f"os.open({str(name)!r}, os.O_RDONLY)")
        before = set(os.listdir("/proc/self/fd"))
        with (
            pytest.raises(RestoreError) as error,
            rebuilt(target, lambda: remove(names)),
        ):
            pass
        assert all(str(name) in error.value.message for name in names)
        assert set(os.listdir("/proc/self/fd")) == before


def test_a_missing_log_of_stderr_becomes_that_of_the_restore(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Interpreter() as target:
        target.run(f"os.dup2(os.open({str(log)!r}, os.O_WRONLY | os.O_CREAT), 2)")
        target.run("os.close(3); os.write(2, b'something')")
        with rebuilt(target) as new:
            new.run("os.write(2, b' more')")
            assert log.read_bytes() == b"something more"
            assert new.context.warnings == []
        with rebuilt(target, log.unlink) as new:
            assert link(new, 2) == os.readlink("/proc/self/fd/2")
            assert "now that of `snap restore`" in new.context.warnings[0]


def test_signals_on_readiness() -> None:
    with Interpreter() as target:
        target.run("""
a, b = socket.socketpair()
fcntl.fcntl(a, fcntl.F_SETOWN, os.getpid())
fcntl.fcntl(a, 10, signal.SIGUSR2)
fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
""")
        a, b = target.ask("a.fileno(), b.fileno()")
        assert captured(target).at(a).owner == (1, target.pid, 12)
        with rebuilt(target) as new:  # the owner is still the target
            assert new.context.warnings == []
            assert flags(new, a) & os.O_ASYNC
            assert new.ask(f"fcntl.fcntl({a}, fcntl.F_GETOWN)") == target.pid
            assert new.ask(f"fcntl.fcntl({a}, 11)") == 12
            target.run("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])")
            new.run(f"os.write({b}, b'x')")
            assert target.ask("signal.SIGUSR2 in signal.sigpending()")


def test_a_running_process_is_examined_without_a_trace() -> None:
    with Interpreter() as target:
        target.run("""
a, b = socket.socketpair()
socket.send_fds(a, [b"x"], [0])
master, slave = os.openpty()
import threading
def churn():
    while True:
        for fd in [*os.pipe(), os.eventfd(0), os.dup(0)]:
            os.close(fd)
threading.Thread(target=churn, daemon=True).start()
""")
        with pidfd_of(target) as handle:
            for _ in range(50):
                found = descriptors.examine(target.pid, handle)
                assert [text for text in found if "/dev/ptmx" in text] == found


def test_changed_files_are_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(bytes(100))
    with Interpreter() as target:
        target.run(f"a = os.open({str(path)!r}, os.O_RDONLY); os.lseek(a, 50, 0)")
        with rebuilt(target, lambda: path.write_bytes(bytes(10))) as new:
            assert any("10 bytes are left" in warning for warning in new.context.warnings)
            assert new.ask("os.lseek(3, 0, 1)") == 50

        def replace() -> None:
            (tmp_path / "new").write_bytes(bytes(100))
            (tmp_path / "new").rename(path)

        target.run(f"os.close(a); a = os.open({str(path)!r}, os.O_RDONLY)")
        with rebuilt(target, replace) as new:
            assert any("another file has this name" in warning for warning in new.context.warnings)


def test_a_file_of_proc_is_that_of_the_new_process() -> None:
    with Interpreter() as target:
        target.run("a = os.open('/proc/self/comm', os.O_RDWR); b = os.dup(a); os.read(a, 3)")
        with rebuilt(target) as new:
            assert link(new, target.ask("b")) == f"/proc/{new.pid}/comm"
            assert new.ask(f"os.lseek({target.ask('a')}, 0, 1)") == 3


def test_locks(tmp_path: Path) -> None:
    path = tmp_path / "locked"
    path.write_bytes(bytes(100))
    code = f"""
whole = os.open({str(path)!r}, os.O_RDWR)
fcntl.flock(whole, fcntl.LOCK_EX)
part = os.open({str(path)!r}, os.O_RDWR)
fcntl.lockf(part, fcntl.LOCK_EX, 10, 20)
own = os.open({str(path)!r}, os.O_RDWR)
fcntl.fcntl(own, 37, struct.pack("hhxxxxqqixxxx", fcntl.F_RDLCK, 0, 50, 0, 0))
"""
    with Interpreter() as target:
        target.run(code)
        with rebuilt(target) as new:  # the target still holds them
            assert len(new.context.warnings) == 2
            assert all("another process holds it" in text for text in new.context.warnings)
        with rebuilt(target, target.end) as new:
            assert new.context.warnings == []
            infos = b"".join(Path(f"/proc/{new.pid}/fdinfo/{fd}").read_bytes() for fd in (3, 4, 5))
            assert b"FLOCK  ADVISORY  WRITE" in infos
            assert b"POSIX  ADVISORY  WRITE %d " % new.pid in infos
            assert b" 20 29" in infos
            assert b"OFDLCK ADVISORY  READ" in infos
            assert b" 50 EOF" in infos


def test_directories_places_and_devices(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    for number in range(50):
        (tmp_path / str(number)).touch()
    with Interpreter() as target:
        target.run(f"""
import ctypes
directory = os.open({str(tmp_path)!r}, os.O_RDONLY | os.O_DIRECTORY)
dirent = ctypes.create_string_buffer(200)
getdents = lambda fd: ctypes.CDLL(None).syscall(217, fd, dirent, 200)
got = getdents(directory)
place = os.open({str(tmp_path)!r}, os.O_PATH)
symlink = os.open({str(tmp_path / "link")!r}, os.O_PATH | os.O_NOFOLLOW)
devices = [os.open("/dev/" + name, os.O_RDWR) for name in ("null", "zero", "full", "urandom")]
""")
        directory, place, symlink = target.ask("directory, place, symlink")
        with rebuilt(target) as new:
            for fd in (directory, place, symlink, *target.ask("devices")):
                assert link(new, fd) == link(target, fd)
                assert flags(new, fd) == flags(target, fd)
            new.run("import ctypes; dirent = ctypes.create_string_buffer(200)")
            new.run("getdents = lambda fd: ctypes.CDLL(None).syscall(217, fd, dirent, 200)")
            assert new.ask(f"getdents({directory}), dirent.raw") == target.ask(
                "getdents(directory), dirent.raw"
            )


def test_memfds_and_unnamed_tmpfs_files() -> None:
    with Interpreter() as target:
        target.run("""
a = os.memfd_create("memory", os.MFD_ALLOW_SEALING)
os.write(a, b"content")
b = os.open(f"/proc/self/fd/{a}", os.O_RDONLY)
c = os.open("/dev/shm/test_descriptors", os.O_RDWR | os.O_CREAT | os.O_EXCL)
os.write(c, b"shared")
os.unlink("/dev/shm/test_descriptors")
""")
        table = captured(target)
        needed = descriptors.needed(table.files, table.descriptors)
        assert sorted((m.kind, m.name, m.size) for m in needed.values()) == [
            ("memfd", b"memory", 7),
            ("tmpfs", b"/dev/shm/test_descriptors", 6),
        ]
        a, b, c = target.ask("a, b, c")
        with rebuilt(target) as new:
            assert new.ask(f"os.lseek({a}, 0, 1), os.lseek({b}, 0, 1)") == (7, 0)
            assert flags(new, b) == flags(target, b)
            assert new.ask(f"os.read({b}, 100)") == b"content"
            assert new.ask(f"os.pread({c}, 100, 0)") == b"shared"
            new.run(f"os.write({a}, b'!')")
            assert new.ask(f"os.read({b}, 100)") == b"!"


# --- pipes ---------------------------------------------------------------------------------------


def test_pipes_keep_what_is_in_them() -> None:
    with Interpreter() as target:
        target.run("""
r, w = os.pipe2(os.O_NONBLOCK)
fcntl.fcntl(w, fcntl.F_SETPIPE_SZ, 1 << 17)
for i in range(100):
    os.write(w, b"%d," % i * 100)
pr, pw = os.pipe2(os.O_DIRECT)
os.write(pw, b"one"); os.write(pw, b"two")
both = os.open(f"/proc/self/fd/{r}", os.O_RDWR)
er, ew = os.pipe()
""")
        r, w, pr, pw, both, er, ew = target.ask("r, w, pr, pw, both, er, ew")
        content = b"".join(b"%d," % i * 100 for i in range(100))
        with rebuilt(target) as new:
            for fd in (r, w, pr, pw, both, er, ew):
                assert flags(new, fd) == flags(target, fd)
            assert new.ask(f"fcntl.fcntl({r}, fcntl.F_GETPIPE_SZ)") == 1 << 17
            assert new.ask(f"os.read({both}, 1 << 17)") == content
            assert new.ask(f"os.read({pr}, 100)") == b"one"
            assert new.ask(f"os.read({pr}, 100)") == b"two"
            assert not readable(new, er)
            new.run(f"os.write({ew}, b'x')")
            assert new.ask(f"os.read({er}, 5)") == b"x"
            new.run(f"os.close({w}); os.close({both})")
            assert new.ask(f"os.read({r}, 5)") == b""
            assert new.context.closed_connections == []
        assert target.ask("os.read(r, 1 << 17)") == content
        assert target.ask("os.read(pr, 100), os.read(pr, 100)") == (b"one", b"two")


def test_a_full_pipe_comes_back_full() -> None:
    with Interpreter() as target:
        target.run("""
r, w = os.pipe2(os.O_NONBLOCK)
total = 0
try:
    while True:
        total += os.write(w, bytes(1000))
except BlockingIOError:
    pass
""")
        r, w, total = target.ask("r, w, total")
        with rebuilt(target) as new:
            assert new.context.warnings == []
            assert not new.ask(f"select.select([], [{w}], [], 0)[1]")
            assert new.ask(f"len(os.read({r}, 1 << 20))") == total


def test_pipes_to_elsewhere_come_back_ended() -> None:
    theirs_read, our_write = os.pipe()
    our_read, theirs_write = os.pipe()
    gone_read, gone_write = os.pipe()
    os.close(gone_write)
    keep = (theirs_read, theirs_write, gone_read)
    with Interpreter(keep=keep) as target:
        for fd in keep:
            os.close(fd)
        os.write(our_write, b"last words")
        with rebuilt(target) as new:
            assert new.ask(f"os.read({theirs_read}, 100)") == b"last words"
            assert new.ask(f"os.read({theirs_read}, 100)") == b""
            new.run(f"""
try:
    os.write({theirs_write}, b"x")
except BrokenPipeError:
    broken = True
""")
            assert new.ask("broken")
            assert new.ask(f"os.read({gone_read}, 100)") == b""
            assert len(new.context.closed_connections) == 2  # the third had ended before
        os.close(our_write)
        os.close(our_read)
        assert target.ask(f"os.read({theirs_read}, 100)") == b"last words"


def test_fifos_are_opened_under_their_name(tmp_path: Path) -> None:
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    with Interpreter() as target:
        target.run(f"""
r = os.open({path!r}, os.O_RDONLY | os.O_NONBLOCK)
w = os.open({path!r}, os.O_WRONLY)
os.write(w, b"inside")
""")
        r, w = target.ask("r, w")
        with rebuilt(target, target.end) as new:
            assert flags(new, r) & os.O_NONBLOCK
            assert link(new, r) == path
            assert new.ask(f"os.read({r}, 100)") == b"inside"
            new.run(f"os.close({w})")
            assert new.ask(f"os.read({r}, 100)") == b""


# --- eventfd, timerfd, signalfd, epoll -----------------------------------------------------------


def test_eventfds() -> None:
    with Interpreter() as target:
        target.run("""
plain = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
many = os.eventfd(0, 0)
os.eventfd_write(many, (1 << 64) - 2)
semaphore = os.eventfd(3, os.EFD_SEMAPHORE)
""")
        plain, many, semaphore = target.ask("plain, many, semaphore")
        with rebuilt(target) as new:
            for fd in (plain, many, semaphore):
                assert flags(new, fd) == flags(target, fd)
                assert cloexec(new, fd) == cloexec(target, fd)
            assert not readable(new, plain)
            assert new.ask(f"os.eventfd_read({many})") == (1 << 64) - 2
            for _ in range(3):
                assert new.ask(f"os.eventfd_read({semaphore})") == 1
            assert not readable(new, semaphore)
        assert target.ask("os.eventfd_read(semaphore)") == 1


TIMERS = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def timer(clock, flags, value, interval):
    fd = libc.timerfd_create(clock, 0o4000)
    spec = struct.pack("qqqq", *divmod(interval, 10**9), *divmod(value, 10**9))
    assert libc.timerfd_settime(fd, flags, spec, None) == 0
    return fd
def gettime(fd):
    spec = ctypes.create_string_buffer(32)
    assert libc.timerfd_gettime(fd, spec) == 0
    a, b, c, d = struct.unpack("qqqq", spec.raw)
    return c * 10**9 + d, a * 10**9 + b
"""


def test_timerfds() -> None:
    with Interpreter(prelude="import struct, time, os\n" + TIMERS) as target:
        target.run("""
later = timer(1, 0, 100 * 10**9, 7 * 10**9)
disarmed = timer(1, 0, 0, 0)
expired = timer(1, 0, 1, 0)
ticking = timer(1, 0, 1, 10**6)
clock = timer(0, 1, time.time_ns() + 50 * 10**9, 0)
monotonic = timer(1, 1, time.monotonic_ns() + 50 * 10**9, 0)
select.select([expired, ticking], [], [])
""")
        names = "later, disarmed, expired, ticking, clock, monotonic"
        later, disarmed, expired, ticking, clock, monotonic = target.ask(names)
        with rebuilt(target) as new:
            new.run(TIMERS)
            value, interval = new.ask(f"gettime({later})")
            assert 90 * 10**9 < value <= 100 * 10**9
            assert interval == 7 * 10**9
            assert new.ask(f"gettime({disarmed})") == (0, 0)
            assert not readable(new, disarmed)
            assert new.ask(f"int.from_bytes(os.read({expired}, 8), 'little')") == 1
            assert not readable(new, expired)
            new.run(f"select.select([{ticking}], [], [])")
            assert new.ask(f"gettime({ticking})[1]") == 10**6
            assert new.ask(f"int.from_bytes(os.read({ticking}, 8), 'little')") >= 1
            assert 40 * 10**9 < new.ask(f"gettime({clock})[0]") <= 50 * 10**9
            assert 40 * 10**9 < new.ask(f"gettime({monotonic})[0]") <= 50 * 10**9
        assert target.ask("int.from_bytes(os.read(expired, 8), 'little')") == 1


def test_signalfds() -> None:
    with Interpreter() as target:
        target.run("""
import ctypes
mask = struct.pack("Q", 1 << (signal.SIGUSR1 - 1) | 1 << (signal.SIGRTMIN - 1))
fd = ctypes.CDLL(None).syscall(289, -1, mask, 8, os.O_NONBLOCK)
""")
        fd = target.ask("fd")
        with rebuilt(target) as new:
            new.run("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])")
            assert not readable(new, fd)
            new.run("os.kill(os.getpid(), signal.SIGUSR1)")
            assert new.ask(f"os.read({fd}, 128)[0]") == 10  # SIGUSR1
            assert flags(new, fd) == flags(target, fd)


def test_epoll_registrations() -> None:
    with Interpreter() as target:
        target.run("""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def control(ep, what, fd, events, data):
    assert libc.epoll_ctl(ep, what, fd, struct.pack("=IQ", events, data)) == 0
ep = select.epoll()
r, w = os.pipe()
e = os.eventfd(1)
inner = select.epoll()
inner.register(e, select.EPOLLIN)
control(ep.fileno(), 1, r, select.EPOLLIN | select.EPOLLET, 0xFEEDFACECAFEBEEF)
control(ep.fileno(), 1, w, select.EPOLLOUT | select.EPOLLONESHOT, 5)
control(ep.fileno(), 1, inner.fileno(), select.EPOLLIN, 999)
# Registered under a number that is now another file, and under one that is now closed:
x = os.eventfd(1); kept = os.dup2(x, 40)
control(ep.fileno(), 1, x, select.EPOLLIN, 777)
os.dup2(os.eventfd(0), x)
y = os.dup2(kept, 41)
control(ep.fileno(), 1, y, select.EPOLLIN, 888)
os.close(y)
WAIT = '''
def wait(ep):
    buffer = ctypes.create_string_buffer(12 * 32)
    n = libc.epoll_wait(ep, buffer, 32, 0)
    return sorted((struct.unpack_from("=IQ", buffer, 12 * i)[::-1]) for i in range(n))
'''
exec(WAIT)
""")
        ep, w = target.ask("ep.fileno(), w")
        with rebuilt(target) as new:
            assert new.context.warnings == []
            new.run("import ctypes; libc = ctypes.CDLL(None)")
            new.run(target.ask("WAIT"))
            assert new.ask(f"wait({ep})") == [(5, 4), (777, 1), (888, 1), (999, 1)]
            new.run(f"os.write({w}, b'x')")
            later = new.ask(f"wait({ep})")
            assert (0xFEEDFACECAFEBEEF, 1) in later
            assert all(data != 5 for data, _ in later)  # EPOLLONESHOT has fired
            assert all(data != 0xFEEDFACECAFEBEEF for data, _ in new.ask(f"wait({ep})"))  # ET
            # the eventfd that took the number over is not watched, nothing stands at 41
            assert not os.path.exists(f"/proc/{new.pid}/fd/41")
        assert (777, 1) in target.ask("wait(ep.fileno())")


def test_inotify_watches_keep_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "a dir").mkdir()
    for name in ("one", "two", "three"):
        (tmp_path / name).touch()
    with Interpreter(cwd=tmp_path) as target:
        target.run("""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
fd = libc.inotify_init1(os.O_NONBLOCK)
add = lambda name, mask: libc.inotify_add_watch(fd, name, mask)
numbers = [add(b"one", 0xFFF), add(b"two", 2), add(b"a dir", 0x100), add(b"three", 4)]
libc.inotify_rm_watch(fd, numbers.pop(1))
os.read(fd, 1000)
""")
        fd, numbers = target.ask("fd, numbers")
        assert numbers == [1, 3, 4]
        with rebuilt(target) as new:
            assert new.context.warnings == []
            assert not readable(new, fd)
            (tmp_path / "two").write_bytes(b"x")
            (tmp_path / "a dir" / "new").touch()
            (tmp_path / "three").chmod(0o600)
            data = new.ask(f"os.read({fd}, 1000)")
            assert struct.unpack_from("iIII", data) == (3, 0x100, 0, 16)
            assert data[16:19] == b"new"
            assert struct.unpack_from("iIII", data, 32) == (4, 4, 0, 0)
        (tmp_path / "three").chmod(0o644)
        with rebuilt(target) as new:  # now an event waits in the target
            assert "of events that waited are lost" in new.context.warnings[0]


# --- stdin, stdout, stderr, terminals -------------------------------------------------------------


def test_standard_streams_that_lead_outside_are_those_of_the_restore(tmp_path: Path) -> None:
    with Interpreter() as target:
        target.run("copy = os.dup(1); again = os.open('/proc/self/fd/1', os.O_WRONLY)")
        table = captured(target)
        assert [table.at(fd).kind for fd in (0, 1)] == ["stdio", "stdio"]
        assert table.at(target.ask("copy")) == table.at(1)
        assert table.at(target.ask("again")).kind == "pipes"
        with rebuilt(target) as new:
            new.run(f"os.write({target.ask('copy')}, b'')")
            assert link(new, target.ask("copy")) == link(new, 1)
            assert link(new, 1) != link(target, 1)


def test_standard_streams_that_do_not_wait() -> None:
    with Interpreter() as target:
        target.run("os.set_blocking(1, False)")
        with rebuilt(target) as new:
            assert flags(new, 1) & os.O_NONBLOCK
            assert os.get_blocking(new.stdout)  # the caller's own stays as it is


def test_a_shared_terminal_becomes_three_streams() -> None:
    master, slave = os.openpty()
    try:
        with Interpreter(keep=(slave,)) as target:
            target.run(f"""
stdin, stdout = os.dup(0), os.dup(1)
for fd in (0, 1, 2):
    os.dup2({slave}, fd)
other = os.open(os.ttyname(0), os.O_RDWR | os.O_NOCTTY)
os.dup2(stdin, 0); os.dup2({slave}, 10); os.dup2(stdout, 1)
""")
            table = captured(target)
            assert table.cannot == []
            assert [table.at(fd).kind for fd in (0, 1, 2)] == ["stdio", "stdio", "stdio"]
            assert table.at(10) == table.at(2)
            other = table.at(target.ask("other"))
            assert other.kind == "terminals"
            assert not other.closed
    finally:
        os.close(master)
        os.close(slave)


def test_everything_that_cannot_be_handled_is_listed_at_once() -> None:
    with Interpreter() as target:
        target.run("""
master, slave = os.openpty()
netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
packet = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
pidfd = os.pidfd_open(os.getpid())
kmsg = os.open("/dev/kmsg", os.O_RDONLY)
""")
        text = "\n".join(captured(target).cannot)
        for what in ("/dev/ptmx", "netlink", "packet", "a pidfd", "/dev/kmsg"):
            assert what in text
        assert f"descriptor {target.ask('kmsg')}:" in text


def test_thirty_descriptors_looked_at_ten_times() -> None:
    with Interpreter() as target:
        target.run("""
pipes = [os.pipe() for _ in range(5)]
files = [os.open("/etc/passwd", os.O_RDONLY) for _ in range(5)]
events = [os.eventfd(0) for _ in range(5)]
ep = select.epoll()
for fd in events:
    ep.register(fd)
listening = socket.create_server(("127.0.0.1", 0))
pairs = [socket.socketpair() for _ in range(2)]
""")
        with freeze(target.pid) as frozen:
            for _ in range(10):
                _, table, cannot = descriptors.capture(frozen.pid, frozen.pidfd)
                assert cannot == []
                assert len(table) >= 28
