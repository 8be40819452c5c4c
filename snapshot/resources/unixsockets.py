"""Unix sockets: socketpairs inside the process with what waits in them, listening and bound ones.

A connection to another process comes back ended: what waited can still be read. A datagram socket
that sends to a name (syslog) is connected to that name again. Descriptors in flight (SCM_RIGHTS)
are refused. Who sent what waits, and SO_PEERCRED of a socketpair, are not kept.
"""

from __future__ import annotations

import os
import socket

from ..kernel.arch_x86_64 import NR
from ..kernel.sockdiag import TCP_ESTABLISHED, TCP_LISTEN, UnixSocket
from ..manifest import OpenFile
from . import sockopts, unixopen
from .openfile import (
    LARGEST,
    Cannot,
    Captured,
    Opening,
    Placing,
    Seen,
    Table,
    set_flags,
    state_of,
)

NAME = unixopen.NAME

_ANCILLARY_BYTES = 4096


def recognise(seen: Seen, table: Table) -> bool:
    return seen.is_socket and table.look(seen).domain == socket.AF_UNIX


def capture(seen: Seen, table: Table) -> Captured:
    found = table.unix(seen)
    if found is None:
        raise Cannot("a unix socket in another network namespace, or no unix_diag in this kernel")
    inside = bool(found.peer) and (seen.entry.device, found.peer) in table.by_inode
    look = table.look(seen)
    peer_name = b"" if inside else _name(look.peer)
    connected = found.state == TCP_ESTABLISHED and found.type != socket.SOCK_DGRAM
    again = found.type == socket.SOCK_DGRAM and bool(peer_name)
    outside = (connected or bool(found.peer)) and not inside and not again
    state = unixopen.State(
        type=found.type,
        inode=seen.entry.inode,
        name=found.name,
        file=_file(found, table),
        backlog=found.backlog if found.state == TCP_LISTEN else None,
        peer=found.peer if inside else 0,
        peer_name=peer_name if again else b"",
        shutdown=found.shutdown,
        ended=outside,
        queue=queue(seen, table),
        options=sockopts.of(look),
    )
    return Captured(_label(found, inside, peer_name), state, outside, outside and bool(found.peer))


def queue(seen: Seen, table: Table) -> tuple[bytes, ...]:
    """The messages that wait in a stopped process; Cannot when they cannot be had."""
    look = table.look(seen)
    if seen.queue is None:
        # SIOCINQ of a datagram socket is the size of the first message, which may be empty
        full = not look.listening and (look.waiting != 0 or look.type == socket.SOCK_DGRAM)
        if full and table.stopped:
            with table.socket(seen) as sock:
                seen.queue = waiting(sock, table.room)
        else:
            seen.queue = ()
    return seen.queue


def _label(found: UnixSocket, inside: bool, peer_name: bytes) -> str:
    name = _printed(found.name)
    if found.state == TCP_LISTEN:
        return f"unix {name} listening"
    if inside:
        return f"unix {name or 'socketpair'}"
    to = f" to {_printed(peer_name) or 'another process'}" if found.peer or peer_name else ""
    return f"unix {name or 'without a name'}{to}"


def _printed(name: bytes) -> str:
    return os.fsdecode(name.replace(b"\0", b"@", 1) if name.startswith(b"\0") else name)


def _name(address: bytes) -> bytes:
    """sun_path of a struct sockaddr_un: a path, an abstract name, or nothing."""
    name = address[2:]
    return name if name.startswith(b"\0") else name.rstrip(b"\0")


def _file(found: UnixSocket, table: Table) -> unixopen.SocketFile | None:
    """The file of a socket that is bound to a path, if the path still leads there."""
    if not found.name or found.name.startswith(b"\0"):
        return None
    directory = os.readlink(os.fsencode(f"/proc/{table.pid}/cwd"))
    try:
        now = os.stat(os.path.join(directory, found.name))
    except OSError:
        return None
    if now.st_ino & 0xFFFFFFFF != found.file:
        return None
    return unixopen.SocketFile(mode=now.st_mode & 0o7777, uid=now.st_uid, gid=now.st_gid)


def waiting(sock: socket.socket, room: bytearray) -> tuple[bytes, ...]:
    """The messages that wait to be read, a stream's bytes as one; nothing is consumed. `room`: for
    one of them, with whatever in it.

    SO_PEEK_OFF makes each MSG_PEEK go on behind the last one; its value is put back. An empty
    datagram is seen only at the head of the queue.
    """
    before = sock.getsockopt(socket.SOL_SOCKET, sockopts.SO_PEEK_OFF)
    messages: list[bytes] = []
    try:
        sock.setsockopt(socket.SOL_SOCKET, sockopts.SO_PEEK_OFF, 0)
        while True:
            try:
                size, ancillary, flags, _ = sock.recvmsg_into(
                    [room], _ANCILLARY_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT
                )
            except OSError:  # EAGAIN: no more; ENOTCONN, EINVAL: none
                break
            _refuse_descriptors(ancillary, flags)
            if size == 0 and (sock.type != socket.SOCK_DGRAM or messages):
                break  # the end of a stream
            messages.append(bytes(memoryview(room)[:size]))
    finally:
        sock.setsockopt(socket.SOL_SOCKET, sockopts.SO_PEEK_OFF, before)
    if sock.type == socket.SOCK_STREAM and messages:
        return (b"".join(messages),)
    return tuple(messages)


def _refuse_descriptors(ancillary: list[tuple[int, int, bytes]], flags: int) -> None:
    received = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received += [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
    for fd in received:
        os.close(fd)
    if received:
        raise Cannot(f"a unix socket in which {len(received)} descriptors wait (SCM_RIGHTS)")
    if flags & socket.MSG_TRUNC:
        raise Cannot(f"a unix socket in which a message of more than {LARGEST} bytes waits")


def open(file: OpenFile, opening: Opening) -> int:
    made = opening.shared(NAME, lambda: unixopen.Sockets(opening))
    fd = made.take(file)
    set_flags(fd, file.flags)
    return fd


def finish(file: OpenFile, placing: Placing) -> None:
    """listen(2) once more, for whoever connects is told (SO_PEERCRED) who called it last."""
    state = state_of(file, unixopen.State)
    if state.backlog is not None:
        placing.call(NR.listen, placing.fds[file.id][0], state.backlog)
