"""Sockets whose connection has ended: what a program finds where it had a connection at T0.

read(2) returns 0, write(2) fails with EPIPE, poll and epoll report POLLIN, POLLRDHUP and POLLHUP:
what is left after the peer has reset the connection and the program has noticed.
"""

from __future__ import annotations

import os
import select
import socket
import struct

from . import sockopts
from .openfile import Opening

_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER on, 0 seconds: close(2) sends RST."""
_PATIENCE_MS = 5000


def tcp(family: int, error: bool, opening: Opening) -> int:
    """A TCP socket of this family (AF_INET, AF_INET6) whose connection was reset → descriptor.

    With `error` the program is still to be told: its connect(2) was under way, and SO_ERROR says
    that it failed. Made over the loopback; without one it is a unix socket that has ended.
    """
    try:
        listener = opening.shared(("ended", family), lambda: _listener(family, opening))
    except OSError:
        return unix(socket.SOCK_STREAM)
    with socket.socket(family, socket.SOCK_STREAM) as ours:
        ours.connect(listener.getsockname())
        other, _ = listener.accept()
        with other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        poll = select.poll()
        poll.register(ours, 0)
        poll.poll(_PATIENCE_MS)  # until the RST is there: POLLHUP
        if not error:
            ours.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return os.dup(ours.fileno())


def _listener(family: int, opening: Opening) -> socket.socket:
    sock = opening.until_done.enter_context(socket.socket(family, socket.SOCK_STREAM))
    sock.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
    sock.listen(1)
    return sock


def unix(kind: int, queue: tuple[bytes, ...] = ()) -> int:
    """A unix socket of this type without a peer; what was in its queue can still be read."""
    ours, other = socket.socketpair(socket.AF_UNIX, kind)
    with ours, other:
        sockopts.send_all(other, queue)
        if kind == socket.SOCK_DGRAM:  # does not notice that its peer is closed
            ours.shutdown(socket.SHUT_RDWR)
        return os.dup(ours.fileno())
