"""Sockets of a live process, captured while it is stopped and placed in a second process."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshot.errors import RestoreError, UnsupportedError
from tests.conftest import Snap

from .interpreters import Interpreter, Rebuilt, captured, rebuilt

pytestmark = pytest.mark.live


def use(process: Interpreter, name: str, fd: int) -> None:
    """Give a descriptor of the process a name there, as a socket object."""
    process.run(f"{name} = socket.socket(fileno={fd})")


# --- TCP and UDP ---------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::"])
def test_listening_tcp(host: str) -> None:
    with Interpreter() as target:
        target.run(f"""
s = socket.socket(socket.AF_INET6 if ":" in {host!r} else socket.AF_INET)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 77777)
s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 5))
s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
s.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 3)
s.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 33)
if ":" in {host!r}:
    s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, {host == "::1"})
s.bind(({host!r}, 0))
s.listen(17)
s.setblocking(False)
""")
        fd, name = target.ask("s.fileno(), s.getsockname()")
        (label,) = [file.label for file in captured(target).files if file.kind == "sockets"]
        assert label.startswith("tcp ")
        assert label.endswith(f":{name[1]} listening")
        with rebuilt(target, target.end) as new:
            use(new, "s", fd)
            assert new.context.warnings == []
            assert new.context.closed_connections == []
            assert new.ask("s.getsockname()") == name
            assert new.ask("os.get_blocking(s.fileno())") is False
            assert new.ask("s.getsockopt(1, socket.SO_REUSEADDR)") == 0
            assert new.ask("s.getsockopt(1, socket.SO_REUSEPORT)") == 1
            assert new.ask("s.getsockopt(1, socket.SO_KEEPALIVE)") == 1
            assert new.ask("s.getsockopt(1, socket.SO_RCVBUF)") == 2 * 77777
            assert new.ask("s.getsockopt(1, socket.SO_LINGER, 8)") == struct.pack("ii", 1, 5)
            assert new.ask("s.getsockopt(6, socket.TCP_NODELAY)") == 1
            assert new.ask("s.getsockopt(6, socket.TCP_DEFER_ACCEPT)") == 3
            assert new.ask("s.getsockopt(6, socket.TCP_KEEPIDLE)") == 33
            assert new.ask("s.getsockopt(6, socket.TCP_INFO, 32)[28]") == 17  # the backlog
            if host == "::1":
                assert new.ask("s.getsockopt(41, socket.IPV6_V6ONLY)") == 1
            client = socket.create_connection((("127.0.0.1", "::1")[host == "::1"], name[1]), 10)
            with client:
                client.sendall(b"hello")  # TCP_DEFER_ACCEPT
                new.run("select.select([s], [], [])")
                assert new.ask("s.accept()[0].recv(10)") == b"hello"


@pytest.mark.parametrize("reuse", [0, 1])
def test_a_listening_port_behind_lingering_connections(reuse: int) -> None:
    with Interpreter() as target:
        target.run(f"""
s = socket.socket()
s.setsockopt(1, socket.SO_REUSEADDR, {reuse})
s.bind(("127.0.0.1", 0)); s.listen()
""")
        fd, name = target.ask("s.fileno(), s.getsockname()")
        with socket.create_connection(name, 10) as client:
            target.run("c, _ = s.accept()")

            def end() -> None:
                target.end()
                assert client.recv(1) == b""
                client.close()  # the old process's side goes to TIME_WAIT

            with rebuilt(target, end) as new, socket.create_connection(name, 10):
                use(new, "s", fd)
                new.run("s.accept()")
                assert new.ask("s.getsockopt(1, socket.SO_REUSEADDR)") == reuse


def test_multipath_tcp() -> None:
    with Interpreter() as target:
        target.run("""
try:
    s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
except OSError:
    s = None
else:
    s.bind(("127.0.0.1", 0)); s.listen(7)
    c = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
    c.connect(s.getsockname())
""")
        if target.ask("s is None"):
            pytest.skip("no MPTCP here: sysctl net.mptcp.enabled=1")
        s, c, name = target.ask("s.fileno(), c.fileno(), s.getsockname()")
        with rebuilt(target, target.end) as new:
            use(new, "s", s)
            assert new.ask("s.proto, s.getsockname()") == (262, name)
            assert new.ask("s.getsockopt(6, socket.TCP_INFO, 32)[28]") == 7
            assert new.ask(f"os.read({c}, 10)") == b""
            (label,) = new.context.closed_connections
            assert label.startswith("mptcp ")


def test_a_port_in_use_is_named() -> None:
    with Interpreter() as target:
        target.run("s = [socket.create_server(('127.0.0.1', 0)) for _ in range(2)]")
        names = target.ask("[x.getsockname() for x in s]")
        with pytest.raises(RestoreError) as error, rebuilt(target):
            pass
        for _, port in names:
            assert f"another process has 127.0.0.1:{port}" in error.value.message


def test_unconnected_sockets() -> None:
    with Interpreter() as target:
        target.run("""
plain = socket.socket()
plain.setsockopt(6, socket.TCP_NODELAY, 1)
bound = socket.socket(socket.AF_INET6); bound.bind(("::1", 0))
""")
        plain, bound, name = target.ask("plain.fileno(), bound.fileno(), bound.getsockname()")
        with rebuilt(target, target.end) as new:
            use(new, "plain", plain)
            use(new, "bound", bound)
            assert new.ask("bound.getsockname()") == name
            assert new.ask("plain.getsockopt(6, socket.TCP_NODELAY)") == 1
            new.run("bound.listen(); plain = socket.create_connection(bound.getsockname()[:2], 10)")


def test_udp() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer,
        Interpreter() as target,
    ):
        peer.bind(("127.0.0.1", 0))
        peer.settimeout(10)
        target.run(f"""
bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
bound.setsockopt(1, socket.SO_BROADCAST, 1)
bound.setsockopt(0, socket.IP_TTL, 9)
bound.bind(("127.0.0.1", 0))
connected = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
connected.connect({peer.getsockname()!r})
""")
        bound, connected = target.ask("bound.fileno(), connected.fileno()")
        names = target.ask("bound.getsockname(), connected.getsockname()")
        with rebuilt(target, target.end) as new:
            use(new, "bound", bound)
            use(new, "connected", connected)
            assert new.context.closed_connections == []
            assert new.ask("bound.getsockname(), connected.getsockname()") == names
            assert new.ask("bound.getsockopt(1, socket.SO_BROADCAST)") == 1
            assert new.ask("bound.getsockopt(0, socket.IP_TTL)") == 9
            new.run("connected.send(b'to you')")
            assert peer.recv(100) == b"to you"
            peer.sendto(b"to me", names[0])
            assert new.ask("bound.recv(100)") == b"to me"


# --- connections that end -------------------------------------------------------------------------


@pytest.fixture(params=["127.0.0.1", "::1"])
def connection(request: pytest.FixtureRequest) -> Iterator[tuple[Interpreter, Rebuilt, int]]:
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    with socket.create_server((request.param, 0), family=family) as server, Interpreter() as target:
        target.run(f"""
s = socket.create_connection({server.getsockname()[:2]!r})
s.setblocking(False)
ep = select.epoll()
ep.register(s, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
""")
        accepted, _ = server.accept()
        with accepted, rebuilt(target) as new:
            new.run(f"ep = select.epoll.fromfd({target.ask('ep.fileno()')})")
            use(new, "s", target.ask("s.fileno()"))
            yield target, new, family
            accepted.send(b"still there")  # the target's connection has lived on
            assert target.ask("select.select([s], [], []) and s.recv(100)") == b"still there"


def test_a_connection_comes_back_ended(
    connection: tuple[Interpreter, Rebuilt, int],
) -> None:
    target, new, family = connection
    assert new.ask("int(s.family), int(s.type)") == (family, socket.SOCK_STREAM)
    (label,) = new.context.closed_connections
    assert label.startswith("tcp ")
    assert str(target.ask("s.getsockname()[1]")) in label
    assert new.ask("os.get_blocking(s.fileno())") is False
    (found,) = new.ask("ep.poll(10)")
    assert found[0] == new.ask("s.fileno()")
    assert found[1] & (select.EPOLLHUP)
    assert new.ask("s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)") == 0
    assert new.ask("s.recv(10)") == b""
    new.run("""
try:
    s.send(b"x")
    failed = None
except OSError as error:
    failed = error.errno
""")
    assert os.strerror(new.ask("failed")) in ("Broken pipe", "Connection reset by peer")
    new.run("s.setsockopt(6, socket.TCP_NODELAY, 1)")
    new.run("s.close()")


def test_a_connection_inside_the_process_ends_at_both_ends() -> None:
    with Interpreter() as target:
        target.run("""
server = socket.create_server(("127.0.0.1", 0))
a = socket.create_connection(server.getsockname())
b, _ = server.accept()
""")
        a, b, server = target.ask("a.fileno(), b.fileno(), server.fileno()")
        with rebuilt(target, target.end) as new:
            assert len(new.context.closed_connections) == 2
            for fd in (a, b):
                assert new.ask(f"os.read({fd}, 10)") == b""
            use(new, "server", server)
            new.run("c = socket.create_connection(server.getsockname())")
            new.run("d, _ = server.accept(); c.send(b'new')")
            assert new.ask("d.recv(10)") == b"new"


def test_a_connect_under_way_fails() -> None:
    with (
        socket.create_server(("127.0.0.1", 0), backlog=0) as server,
        socket.create_connection(server.getsockname(), 10),
        Interpreter() as target,
    ):
        target.run(f"""
s = socket.socket(); s.setblocking(False)
state = s.connect_ex({server.getsockname()!r})
""")
        fd = target.ask("s.fileno()")
        assert captured(target).at(fd).closed
        assert target.ask("errno.errorcode[state]") == "EINPROGRESS"
        with rebuilt(target) as new:
            use(new, "s", fd)
            new.run("select.select([], [s], [])")
            assert new.ask("s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)") != 0


def test_an_ended_connection_stays_one_and_is_no_news() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, Interpreter() as target:
        target.run(f"s = socket.create_connection({server.getsockname()!r})")
        accepted, _ = server.accept()
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        accepted.close()
        target.run("select.select([s], [], [])")
        fd = target.ask("s.fileno()")
        with rebuilt(target) as new:
            assert new.context.closed_connections == []
            assert new.ask(f"os.read({fd}, 10)") == b""


# --- unix sockets --------------------------------------------------------------------------------


def test_socketpairs_keep_what_waits_in_them() -> None:
    with Interpreter() as target:
        target.run("""
a, b = socket.socketpair()
a.setblocking(False)
a.send(b"to b"); a.send(b"!")
b.send(bytes(100_000))
c, d = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
c.send(b"one"); c.send(b"two"); c.send(b"three")
e, f = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
e.send(b"first"); e.send(b"second")
f.setsockopt(1, 42, 0)
g, h = socket.socketpair()
g.send(b"the end"); g.shutdown(socket.SHUT_WR)
ep = select.epoll(); ep.register(b, select.EPOLLIN)
""")
        names = target.ask("[x.fileno() for x in (a, b, c, d, e, f, g, h, ep)]")
        with rebuilt(target) as new:
            for name, fd in zip("abcdefgh", names, strict=False):
                use(new, name, fd)
            assert new.context.warnings == []
            assert new.context.closed_connections == []
            assert new.ask("os.get_blocking(a.fileno()), os.get_blocking(b.fileno())") == (
                False,
                True,
            )
            assert new.ask(f"select.epoll.fromfd({names[8]}).poll(0)") == [(names[1], 1)]
            assert new.ask("b.recv(100)") == b"to b!"
            assert new.ask("len(a.recv(1 << 20))") == 100_000
            assert new.ask("[d.recv(100) for _ in range(3)]") == [b"one", b"two", b"three"]
            assert new.ask("f.recv(100), f.recv(100)") == (b"first", b"second")
            assert new.ask("h.recv(100), h.recv(100)") == (b"the end", b"")
            new.run("h.send(b'back')")
            assert new.ask("g.recv(100)") == b"back"
            new.run("d.send(b'x'); a.send(b'y')")
            assert new.ask("c.recv(10), b.recv(10)") == (b"x", b"y")
            assert new.ask("a.getsockopt(1, socket.SO_SNDBUF)") == target.ask(
                "a.getsockopt(1, socket.SO_SNDBUF)"
            )
        assert target.ask("[x.getsockopt(1, 42) for x in (b, d, f)]") == [-1, -1, 0]
        assert target.ask("b.recv(100)") == b"to b!"
        assert target.ask("[d.recv(100) for _ in range(3)]") == [b"one", b"two", b"three"]


def test_unix_connections_to_elsewhere_come_back_ended() -> None:
    ours, theirs = socket.socketpair()
    gone, left = socket.socketpair()
    gone.close()
    with ours, theirs, left, Interpreter(keep=(theirs.fileno(), left.fileno())) as target:
        fd, dead = theirs.fileno(), left.fileno()
        theirs.close()
        left.close()
        ours.send(b"last words")
        with rebuilt(target) as new:
            assert len(new.context.closed_connections) == 1
            use(new, "s", fd)
            new.run("poll = select.poll(); poll.register(s, select.POLLIN)")
            assert new.ask("poll.poll(0)[0][1] & select.POLLHUP")
            assert new.ask("s.recv(100), s.recv(100)") == (b"last words", b"")
            assert new.ask(f"os.read({dead}, 10)") == b""
        ours.send(b"!")
        assert target.ask(f"os.read({fd}, 100)") == b"last words!"


@pytest.mark.parametrize("relative", [False, True])
def test_listening_unix_sockets(tmp_path: Path, relative: bool) -> None:
    path = tmp_path / "sock"
    with Interpreter(cwd=tmp_path) as target:
        target.run(f"""
s = socket.socket(socket.AF_UNIX)
s.bind({"sock" if relative else str(path)!r})
os.chmod({str(path)!r}, 0o612)
s.listen(9)
t = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
t.bind(b"\\0snap test {os.getpid()}"); t.listen(3)
""")
        s, t, abstract = target.ask("s.fileno(), t.fileno(), t.getsockname()")
        name = target.ask("s.getsockname()")
        with pytest.raises(RestoreError, match="another process has"), rebuilt(target):
            pass
        assert path.exists()
        here = os.getcwd()
        with rebuilt(target, target.end) as new:
            assert os.getcwd() == here
            assert new.context.warnings == []
            use(new, "s", s)
            use(new, "t", t)
            assert new.ask("s.getsockname(), t.getsockname()") == (name, abstract)
            assert path.stat().st_mode & 0o777 == 0o612
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
                credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                assert struct.unpack("iii", credentials)[0] == new.pid
                client.send(b"hello")
                assert new.ask("s.accept()[0].recv(10)") == b"hello"


def test_named_datagram_sockets(tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as outside,
        Interpreter() as target,
    ):
        outside.bind(log)
        outside.settimeout(10)
        target.run(f"""
server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
server.bind({str(tmp_path / "server")!r})
client = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
client.connect({str(tmp_path / "server")!r})
client.send(b"waits"); client.send(b"waits too")
syslog = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
syslog.connect({log!r})
""")
        names = ("server", "client", "syslog")
        fds = target.ask("[x.fileno() for x in (server, client, syslog)]")
        with rebuilt(target, target.end) as new:
            assert new.context.warnings == []
            assert new.context.closed_connections == []
            for name, fd in zip(names, fds, strict=True):
                use(new, name, fd)
            assert new.ask("server.recv(100), server.recv(100)") == (b"waits", b"waits too")
            new.run("client.send(b'more'); syslog.send(b'logged')")
            assert new.ask("server.recv(100)") == b"more"
            assert outside.recv(100) == b"logged"


def test_descriptors_in_flight_are_refused() -> None:
    with Interpreter() as target:
        target.run("a, b = socket.socketpair(); socket.send_fds(a, [b'x'], [0, 1])")
        before = set(os.listdir("/proc/self/fd"))
        (reason,) = captured(target).cannot
        assert "2 descriptors wait" in reason
        assert set(os.listdir("/proc/self/fd")) == before
        assert target.ask("len(socket.recv_fds(b, 10, 5)[1])") == 2


def test_a_take_that_meets_them_names_them_and_leaves_no_trace(snap: Snap) -> None:
    """Nothing but the pause may look at what waits, so the target has been stopped by then."""
    with Interpreter() as target:
        target.run("a, b = socket.socketpair(); socket.send_fds(a, [b'x'], [0, 1])")
        for options in ([], ["--now"]):
            failed = snap("take", target.pid, *options, ok=False)
            assert failed.code == UnsupportedError.exit_code
            assert "2 descriptors wait" in failed.err
            assert snap.names() == []
        assert target.ask("len(socket.recv_fds(b, 10, 5)[1])") == 2
        snap("take", target.pid)
