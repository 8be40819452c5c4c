"""inotify(7): its watches, under the same numbers. Events that wait unread are lost.

The kernel tells the inode of a watch and a file handle; the handle, opened, tells a path.
"""

from __future__ import annotations

import array
import fcntl
import os
import termios

from ..kernel import fdcalls, procfs
from ..manifest import OpenFile, Record
from .openfile import Cannot, Captured, Opening, Seen, Table, state_of

NAME = "inotify"

_MOST = 65536
"""Numbers of watches are given out in order: to reach a high one takes as many system calls."""
_IN_MODIFY = 2
_EVENT_BYTES = 4096


class Watch(Record, frozen=True):
    number: int
    mask: int
    path: bytes


class State(Record, frozen=True):
    watches: tuple[Watch, ...]
    lost: int = 0  # bytes of events that waited


def recognise(seen: Seen, table: Table) -> bool:
    return seen.link in (b"anon_inode:inotify", b"anon_inode:[inotify]")


def capture(seen: Seen, table: Table) -> Captured:
    watches = []
    for line in seen.lines(b"inotify"):
        # "wd:1 ino:2 sdev:800002 mask:2 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:…":
        # inotify_fdinfo, fs/notify/fdinfo.c; all hexadecimal
        fields = dict(word.split(b":", 1) for word in line.split())
        number = int(fields[b"wd"], 16)
        if b"f_handle" not in fields or number > _MOST:
            raise Cannot(f"inotify, watch {number}: no file handle, or too high a number")
        watches.append(
            Watch(
                number=number,
                mask=int(fields[b"mask"], 16),
                path=_path(table, number, fields),
            )
        )
    with table.borrowed(seen) as fd:
        waiting = array.array("i", [0])
        fcntl.ioctl(fd, termios.FIONREAD, waiting)
    watches.sort(key=lambda watch: watch.number)
    return Captured(
        f"inotify of {len(watches)} paths", State(watches=tuple(watches), lost=waiting[0])
    )


def _path(table: Table, number: int, fields: dict[bytes, bytes]) -> bytes:
    handle, kind = bytes.fromhex(fields[b"f_handle"].decode()), int(fields[b"fhandle-type"], 16)
    inode = int(fields[b"ino"], 16)
    for mount in _mounts(table, int(fields[b"sdev"], 16)):
        try:
            directory = os.open(mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fd = fdcalls.open_handle(directory, kind, handle)
        except OSError:
            continue
        finally:
            os.close(directory)
        path = os.readlink(os.fsencode(f"/proc/self/fd/{fd}"))
        os.close(fd)
        try:
            if os.stat(path).st_ino == inode:
                return path
        except OSError:
            continue
    raise Cannot(f"inotify, watch {number}: inode {inode} has no path here")


def _mounts(table: Table, device: int) -> list[bytes]:
    """Where the file system with this s_dev (12 bits major, 20 minor) is mounted."""
    wanted = b"%d:%d" % (device >> 20, device & 0xFFFFF)
    found = []
    for line in procfs.read(table.pid, "mountinfo").splitlines():
        fields = line.split()
        if fields[2] == wanted:
            found.append(_unescaped(fields[4]))
    return found


def _unescaped(path: bytes) -> bytes:
    """mountinfo writes space, tab, newline and backslash as three octal digits."""
    for code in (b"040", b"011", b"012", b"134"):
        path = path.replace(b"\\" + code, bytes([int(code, 8)]))
    return path


# --- restore -------------------------------------------------------------------------------------


def open(file: OpenFile, opening: Opening) -> int:
    state = state_of(file, State)
    fd = fdcalls.inotify_create(os.O_NONBLOCK)
    spare = os.memfd_create("spare", os.MFD_CLOEXEC)
    try:
        last = 0
        for watch in state.watches:
            for _ in range(last + 1, watch.number):  # numbers that are free by now
                unused = fdcalls.inotify_add(fd, b"/proc/self/fd/%d" % spare, _IN_MODIFY)
                fdcalls.inotify_remove(fd, unused)
                os.read(fd, _EVENT_BYTES)  # IN_IGNORED
            try:
                last = fdcalls.inotify_add(fd, watch.path, watch.mask)
            except OSError as error:
                last = watch.number - 1
                opening.warn(file, f"{os.fsdecode(watch.path)} is not watched: {error.strerror}")
    finally:
        os.close(spare)
    if state.lost:
        opening.warn(file, f"{state.lost} bytes of events that waited are lost")
    os.set_blocking(fd, not file.flags & os.O_NONBLOCK)
    return fd
