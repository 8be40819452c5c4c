"""NETLINK_SOCK_DIAG: what /proc and getsockopt do not say of a unix socket, above all its peer;
and the TCP connections that a dead process has left.

Sockets of the caller's network namespace only. Formats: sock_diag(7), linux/unix_diag.h,
linux/inet_diag.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence
from typing import NamedTuple

from .closing import Closing
from .errnames import error_name

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLMSG_ERROR = 2
SOCK_DESTROY = 21
NLMSG_DONE = 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 1, 4, 0x300

TCP_ESTABLISHED = 1
TCP_CLOSE = 7
TCP_LISTEN = 10
"""Unix sockets use TCP's states: connected, not connected, listening."""

SHOW_NAME, SHOW_VFS, SHOW_PEER, SHOW_RQLEN = 0x01, 0x02, 0x04, 0x10
_NAME, _VFS, _PEER, _ICONS, _RQLEN, _MEMINFO, _SHUTDOWN = range(7)

_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_REQUEST = struct.Struct("=BBHIIIII")  # unix_diag_req
_MESSAGE = struct.Struct("=BBBBIII")  # unix_diag_msg
_ATTRIBUTE = struct.Struct("=HH")  # nlattr: length with this header, type
_PAIR = struct.Struct("=II")
_ANY_COOKIE = 0xFFFFFFFF
_UNIX = (socket.AF_UNIX, 0, 0, _ANY_COOKIE)  # what a request begins with: in any state
_SHOW = SHOW_NAME | SHOW_VFS | SHOW_PEER | SHOW_RQLEN
_AT_ONCE = 32
"""Requests in one message: their answers fit into the receive buffer."""
_TCP_REQUEST = struct.Struct("=BBBBI48s")  # inet_diag_req_v2
_TCP_MESSAGE = struct.Struct("=BBBB48s5I")  # inet_diag_msg
_TCP_ID = struct.Struct("!HH44s")  # inet_diag_sockid: ports, then what only the kernel reads
_CLOSING = sum(1 << state for state in (4, 5, 6, 9, 11))
"""FIN_WAIT1, FIN_WAIT2, TIME_WAIT, LAST_ACK, CLOSING"""


class UnixSocket(NamedTuple):
    inode: int
    type: int  # SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET
    state: int  # TCP_*
    name: bytes  # sun_path: a path, or an abstract name that begins with a NUL; empty without one
    file: int  # inode number of the socket's file, 0 without one
    peer: int  # inode of the connected peer, 0 without one
    received: int  # bytes (or, of a listener, connections) that wait
    backlog: int  # of a listener
    shutdown: int  # bit 0: nothing will be received, bit 1: nothing can be sent


class Diag(Closing):
    """One netlink socket; closed at the end of a `with`."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG
        )
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def unix(self, inodes: Sequence[int]) -> list[bytes]:
        """What is said of the unix sockets with these inodes, in their order: see `parse_unix`."""
        answers: list[bytes] = []
        for start in range(0, len(inodes), _AT_ONCE):
            part = inodes[start : start + _AT_ONCE]
            requests = (_REQUEST.pack(*_UNIX, one, _SHOW, _ANY_COOKIE, _ANY_COOKIE) for one in part)
            self._socket.send(b"".join(self._message(SOCK_DIAG_BY_FAMILY, 0, r) for r in requests))
            answers += [self._socket.recv(4096) for _ in part]
        return answers

    def end_leftovers(self, port: int) -> int:
        """End the TCP connections at a local port that no process has any more, however long they
        would have lingered (TIME_WAIT). → how many. OSError without CAP_NET_ADMIN, or when the
        kernel cannot (CONFIG_INET_DIAG_DESTROY)."""
        ended = 0
        for family in (socket.AF_INET, socket.AF_INET6):
            for request in self._leftovers(family, port):
                self._ask(SOCK_DESTROY, NLM_F_ACK, request)
                code = _error(self._socket.recv(4096))
                if code == errno.ENOENT:  # over meanwhile
                    continue
                if code:
                    raise OSError(code, f"end of a TCP connection: {error_name(code)}")
                ended += 1
        return ended

    def _leftovers(self, family: int, port: int) -> list[bytes]:
        """A request that names each of them."""
        wanted = _TCP_ID.pack(port, 0, b"")
        request = _TCP_REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, _CLOSING, wanted)
        self._ask(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, request)
        found: list[bytes] = []
        while True:
            answer = self._socket.recv(1 << 16)
            at = 0
            while at + _HEADER.size <= len(answer):
                length, kind = _HEADER.unpack_from(answer, at)[:2]
                if kind in (NLMSG_DONE, NLMSG_ERROR) or length < _HEADER.size:
                    return found
                _, state, _, _, name, *_, inode = _TCP_MESSAGE.unpack_from(
                    answer, at + _HEADER.size
                )
                if not inode and _TCP_ID.unpack(name)[0] == port:
                    head = (family, socket.IPPROTO_TCP, 0, 0, 1 << state)
                    found.append(_TCP_REQUEST.pack(*head, name))
                at += (length + 3) & ~3

    def _ask(self, kind: int, flags: int, request: bytes) -> None:
        self._socket.send(self._message(kind, flags, request))

    def _message(self, kind: int, flags: int, request: bytes) -> bytes:
        self._sequence += 1
        size = _HEADER.size + len(request)
        return _HEADER.pack(size, kind, NLM_F_REQUEST | flags, self._sequence, 0) + request


def _error(answer: bytes) -> int:
    """The errno of an error message; 0 when it is none, or says that all is well."""
    if _HEADER.unpack_from(answer)[1] != NLMSG_ERROR:
        return 0
    return -int(struct.unpack_from("=i", answer, _HEADER.size)[0])


def parse_unix(answer: bytes) -> UnixSocket | None:
    """One SOCK_DIAG_BY_FAMILY message of family AF_UNIX, netlink header included. None: there is no
    such socket in this network namespace, or the kernel has no unix_diag. OSError: what else."""
    code = _error(answer)
    if code == errno.ENOENT:
        return None
    if code:
        raise OSError(code, f"sock_diag of a unix socket: {error_name(code)}")
    length = _HEADER.unpack_from(answer)[0]
    _, kind, state, _, inode, _, _ = _MESSAGE.unpack_from(answer, _HEADER.size)
    found: dict[int, bytes] = {}
    at = _HEADER.size + _MESSAGE.size
    while at + _ATTRIBUTE.size <= length:
        size, attribute = _ATTRIBUTE.unpack_from(answer, at)
        if size < _ATTRIBUTE.size:
            break
        found[attribute] = answer[at + _ATTRIBUTE.size : at + size]
        at += (size + 3) & ~3

    def pair(attribute: int) -> tuple[int, int]:
        value = found.get(attribute, b"")
        return _PAIR.unpack(value) if len(value) == _PAIR.size else (0, 0)

    received, backlog = pair(_RQLEN)
    peer = found.get(_PEER, b"")
    shutdown = found.get(_SHUTDOWN, b"")
    name = found.get(_NAME, b"")
    return UnixSocket(
        inode=inode,
        type=kind,
        state=state,
        name=name if name.startswith(b"\0") else name.rstrip(b"\0"),
        file=pair(_VFS)[0],
        peer=int.from_bytes(peer, "little") if len(peer) == 4 else 0,
        received=received,
        backlog=backlog if state == TCP_LISTEN else 0,
        shutdown=shutdown[0] if shutdown else 0,
    )
