"""Unix sockets at restore. All of a process are made together: pairs, names, peers, queues."""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading

from ..kernel import filesystem
from ..manifest import OpenFile, Record
from . import ended, sockopts
from .openfile import Opening, Problem, state_of

NAME = "unixsockets"

_RECEIVE, _SEND = 1, 2  # RCV_SHUTDOWN, SEND_SHUTDOWN (net/sock.h)


class SocketFile(Record, frozen=True):
    """The file that bind(2) made."""

    mode: int
    uid: int
    gid: int


class State(Record, frozen=True):
    type: int
    inode: int
    name: bytes = b""  # a path, or an abstract name that begins with a NUL
    file: SocketFile | None = None  # of the path; None when it had been removed
    backlog: int | None = None  # it listens
    peer: int = 0  # inode of the peer, when that is in this process
    peer_name: bytes = b""  # where a datagram socket sends to, outside
    shutdown: int = 0  # 1: nothing more to receive, 2: nothing can be sent
    ended: bool = False  # its peer is not in this process
    queue: tuple[bytes, ...] = ()
    options: tuple[sockopts.Option, ...] = ()


class Sockets:
    """Every unix socket of the image, open."""

    def __init__(self, opening: Opening) -> None:
        self.opening = opening
        self.files = {state_of(f, State).inode: f for f in opening.of_kind(NAME)}
        self.states = {inode: state_of(file, State) for inode, file in self.files.items()}
        self.sockets: dict[int, socket.socket] = {}
        self.problems: dict[int, Problem] = {}
        for inode in self.states:
            if inode not in self.sockets:
                self._make(inode)
        for step in (self._name, self._connect, self._fill, self._shut):
            for inode, sock in self.sockets.items():
                if inode not in self.problems:
                    try:
                        step(sock, self.states[inode], self.files[inode])
                    except Problem as problem:
                        self.problems[inode] = problem

    def take(self, file: OpenFile) -> int:
        inode = state_of(file, State).inode
        if inode in self.problems:
            raise self.problems[inode]
        return os.dup(self.sockets[inode].fileno())

    def _keep(self, inode: int, sock: socket.socket) -> None:
        self.sockets[inode] = self.opening.until_done.enter_context(sock)
        for refused in sockopts.write(sock, self.states[inode].options):
            self.opening.warn(self.files[inode], refused)

    def _make(self, inode: int) -> None:
        state = self.states[inode]
        other = self.states.get(state.peer)
        if state.ended:
            self._keep(inode, socket.socket(fileno=ended.unix(state.type, state.queue)))
        elif other is not None and other.peer == inode and other is not state:
            ours, theirs = socket.socketpair(socket.AF_UNIX, state.type)
            self._keep(inode, ours)
            self._keep(state.peer, theirs)
        else:
            self._keep(inode, socket.socket(socket.AF_UNIX, state.type))

    # --- names -----------------------------------------------------------------------------------

    def _name(self, sock: socket.socket, state: State, file: OpenFile) -> None:
        if state.backlog is None and state.type != socket.SOCK_DGRAM:
            return  # an accepted connection has the name of the socket that accepted it
        if state.name.startswith(b"\0"):
            self._bind(sock, state.name)
        elif state.name:
            self._bind_path(sock, state, file)
        if state.backlog is not None:
            sock.listen(state.backlog)

    def _bind(self, sock: socket.socket, name: bytes) -> None:
        try:
            sock.bind(name)
        except OSError as error:
            shown = os.fsdecode(name.replace(b"\0", b"@", 1))
            if error.errno == errno.EADDRINUSE:
                raise Problem(f"another process has the unix socket {shown}") from None
            raise Problem(f"bind to unix socket {shown}: {error.strerror}") from None

    def _bind_path(self, sock: socket.socket, state: State, file: OpenFile) -> None:
        path = os.path.join(self.opening.process.cwd, state.name)
        if state.file is None and os.path.lexists(path):
            self.opening.warn(file, "its file had been replaced; it comes back without a name")
            return
        _remove_stale(path, state.type)
        if state.name.startswith(b"/"):
            self._bind(sock, state.name)
        else:
            self._bind_relative(sock, state.name)
        if state.file is None:
            os.unlink(path)
            return
        os.chmod(path, state.file.mode)
        try:
            os.chown(path, state.file.uid, state.file.gid)
        except PermissionError as error:
            self.opening.warn(file, f"the owner of its file: {error.strerror}")

    def _bind_relative(self, sock: socket.socket, name: bytes) -> None:
        """A relative name means the target's working directory: bind in a thread that has it."""
        failed: list[Exception] = []

        def bind() -> None:
            try:
                filesystem.own_directory(self.opening.process.cwd)
                self._bind(sock, name)
            except (Problem, OSError) as error:
                failed.append(error)

        thread = threading.Thread(target=bind)
        thread.start()
        thread.join()
        if failed:
            error = failed[0]
            raise error if isinstance(error, Problem) else Problem(f"{os.fsdecode(name)}: {error}")

    # --- peers and queues ------------------------------------------------------------------------

    def _connect(self, sock: socket.socket, state: State, file: OpenFile) -> None:
        """A datagram socket that sends to a named one."""
        other = self.states.get(state.peer)
        if other is not None and other is not state and other.peer == state.inode:
            return
        name = other.name if other is not None else state.peer_name
        if not name:
            if other is not None:
                self.opening.warn(file, "its peer has no name; it is not connected")
            return
        try:
            sock.connect(os.path.join(self.opening.process.cwd, name) if name[0] else name)
        except OSError as error:
            self.opening.warn(file, f"is no longer connected: {error.strerror}")

    def _fill(self, sock: socket.socket, state: State, file: OpenFile) -> None:
        if not state.queue or state.ended:
            return
        other = self.states.get(state.peer)
        if other is not None and other.peer == state.inode:
            sockopts.send_all(self.sockets[state.peer], state.queue)
        elif state.name:
            with socket.socket(socket.AF_UNIX, state.type) as sender:
                sender.connect(sock.getsockname())
                sockopts.send_all(sender, state.queue)
        else:
            self.opening.warn(file, f"{len(state.queue)} messages that waited in it are lost")

    def _shut(self, sock: socket.socket, state: State, file: OpenFile) -> None:
        if state.ended or not state.shutdown:
            return
        how = {_RECEIVE: socket.SHUT_RD, _SEND: socket.SHUT_WR}
        sock.shutdown(how.get(state.shutdown, socket.SHUT_RDWR))


def _remove_stale(path: bytes, kind: int) -> None:
    """Remove the file of a socket that nobody has open. Problem when it is something else."""
    try:
        now = os.lstat(path)
    except FileNotFoundError:
        return
    shown = os.fsdecode(path)
    if not stat.S_ISSOCK(now.st_mode):
        raise Problem(f"{shown}: there is a file that is no socket")
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            if error.errno == errno.EPROTOTYPE:
                raise Problem(f"{shown}: another process has this unix socket") from None
            if error.errno != errno.EAGAIN:
                raise Problem(f"{shown}: {error.strerror}") from None
    raise Problem(f"{shown}: another process has this unix socket")
