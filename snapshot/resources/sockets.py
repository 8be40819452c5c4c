"""TCP and UDP sockets, IPv4 and IPv6.

Listening, bound and unconnected sockets come back with their options; UDP sockets with their peer
too (what waits unread in them is lost, as datagrams may be). A TCP connection, be it to another
descriptor of the process, comes back ended: see ended.py.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct

from msgspec.structs import replace

from ..manifest import OpenFile, Record
from . import ended, sockopts
from .openfile import Cannot, Captured, Opening, Problem, Seen, Table, set_flags, state_of

NAME = "sockets"

IPPROTO_MPTCP = 262
_SO_ACCEPTCONN = 30
_TCP_SYN_SENT, _TCP_CLOSE = 2, 7
_TCP_INFO_BYTES = 104
_PROTOCOLS = {
    socket.IPPROTO_TCP: "tcp",
    IPPROTO_MPTCP: "mptcp",
    socket.IPPROTO_UDP: "udp",
    136: "udplite",
    socket.IPPROTO_ICMP: "ping",
    socket.IPPROTO_ICMPV6: "ping",
}
_INTERNET = (socket.AF_INET, socket.AF_INET6)


class Address(Record, frozen=True):
    host: str
    port: int
    flow: int = 0
    scope: int = 0

    def tuple(self, family: int) -> tuple[str, int] | tuple[str, int, int, int]:
        if family == socket.AF_INET:
            return self.host, self.port
        return self.host, self.port, self.flow, self.scope

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class State(Record, frozen=True):
    family: int
    type: int
    protocol: int
    local: Address | None = None  # where it is bound
    peer: Address | None = None  # of a connected UDP socket
    backlog: int | None = None  # it listens
    options: tuple[sockopts.Option, ...] = ()
    ended: bool = False  # a connection
    connecting: bool = False  # that was not made yet


def recognise(seen: Seen, table: Table) -> bool:
    return seen.link.startswith(b"socket:[") and table.domain(seen) in _INTERNET


def capture(seen: Seen, table: Table) -> Captured:
    with table.socket(seen) as sock:
        name = _PROTOCOLS.get(sock.proto)
        if name is None or sock.type not in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            raise Cannot(f"a raw socket or one of protocol {sock.proto}")
        state = State(
            family=sock.family,
            type=sock.type,
            protocol=sock.proto,
            local=_address(sock.getsockname()),
        )
        peer = _peer(sock)
        if sock.type == socket.SOCK_STREAM:
            return _capture_stream(sock, name, state, peer)
        options = sockopts.read(sock)
    where = f"{state.local or 'not bound'}" + (f" to {peer}" if peer else "")
    return Captured(f"{name} {where}", replace(state, peer=peer, options=options))


def _capture_stream(sock: socket.socket, name: str, state: State, peer: Address | None) -> Captured:
    info = _tcp_info(sock)
    if sock.getsockopt(socket.SOL_SOCKET, _SO_ACCEPTCONN):
        # tcpi_sacked of a listening socket is its backlog (tcp_get_info, net/ipv4/tcp.c)
        backlog = struct.unpack_from("I", info, 28)[0] if info else socket.SOMAXCONN
        listening = replace(state, backlog=backlog, options=sockopts.read(sock))
        return Captured(f"{name} {state.local} listening", listening)
    phase = info[0] if info else (_TCP_CLOSE if peer is None else 1)
    if phase != _TCP_CLOSE:
        connecting = phase == _TCP_SYN_SENT
        gone = replace(state, local=None, ended=True, connecting=connecting)
        label = f"{name} {state.local} to {peer or 'an unanswered connect'}"
        return Captured(label, gone, outside=True, closed=True)
    if _hung_up(sock):
        label = f"{name} {state.local} after its end"
        return Captured(label, replace(state, local=None, ended=True), outside=True)
    where = f"bound to {state.local}" if state.local else "not bound"
    return Captured(f"{name} {where}", replace(state, options=sockopts.read(sock)))


def _tcp_info(sock: socket.socket) -> bytes:
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    except OSError:
        return b""


def _address(name: tuple[str, int] | tuple[str, int, int, int]) -> Address | None:
    """None for a socket that is bound to nothing."""
    host, port, *more = name
    flow, scope = more or (0, 0)
    if not port and host in ("0.0.0.0", "::"):
        return None
    return Address(host=host.partition("%")[0], port=port, flow=flow, scope=scope)


def _peer(sock: socket.socket) -> Address | None:
    try:
        return _address(sock.getpeername())
    except OSError:
        return None


def _hung_up(sock: socket.socket) -> bool:
    """A connection that has ended, and not a new socket: only that one is shut for reading."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return any(events & select.POLLRDHUP for _, events in poll.poll(0))


# --- restore -------------------------------------------------------------------------------------


def open(file: OpenFile, opening: Opening) -> int:
    state = state_of(file, State)
    if state.ended:
        fd = ended.tcp(state.family, state.connecting, opening)
        set_flags(fd, file.flags)
        return fd
    with socket.socket(state.family, state.type, state.protocol) as sock:
        for refused in sockopts.write(sock, state.options):
            opening.warn(file, refused)
        if state.local is not None:
            _bind(sock, state, file, opening)
        if state.peer is not None:
            _connect(sock, state, file, opening)
        fd = os.dup(sock.fileno())
    set_flags(fd, file.flags)
    return fd


def _bind(sock: socket.socket, state: State, file: OpenFile, opening: Opening) -> None:
    assert state.local is not None
    reuse = sock.getsockopt(socket.SOL_SOCKET, sockopts.SO_REUSEADDR)
    stream = state.type == socket.SOCK_STREAM
    try:
        if stream:  # connections of the old process may linger (TIME_WAIT): no reason not to bind
            sock.setsockopt(socket.SOL_SOCKET, sockopts.SO_REUSEADDR, 1)
        sock.bind(state.local.tuple(state.family))
        if state.backlog is not None:
            sock.listen(state.backlog)
        if stream:
            sock.setsockopt(socket.SOL_SOCKET, sockopts.SO_REUSEADDR, reuse)
    except OSError as error:
        if state.peer is not None and error.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL):
            opening.warn(file, f"its own address {state.local} cannot be had: {error.strerror}")
            return
        if error.errno == errno.EADDRINUSE:
            raise Problem(f"{file.label}: another process has {state.local}") from None
        raise Problem(f"{file.label}: bind to {state.local}: {error.strerror}") from None


def _connect(sock: socket.socket, state: State, file: OpenFile, opening: Opening) -> None:
    assert state.peer is not None
    try:
        sock.connect(state.peer.tuple(state.family))
    except OSError as error:
        opening.warn(file, f"is no longer connected to {state.peer}: {error.strerror}")
