"""The system calls under descriptors: pidfd_getfd, kcmp, the tables of /proc, sock_diag, tee."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from snapshot.kernel._native import ffi, lib

from snapshot.errors import DeniedError, KernelError, TargetError
from snapshot.freeze import freeze
from snapshot.kernel import fdcalls, fdtable, filesystem, kcmp, pidfd, procfs
from snapshot.kernel.reading import Reading
from snapshot.kernel.sockdiag import TCP_ESTABLISHED, TCP_LISTEN, Diag, UnixSocket, parse_unix
from snapshot.resources.openfile import FASYNC, O_CLOEXEC
from snapshot.units import PAGE
from tests.harness.processes import wait_until


@contextmanager
def child(code: str, *fds: int) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process that runs `code`, says so, and waits for its stdin to close."""
    code = f"import os, socket, sys\n{code}\nos.write(1, b'.')\nsys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=fds,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.read(1) == b"."
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


# --- pidfd ---------------------------------------------------------------------------------------


def test_a_borrowed_descriptor_shares_the_file() -> None:
    with tempfile.TemporaryFile() as file, child("", file.fileno()) as process:
        file.write(b"0123456789")
        file.flush()
        handle = pidfd.open(process.pid)
        with pidfd.borrowed(handle, file.fileno()) as copy:
            os.lseek(copy, 3, os.SEEK_SET)
            assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 3
            assert not os.get_inheritable(copy)
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(copy)
        with pytest.raises(KernelError, match="EBADF"):
            pidfd.getfd(handle, 999)
        process.kill()
        process.wait()
        with pytest.raises(TargetError):
            pidfd.getfd(handle, 0)
        os.close(handle)


def test_a_thread_is_no_process() -> None:
    with child("import threading; threading.Thread(target=sys.stdin.read).start()") as process:
        threads = {int(name) for name in os.listdir(f"/proc/{process.pid}/task")}
        (thread,) = threads - {process.pid}
        assert pidfd.find(thread) == -1
        with pytest.raises(TargetError, match=str(thread)):
            pidfd.open(thread)


def test_a_process_that_is_not_there() -> None:
    with child("") as process:
        pid = process.pid
    with pytest.raises(TargetError, match=str(pid)):
        pidfd.open(pid)
    with pytest.raises(TargetError, match=str(pid)):
        fdtable.entries(pid)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else; run with sudo")
def test_not_allowed() -> None:
    with child("") as process:
        handle = pidfd.open(process.pid)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setuid(65534)
            denied = 0
            for attempt in (
                lambda: pidfd.getfd(handle, 0),
                lambda: fdtable.entries(process.pid),
                lambda: kcmp.same_file(process.pid, 0, 1),
            ):
                try:
                    attempt()
                except DeniedError:
                    denied += 1
            os.write(writer, str(denied).encode())
            os._exit(0)
        os.waitpid(pid, 0)
        assert os.read(reader, 10) == b"3"
        for fd in (reader, writer, handle):
            os.close(fd)


# --- kcmp ----------------------------------------------------------------------------------------


def test_descriptors_by_struct_file() -> None:
    files = [os.open("/dev/null", os.O_RDONLY) for _ in range(6)]
    copies = [os.dup(files[i % 3]) for i in range(9)]
    try:
        found = {one.fd: one.file for one in fdtable.entries(os.getpid(), grouped=True)}
        wanted = {fd: fd for fd in files} | {fd: files[i % 3] for i, fd in enumerate(copies)}
        assert {fd: found[fd] for fd in wanted} == wanted
        assert {one.fd for one in fdtable.entries(os.getpid()) if one.file != one.fd} == set()
        assert kcmp.same_file(os.getpid(), files[1], copies[1])
        assert not kcmp.same_file(os.getpid(), files[1], files[4])
    finally:
        for fd in files + copies:
            os.close(fd)


def test_what_an_epoll_watches() -> None:
    first, second = os.eventfd(0), os.eventfd(0)
    kept = os.dup(first)
    with select.epoll() as epoll:
        epoll.register(first)
        os.dup2(second, first)  # the registration stays with the first eventfd
        epoll.register(first)
        watches = [
            [kcmp.watches(os.getpid(), fd, epoll.fileno(), first, nth) for fd in (kept, second)]
            for nth in (0, 1)
        ]
        assert sorted(watches) == [[False, True], [True, False]]
        assert not kcmp.watches(os.getpid(), kept, epoll.fileno(), first, 2)
        assert not kcmp.watches(os.getpid(), kept, epoll.fileno(), 9999)
        assert not kcmp.watches(os.getpid(), 9999, epoll.fileno(), first)
    for fd in (first, second, kept):
        os.close(fd)


# --- the tables of /proc --------------------------------------------------------------------------


def test_entries_are_what_python_reads() -> None:
    with socket.socket() as sock, tempfile.TemporaryFile() as file:
        reader, writer = os.pipe()
        event = os.eventfd(7)
        found = {entry.fd: entry for entry in fdtable.entries(os.getpid())}
        # the directories that were read are descriptors of this process too
        listed = {int(name) for name in os.listdir("/proc/self/fd")}
        assert listed - {max(listed)} <= set(found)
        for fd in (sock.fileno(), file.fileno(), reader, writer, event):
            entry = found[fd]
            assert entry.link == os.readlink(os.fsencode(f"/proc/self/fd/{fd}"))
            with open(f"/proc/self/fdinfo/{fd}", "rb") as info:
                assert entry.info == info.read()
        actual = os.fstat(file.fileno())
        entry = found[file.fileno()]
        assert (entry.device, entry.inode, entry.mode, entry.links) == (
            actual.st_dev,
            actual.st_ino,
            actual.st_mode,
            0,
        )
        for fd in (sock.fileno(), reader):
            assert found[fd].inode == os.fstat(fd).st_ino
            assert found[fd].mode == 0
        for fd in (reader, writer, event):
            os.close(fd)


def test_what_has_more_to_say_than_its_record(tmp_path: Path) -> None:
    """Files with a name, eventfd and signalfd have not; what is in others /proc does not tell."""
    (tmp_path / "file").write_bytes(b"x" * PAGE)
    os.mkfifo(tmp_path / "fifo")
    with ExitStack() as stack:

        def keep(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        told = [
            keep(os.open(tmp_path / "file", os.O_RDONLY)),
            keep(os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)),
            keep(os.open("/dev/null", os.O_RDWR)),
            keep(os.eventfd(3)),
            keep(lib.snap_signalfd(1 << 9, 0)),
        ]
        (one, other), unnamed = os.pipe(), stack.enter_context(tempfile.TemporaryFile())
        asks = [
            *(keep(one), keep(other), unnamed.fileno()),
            keep(os.open(tmp_path / "fifo", os.O_RDWR)),
            keep(os.memfd_create("m")),
            keep(lib.snap_timerfd_create(time.CLOCK_MONOTONIC, 0)),
            stack.enter_context(select.epoll()).fileno(),
            stack.enter_context(socket.socket()).fileno(),
            keep(os.open(tmp_path / "fifo", os.O_RDWR | FASYNC)),
        ]
        found = {entry.fd: entry for entry in fdtable.entries(os.getpid())}
        assert {fd: bool(found[fd].asks) for fd in told + asks} == {
            **dict.fromkeys(told, False),
            **dict.fromkeys(asks, True),
        }
        for fd in told + asks:
            cloexec = 0 if os.get_inheritable(fd) else O_CLOEXEC
            assert found[fd].flags == fcntl.fcntl(fd, fcntl.F_GETFL) | cloexec


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("", True),
        ("a = os.open('/etc/passwd', os.O_RDONLY); b = os.dup(a); c = os.eventfd(4)", True),
        ("a = os.pipe()", False),
        ("a = os.open('/var/tmp', os.O_TMPFILE | os.O_RDWR)", False),
        ("a = os.open(sys.executable, os.O_RDONLY | os.O_DIRECT)", False),
    ],
)
def test_a_reading_is_what_proc_says(code: str, told: bool, tmp_path: Path) -> None:
    (tmp_path / "in").touch()
    code = f"import os, sys\n{code}\nos.rename('in', 'done')\nwhile True: os.sched_yield()"
    with open(tmp_path / "in") as nothing, open(tmp_path / "out", "w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=nothing, stdout=out, stderr=out, cwd=tmp_path
        )
    try:
        wait_until((tmp_path / "done").exists, "its files to be open")
        pid = process.pid
        files = [procfs.open_file(pid, name) for name in ("cmdline", "limits", "maps")]
        with freeze(pid):
            reading = Reading(pid, files, 1 << 20)
            assert not reading.listed
            assert reading.look_ahead() is told
            assert not reading.listed
            run, of = reading.errand
            run(of)
            assert (reading.listed, reading.told) == (True, told)
            assert reading.entries == fdtable.entries(pid, grouped=True)
            assert reading.read()
            for i, name in enumerate(("cmdline", "limits", "maps")):
                assert reading.file(i) == procfs.read(pid, name) == procfs.read_again(files[i])
            links = tuple(procfs.link(pid, name) for name in ("exe", "cwd", "root"))
            assert reading.links == links
        process.kill()
        process.wait()
        assert not reading.read()
        assert procfs.read_again(files[2]) == b""
        run(of)
        assert not reading.listed
        for fd in files:
            os.close(fd)
    finally:
        process.kill()
        process.wait()


BEFORE = """
a = os.open("a", os.O_RDWR | os.O_CREAT)
b = os.dup(a)
c = os.eventfd(4)
many = [os.eventfd(0) for _ in range(80)]
os.write(1, b".")
for line in sys.stdin:
    exec(line)
    os.write(1, b".")
"""


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ("os.lseek(a, 5, os.SEEK_SET)", True),
        ("os.ftruncate(a, 9)", True),
        ("os.rename('a', 'd')", True),
        ("os.unlink('a')", True),
        ("os.set_blocking(b, False)", True),
        ("os.eventfd_write(c, 1)", True),
        ("os.close(b); assert os.open('a', os.O_RDONLY) == b", True),
        ("os.close(many[-1]); assert os.open('a', os.O_RDONLY) == many[-1]", True),
        ("os.close(b)", False),
        ("os.dup(a)", False),
        ("os.dup2(b, 200); os.close(b)", False),
        ("os.dup2(many[-1], 200); os.close(many[-1])", False),
    ],
)
def test_descriptors_that_were_looked_at_before(change: str, same: bool, tmp_path: Path) -> None:
    """Nothing of them is as it was then: only which there are, if that is so still."""
    with child(f"os.chdir({str(tmp_path)!r}){BEFORE}") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with Reading(process.pid, [], 1) as reading:
            reading.look_ahead()
            before = reading.entries
            process.stdin.write(change.encode() + b"\n")
            process.stdin.flush()
            assert process.stdout.read(1) == b"."
            room = ffi.new("char[]", 1 << 20)
            used = lib.snap_descriptors_read_known(reading.handle.known, room, len(room))
            assert (used > 0) == same
            assert same or used == -errno.ESTALE
            run, of = reading.errand
            run(of)
            found = fdtable.entries(process.pid, grouped=True)
            assert before != found == reading.entries
        assert not reading.handle.known
        run(of)
        assert reading.entries == found


def test_many_descriptors_and_long_fdinfo() -> None:
    """More than the first buffer holds."""
    fds = [os.eventfd(0) for _ in range(300)]
    with select.epoll() as epoll:
        for fd in fds:
            epoll.register(fd)
        found = {entry.fd: entry for entry in fdtable.entries(os.getpid())}
        assert set(fds) <= set(found)
        assert found[epoll.fileno()].info.count(b"tfd:") == 300
    for fd in fds:
        os.close(fd)


ASKED = fdtable.Asked(
    [
        (socket.AF_INET, socket.SOCK_STREAM, socket.SOL_SOCKET, socket.SO_REUSEADDR, 4),
        (socket.AF_UNIX, socket.SOCK_STREAM, socket.SOL_SOCKET, socket.SO_RCVBUF, 4),
        (socket.AF_INET, socket.SOCK_STREAM, socket.SOL_SOCKET, 9999, 4),
        (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, 13, 16),  # TCP_CONGESTION
    ]
)


def look(handle: int, fd: int) -> fdtable.Socket:
    (found,) = fdtable.look(handle, [fd], ASKED)
    if isinstance(found, OSError):
        raise found
    return found


def test_options_are_those_of_the_kind_that_it_has() -> None:
    handle = pidfd.open(os.getpid())
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found = fdtable.look(handle, [handle, tcp.fileno(), unix.fileno()], ASKED)
        assert isinstance(found[0], OSError)
        assert isinstance(found[1], fdtable.Socket)
        assert isinstance(found[2], fdtable.Socket)
        congestion = tcp.getsockopt(socket.IPPROTO_TCP, 13, 16)
        assert list(fdtable.answers(found[1])) == [(0, b"\1\0\0\0"), (3, congestion)]
        size = unix.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4)
        assert list(fdtable.answers(found[2])) == [(1, size)]
    os.close(handle)


def test_answers_that_find_no_room_are_left_out() -> None:
    many = 100
    row = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, 13, 16)
    handle = pidfd.open(os.getpid())
    with socket.socket() as tcp:
        (found,) = fdtable.look(handle, [tcp.fileno()], fdtable.Asked([row] * many))
        assert isinstance(found, fdtable.Socket)
        rows = [number for number, _ in fdtable.answers(found)]
        assert rows == list(range(len(rows)))
        assert 0 < len(rows) < many
    os.close(handle)


def test_how_sockets_look() -> None:
    handle = pidfd.open(os.getpid())
    with socket.create_server(("127.0.0.1", 0), backlog=11) as server:
        listening = look(handle, server.fileno())
        assert listening.domain == socket.AF_INET
        assert listening.type == socket.SOCK_STREAM
        assert listening.protocol == socket.IPPROTO_TCP
        assert listening.listening
        assert listening.backlog == 11
        assert listening.peer == b""
        with socket.create_connection(server.getsockname()) as client:
            other, _ = server.accept()
            other.send(b"abc")
            select.select([client], [], [])
            now = look(handle, client.fileno())
            assert (now.state, now.waiting, now.listening) == (1, 3, False)
            assert now.events == select.POLLIN
            assert int.from_bytes(now.peer[2:4], "big") == server.getsockname()[1]
            other.close()
            select.select([client], [], [])
            assert look(handle, client.fileno()).events & select.POLLRDHUP
            assert client.recv(10) == b"abc"
    with pytest.raises(OSError, match="socket"):
        look(handle, handle)
    os.close(handle)


# --- sock_diag -----------------------------------------------------------------------------------


def inode(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino


def unix(diag: Diag, number: int) -> UnixSocket | None:
    return parse_unix(*diag.unix([number]))


def test_unix_peers_and_names() -> None:
    a, b = socket.socketpair()
    with a, b, Diag() as diag, tempfile.TemporaryDirectory() as directory:
        found = unix(diag, inode(a))
        assert found is not None
        assert found.peer == inode(b)
        assert found.state == TCP_ESTABLISHED
        assert (found.name, found.shutdown, found.received) == (b"", 0, 0)
        b.send(b"xyz")
        a.shutdown(socket.SHUT_WR)
        found = unix(diag, inode(a))
        assert found is not None
        assert (found.shutdown, found.received) == (2, 3)
        path = os.path.join(directory, "socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
            server.bind(path)
            server.listen(5)
            found = unix(diag, inode(server))
            assert found is not None
            assert (found.type, found.state) == (socket.SOCK_SEQPACKET, TCP_LISTEN)
            assert (found.name, found.backlog) == (os.fsencode(path), 5)
            assert found.file == os.stat(path).st_ino
        with socket.socket(socket.AF_UNIX) as abstract:
            abstract.bind(b"\0snap\0test")
            found = unix(diag, inode(abstract))
            assert found is not None
            assert found.name == b"\0snap\0test"
        assert unix(diag, 1) is None
        every = [inode(a), 1, inode(b)] * 30
        answers = [parse_unix(one) for one in diag.unix(every)]
        assert [one and one.inode for one in answers] == [inode(a), None, inode(b)] * 30


# --- tee, timerfd, signalfd, files ---------------------------------------------------------------


def room_of_table() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("FDSize:"))


def test_the_table_is_as_large_as_is_wanted() -> None:
    wanted = 2 * room_of_table()
    before = os.listdir("/proc/self/fd")
    fdcalls.reserve(wanted)
    assert room_of_table() >= wanted
    assert os.listdir("/proc/self/fd") == before
    fdcalls.reserve(10**9)  # more than it may have


def test_tee_consumes_nothing() -> None:
    reader, writer = os.pipe()
    reader2, writer2 = os.pipe()
    os.write(writer, b"some bytes")
    assert fdcalls.tee(reader, writer2, 100) == 10
    assert os.read(reader2, 100) == os.read(reader, 100) == b"some bytes"
    with pytest.raises(BlockingIOError):
        fdcalls.tee(reader, writer2, 100)
    for fd in (reader, writer, reader2, writer2):
        os.close(fd)


def test_timerfd_ticks() -> None:
    fd = fdcalls.timerfd_create(1, os.O_NONBLOCK)
    with pytest.raises(BlockingIOError):
        os.read(fd, 8)
    fdcalls.timerfd_set_ticks(fd, 5)
    assert int.from_bytes(os.read(fd, 8), sys.byteorder) == 5
    fdcalls.timerfd_settime(fd, 0, 1, 0)
    select.select([fd], [], [])
    assert int.from_bytes(os.read(fd, 8), sys.byteorder) == 1
    with pytest.raises(OSError, match="Invalid"):
        fdcalls.timerfd_create(99)
    os.close(fd)


def test_signalfd_takes_every_signal() -> None:
    mask = (1 << 33) | (1 << 9)  # 34 = SIGRTMIN, 10 = SIGUSR1
    fd = fdcalls.signalfd(mask, os.O_NONBLOCK)
    with open(f"/proc/self/fdinfo/{fd}") as info:
        assert f"sigmask:\t{mask:016x}" in info.read()
    os.close(fd)


def test_holes_are_left_out() -> None:
    with tempfile.TemporaryFile() as file:
        fd = file.fileno()
        filesystem.pwrite_all(fd, b"x" * 10, 1 << 20)
        os.ftruncate(fd, 3 << 20)
        (found,) = filesystem.data_ranges(fd, 3 << 20)
        assert found[0] <= 1 << 20 < (1 << 20) + 10 <= found[1] < 2 << 20
        os.ftruncate(fd, 0)
        os.ftruncate(fd, 1 << 20)
        assert list(filesystem.data_ranges(fd, 1 << 20)) == []


def test_file_systems_have_types() -> None:
    memory = os.memfd_create("x")
    assert filesystem.type_of(memory) == filesystem.TMPFS_MAGIC
    os.close(memory)
    with open("/proc/self/stat", "rb") as file:
        assert filesystem.type_of(file.fileno()) == filesystem.PROC_MAGIC
    with pytest.raises(OSError, match="Bad") as error:
        filesystem.type_of(-1)
    assert error.value.errno == errno.EBADF
