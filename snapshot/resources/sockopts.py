"""Options of sockets: read as bytes, set again where a new socket does not have them anyway.

What getsockopt cannot tell is lost: multicast memberships, filters, eBPF programs.
"""

from __future__ import annotations

import socket
import struct
from functools import cache

from ..kernel.fdtable import Asked, Socket, answers
from ..manifest import Record

SO_REUSEADDR, SO_SNDBUF, SO_RCVBUF = 2, 7, 8
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
SO_PEEK_OFF = 42
SO_BUF_LOCK = 72
"""Which of the buffers the program has set itself: 1 sending, 2 receiving (Linux 5.14)."""
_LARGE = struct.pack("i", 1 << 26)
_FORCE = {SO_SNDBUF: (SO_SNDBUFFORCE, 1), SO_RCVBUF: (SO_RCVBUFFORCE, 2)}

_INT, _LINGER, _TIMEOUT, _NAME = 4, 8, 16, 16

Table = tuple[tuple[int, int, int], ...]  # level, option, bytes


def _ints(level: int, *options: int) -> Table:
    return tuple((level, option, _INT) for option in options)


# Numbers of asm-generic/socket.h, linux/in.h, in6.h, tcp.h, udp.h: Python names only some.
_ANY: Table = (
    *_ints(
        socket.SOL_SOCKET,
        SO_REUSEADDR,
        5,  # SO_DONTROUTE
        SO_SNDBUF,
        SO_RCVBUF,
        12,  # SO_PRIORITY
        15,  # SO_REUSEPORT
        18,  # SO_RCVLOWAT
        29,  # SO_TIMESTAMP
        35,  # SO_TIMESTAMPNS
        37,  # SO_TIMESTAMPING
        SO_BUF_LOCK,
    ),
    (socket.SOL_SOCKET, 13, _LINGER),  # SO_LINGER
    (socket.SOL_SOCKET, 20, _TIMEOUT),  # SO_RCVTIMEO
    (socket.SOL_SOCKET, 21, _TIMEOUT),  # SO_SNDTIMEO
)
_INET: Table = (
    *_ANY,
    *_ints(socket.SOL_SOCKET, 6, 9, 10, 36, 40),  # BROADCAST KEEPALIVE OOBINLINE MARK RXQ_OVFL
    (socket.SOL_SOCKET, 25, _NAME),  # SO_BINDTODEVICE
    # TOS TTL PKTINFO MTU_DISCOVER RECVERR RECVTTL RECVTOS FREEBIND TRANSPARENT
    *_ints(socket.IPPROTO_IP, 1, 2, 8, 10, 11, 12, 13, 15, 19),
    *_ints(socket.IPPROTO_IP, 24, 32, 33, 34),  # BIND_ADDRESS_NO_PORT MULTICAST_IF, _TTL, _LOOP
)
_INET6: Table = _ints(
    socket.IPPROTO_IPV6,
    26,  # IPV6_V6ONLY
    *(16, 17, 18, 19),  # UNICAST_HOPS MULTICAST_IF, _HOPS, _LOOP
    *(23, 25, 49, 51),  # MTU_DISCOVER RECVERR RECVPKTINFO RECVHOPLIMIT
    *(66, 67, 75, 78),  # RECVTCLASS TCLASS TRANSPARENT FREEBIND
)
_TCP: Table = (
    # NODELAY CORK KEEPIDLE KEEPINTVL KEEPCNT SYNCNT LINGER2 DEFER_ACCEPT
    *_ints(socket.IPPROTO_TCP, 1, 3, 4, 5, 6, 7, 8, 9),
    *_ints(socket.IPPROTO_TCP, 18, 23, 25),  # USER_TIMEOUT FASTOPEN NOTSENT_LOWAT
    (socket.IPPROTO_TCP, 13, _NAME),  # TCP_CONGESTION
)
_UDP: Table = _ints(socket.IPPROTO_UDP, 1, 103, 104)  # CORK SEGMENT GRO
_UNIX: Table = (
    *_ANY,
    *_ints(socket.SOL_SOCKET, 16, 34, SO_PEEK_OFF, 76),  # PASSCRED PASSSEC PEEK_OFF PASSPIDFD
)

_STREAM = socket.SOCK_STREAM
TABLES: dict[tuple[int, int], Table] = {
    (socket.AF_INET, _STREAM): (*_INET, *_TCP),
    (socket.AF_INET, socket.SOCK_DGRAM): (*_INET, *_UDP),
    (socket.AF_INET6, _STREAM): (*_INET6, *_INET, *_TCP),
    (socket.AF_INET6, socket.SOCK_DGRAM): (*_INET6, *_INET, *_UDP),
    (socket.AF_UNIX, _STREAM): _UNIX,
    (socket.AF_UNIX, socket.SOCK_DGRAM): _UNIX,
    (socket.AF_UNIX, socket.SOCK_SEQPACKET): _UNIX,
}


class Option(Record, frozen=True):
    level: int
    option: int
    value: bytes


ROWS = [
    (domain, kind, *option) for (domain, kind), table in TABLES.items() for option in table
]


@cache
def asked() -> Asked:
    """What a look at a socket asks for: every option that its kind has."""
    return Asked(ROWS)


def of(look: Socket) -> tuple[Option, ...]:
    """Those that this kernel has, as they were when `asked`."""
    return tuple(
        Option(level=ROWS[row][2], option=ROWS[row][3], value=value) for row, value in answers(look)
    )


def write(sock: socket.socket, options: tuple[Option, ...]) -> list[str]:
    """Set what differs, before bind(2); returns what the kernel refused, for warnings."""
    refused = []
    lock = next((_int(o.value) for o in options if _is(o, SO_BUF_LOCK)), 0)
    for one in options:
        if one.level == socket.SOL_SOCKET and one.option in _FORCE:
            force, bit = _FORCE[one.option]
            if lock & bit:
                _set_buffer(sock, one, force)
            continue
        if _is(one, SO_BUF_LOCK):
            continue
        try:
            if sock.getsockopt(one.level, one.option, max(len(one.value), _INT)) != one.value:
                sock.setsockopt(one.level, one.option, one.value)
        except OSError as error:
            refused.append(f"socket option {one.option} of level {one.level}: {error.strerror}")
    return refused


def _is(one: Option, option: int) -> bool:
    return one.level == socket.SOL_SOCKET and one.option == option


def _int(value: bytes) -> int:
    number: int = struct.unpack("i", value[:4])[0] if len(value) >= 4 else 0
    return number


def _set_buffer(sock: socket.socket, one: Option, force: int) -> None:
    """The kernel doubles what is set; beyond its limits only with CAP_NET_ADMIN."""
    half = _int(one.value) // 2
    try:
        sock.setsockopt(socket.SOL_SOCKET, force, half)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, one.option, half)


def send_all(sender: socket.socket, messages: tuple[bytes, ...]) -> None:
    """Send all messages without waiting, whatever the sender's buffer is, which is then what it
    was. OSError when the receiver takes no more."""
    before = sender.getsockopt(socket.SOL_SOCKET, SO_SNDBUF, _INT)
    locked = sender.getsockopt(socket.SOL_SOCKET, SO_BUF_LOCK)
    _set_buffer(sender, Option(level=0, option=SO_SNDBUF, value=_LARGE), SO_SNDBUFFORCE)
    for message in messages:
        view = memoryview(message)
        while True:
            view = view[sender.send(view, socket.MSG_DONTWAIT) :]
            if not view:
                break
    _set_buffer(sender, Option(level=0, option=SO_SNDBUF, value=before), SO_SNDBUFFORCE)
    sender.setsockopt(socket.SOL_SOCKET, SO_BUF_LOCK, locked)
