"""Memory outside any one process, made again in `snap`: shared anonymous memory, memfds, tmpfs.

Each object is filled from the image before the new process exists; it inherits the descriptors.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Callable

from .address_space import MAP_NORESERVE
from .errors import RestoreError
from .kernel import filesystem, hugetlb
from .lazy import PageSource
from .manifest import OBJECT_SPACE, SharedObject
from .units import CHUNK, MIB, PAGE, PAGES_PER_CHUNK, align_down, align_up

_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_F_SEAL_SEAL = 1
_ZEROS = bytes(MIB)


def open_all(
    objects: tuple[SharedObject, ...], source: PageSource, warnings: list[str]
) -> dict[int, int]:
    """SharedObject.id -> descriptor of ours, its bytes those of T0. RestoreError lists those that
    cannot be made; then none is left open."""
    opened: dict[int, int] = {}
    problems: list[str] = []
    try:
        for one in objects:
            try:
                fd = opened[one.id] = _MAKERS[one.kind](one, warnings)
                (_fill if one.page_size == PAGE else _fill_huge)(fd, one, source)
                if one.seals and fcntl.fcntl(fd, _F_GET_SEALS) != one.seals:
                    fcntl.fcntl(fd, _F_ADD_SEALS, one.seals)
            except OSError as error:
                problems.append(f"{_label(one)}: {error.strerror}")
            except _Problem as problem:
                problems.append(f"{_label(one)}: {problem}")
        if problems:
            raise RestoreError(
                "\n  - ".join(["shared memory cannot be made again:", *problems]),
                "snap show IMAGE",
            )
    except BaseException:
        for fd in opened.values():
            os.close(fd)
        raise
    return opened


class _Problem(Exception):
    pass


def _label(one: SharedObject) -> str:
    name = os.fsdecode(one.name)
    return {"anon": "shared anonymous memory", "memfd": f"memfd {name}"}.get(one.kind, name)


def _memfd(one: SharedObject, warnings: list[str]) -> int:
    """Sealable unless the seal that forbids sealing is all it has (memfd_create without
    MFD_ALLOW_SEALING)."""
    name = os.fsdecode(one.name)
    flags = os.MFD_CLOEXEC | (0 if one.seals == _F_SEAL_SEAL else os.MFD_ALLOW_SEALING)
    fd = os.memfd_create(name, flags | hugetlb.memfd_flags(one.page_size))
    os.ftruncate(fd, one.size)
    os.fchmod(fd, one.mode)
    return fd


def _anonymous(one: SharedObject, warnings: list[str]) -> int:
    """MAP_SHARED | MAP_ANONYMOUS has no descriptor but the one in map_files, which only
    CAP_CHECKPOINT_RESTORE (or CAP_SYS_ADMIN) may open."""
    flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
    if one.page_size > PAGE:  # the new process reserves what it did
        flags |= MAP_NORESERVE | hugetlb.map_flags(one.page_size)
    area = mmap.mmap(-1, align_up(one.size, PAGE), flags=flags)
    try:
        with open("/proc/self/maps", "rb") as maps:
            start = _address(area)
            line = next(row for row in maps if int(row.split(b"-")[0], 16) <= start < _end(row))
        return os.open(b"/proc/self/map_files/" + line.split()[0], os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        warnings.append("shared anonymous memory came back as a memfd (no CAP_CHECKPOINT_RESTORE)")
        flags = os.MFD_CLOEXEC | hugetlb.memfd_flags(one.page_size)
        fd = os.memfd_create("shared", flags)
        os.ftruncate(fd, one.size)
        return fd
    finally:
        area.close()


def _address(area: mmap.mmap) -> int:
    import ctypes

    pointer = ctypes.c_char.from_buffer(area)
    address = ctypes.addressof(pointer)
    del pointer
    return address


def _end(row: bytes) -> int:
    return int(row.split()[0].split(b"-")[1], 16)


def _tmpfs(one: SharedObject, warnings: list[str]) -> int:
    """A file with a name keeps it, and gets the bytes of T0; one without is made without.

    Never outside of a tmpfs: an image must not be able to write to any file of its choice."""
    if not one.linked:
        return _unnamed(one, warnings)
    directory = os.open(os.path.dirname(one.name), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = _named(one, directory, os.path.basename(one.name))
    finally:
        os.close(directory)
    try:
        os.ftruncate(fd, one.size)
        for start, end in list(filesystem.data_ranges(fd, one.size)):
            for offset in range(start, end, len(_ZEROS)):
                os.pwrite(fd, _ZEROS[: end - offset], offset)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _named(one: SharedObject, directory: int, name: bytes) -> int:
    """The file of T0, or a new one where there is none; not a byte of it is changed yet."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    if filesystem.type_of(directory) != filesystem.TMPFS_MAGIC:
        raise _Problem("its directory is no tmpfs now")
    try:
        fd = os.open(name, flags, dir_fd=directory)
    except FileNotFoundError:
        fd = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory)
        os.fchmod(fd, one.mode & 0o777)  # whose it will be is not said: never setuid
        return fd
    found = os.fstat(fd)
    same = (found.st_dev, found.st_ino) == (one.device, one.inode)
    if not same or not stat.S_ISREG(found.st_mode):
        os.close(fd)
        raise _Problem("another file has this name now")
    if filesystem.type_of(fd) != filesystem.TMPFS_MAGIC:
        os.close(fd)
        raise _Problem("it is in no tmpfs now")
    return fd


def _unnamed(one: SharedObject, warnings: list[str]) -> int:
    directory = os.path.dirname(one.name) or b"/dev/shm"
    try:
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, one.mode)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EACCES, errno.EOPNOTSUPP, errno.EROFS):
            raise
        fd = os.memfd_create(os.path.basename(os.fsdecode(one.name)), os.MFD_CLOEXEC)
        warnings.append(f"{os.fsdecode(one.name)} (deleted) came back as a memfd")
    os.ftruncate(fd, one.size)
    return fd


_MAKERS: dict[str, Callable[[SharedObject, list[str]], int]] = {
    "memfd": _memfd,
    "anon": _anonymous,
    "tmpfs": _tmpfs,
}


def _fill(fd: int, one: SharedObject, source: PageSource) -> None:
    space = OBJECT_SPACE + one.id
    for address in source.addresses(space):
        content = source.chunk(space, address)
        if content is None:
            continue
        for page in range(PAGES_PER_CHUNK):
            offset = address + page * PAGE
            if content.nonzero >> page & 1 and offset < one.size:
                length = min(PAGE, one.size - offset)
                os.pwrite(fd, content.data[page * PAGE : page * PAGE + length], offset)


def _fill_huge(fd: int, one: SharedObject, source: PageSource) -> None:
    """hugetlbfs knows no write(2). A page is allocated before it is touched, for where the pool has
    none that is an error and not a SIGBUS; one of zeros is not."""
    space = OBJECT_SPACE + one.id
    if not one.size:
        return
    allocated = -1
    with mmap.mmap(fd, one.size, flags=mmap.MAP_SHARED | MAP_NORESERVE) as area:
        for address in source.addresses(space):
            content = source.chunk(space, address)
            if content is None or not content.nonzero:
                continue
            page = align_down(address, one.page_size)
            if page != allocated:
                os.posix_fallocate(fd, page, one.page_size)
                allocated = page
            area[address : address + CHUNK] = content.data
