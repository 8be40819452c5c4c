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
import sys
from contextlib import suppress

from msgspec.structs import replace

from ..kernel.fdtable import Socket
from ..kernel.sockdiag import Diag
from ..manifest import OpenFile, Record
from . import ended, sockopts
from .openfile import Cannot, Captured, Opening, Problem, Seen, Table, set_flags, state_of

NAME = "sockets"

IPPROTO_MPTCP = 262
_TCP_SYN_SENT, _TCP_CLOSE = 2, 7
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
    return seen.is_socket and table.look(seen).domain in _INTERNET


def capture(seen: Seen, table: Table) -> Captured:
    look = table.look(seen)
    name = _PROTOCOLS.get(look.protocol)
    if name is None or look.type not in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        raise Cannot(f"a raw socket or one of protocol {look.protocol}")
    local, peer = _address(look.local), _address(look.peer)
    state = State(family=look.domain, type=look.type, protocol=look.protocol)
    connection = look.type == socket.SOCK_STREAM and not look.listening
    if connection and _is_connected(look):
        ended = replace(state, ended=True, connecting=look.state == _TCP_SYN_SENT)
        label = f"{name} {local} to {peer or 'an unanswered connect'}"
        return Captured(label, ended, outside=True, closed=True)
    if connection and look.events & select.POLLRDHUP:  # only after a connection is it shut
        return Captured(f"{name} {local} after its end", replace(state, ended=True), outside=True)
    state = replace(state, local=local, options=sockopts.of(look))
    if look.listening:
        listening = replace(state, backlog=look.backlog if look.state else socket.SOMAXCONN)
        return Captured(f"{name} {local} listening", listening)
    if look.type == socket.SOCK_DGRAM and peer is not None:
        return Captured(f"{name} {local} to {peer}", replace(state, peer=peer))
    return Captured(f"{name} {f'bound to {local}' if local else 'not bound'}", state)


def _is_connected(look: Socket) -> bool:
    """Also half open, half closed and being made."""
    if look.state:
        return look.state != _TCP_CLOSE
    return bool(look.peer)


def _address(data: bytes) -> Address | None:
    """Of a struct sockaddr_in or sockaddr_in6; None when that says nothing."""
    if not data:
        return None
    port = int.from_bytes(data[2:4], "big")
    if len(data) < 28:
        host, flow, scope = socket.inet_ntop(socket.AF_INET, data[4:8]), 0, 0
    else:
        host = socket.inet_ntop(socket.AF_INET6, data[8:24])
        flow = int.from_bytes(data[4:8], "big")
        scope = int.from_bytes(data[24:28], sys.byteorder)
    if not port and host in ("0.0.0.0", "::"):
        return None
    return Address(host=host, port=port, flow=flow, scope=scope)


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
        if stream:  # not behind a listening socket, but behind connections that had it set too
            sock.setsockopt(socket.SOL_SOCKET, sockopts.SO_REUSEADDR, 1)
        _bind_behind(sock, state)
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


def _bind_behind(sock: socket.socket, state: State) -> None:
    """Bind, if need be behind closed connections of the old process, which linger for a minute and
    keep the port from a program that does not set SO_REUSEADDR."""
    assert state.local is not None
    address = state.local.tuple(state.family)
    try:
        sock.bind(address)
        return
    except OSError as error:
        if error.errno != errno.EADDRINUSE or state.type != socket.SOCK_STREAM:
            raise
    with suppress(OSError), Diag() as diag:
        diag.end_leftovers(state.local.port)
    sock.bind(address)


def _connect(sock: socket.socket, state: State, file: OpenFile, opening: Opening) -> None:
    assert state.peer is not None
    try:
        sock.connect(state.peer.tuple(state.family))
    except OSError as error:
        opening.warn(file, f"is no longer connected to {state.peer}: {error.strerror}")
