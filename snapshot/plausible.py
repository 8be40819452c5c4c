"""Whether a manifest can be true: checked in one place, before anything is done by it. Pure.

A checksum says that bytes are those that were written, not that whoever wrote them meant well. The
numbers here are limits of the kernel where it has any, and else far above what a take ever writes.
How long the lists may be is said where they are declared (manifest.py): that is checked before they
take memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NoReturn

from .errors import DamagedError
from .manifest import OBJECT_SPACE, Manifest, MappedFile, Mapping, Process, SharedObject, Thread
from .units import PAGE, PAGE_SIZES

USER_END = (1 << 47) - PAGE
"""The end of user memory, 47 bits (x86-64)."""
VSYSCALL = 0xFFFF_FFFF_FF60_0000
MAX_PID = 1 << 22
"""PID_MAX_LIMIT."""
MAX_FD = 1 << 20
"""fs.nr_open as the kernel starts with it."""
MAX_PATH = 4096
MAX_XSTATE = 1 << 16
REGISTERS, SIGINFO = 216, 128
_U32, _U64, _I63 = 1 << 32, 1 << 64, 1 << 63
_YEAR_9999 = 253_402_300_800


class _Wrong(Exception):
    pass


def check(manifest: Manifest) -> None:
    """DamagedError names the first thing that no take can have written."""
    try:
        _manifest(manifest)
    except _Wrong as wrong:
        raise DamagedError(
            f"image {manifest.image!r} says what cannot be: {wrong}", "snap verify IMAGE"
        ) from None


def _manifest(manifest: Manifest) -> None:
    if not (math.isfinite(manifest.taken_at) and 0 <= manifest.taken_at < _YEAR_9999):
        _wrong(f"it was taken at {manifest.taken_at}")
    if not manifest.processes:
        _wrong("it has no process")
    _unique("process index", (one.index for one in manifest.processes), OBJECT_SPACE)
    _unique("pid", (one.pid for one in manifest.processes), MAX_PID, 1)
    _unique("mapped file", (one.id for one in manifest.files), _I63)
    _unique("shared object", (one.id for one in manifest.objects), _U32 - OBJECT_SPACE)
    for file in manifest.files:
        _mapped_file(file)
    for shared in manifest.objects:
        _object(shared)
    files = {file.id for file in manifest.files}
    objects = {shared.id: shared.page_size for shared in manifest.objects}
    for process in manifest.processes:
        _process(process, files, objects)


def _process(process: Process, files: set[int], objects: dict[int, int]) -> None:
    for name, number in (("ppid", process.ppid), ("pgid", process.pgid), ("sid", process.sid)):
        _number(name, number, MAX_PID + 1)
    _number("start time", process.start_ticks, _U64)
    _number("umask", process.umask, 0o1000)
    _number("personality", process.personality, _U32)
    _text("comm", process.comm)
    for name, path in (("exe", process.exe), ("cwd", process.cwd), ("root", process.root)):
        _path(name, path)
    for name in process.layout.__struct_fields__[:-1]:
        _number(name, getattr(process.layout, name), _U64)
    if len(process.layout.auxv) > PAGE:
        _wrong(f"an auxiliary vector of {len(process.layout.auxv)} bytes")
    _mappings(process.mappings, files, objects)
    _threads(process)
    _pending(process.pending)
    _descriptors(process)


def _mappings(mappings: Iterable[Mapping], files: set[int], objects: dict[int, int]) -> None:
    """`objects`: SharedObject.id → its page size."""
    end = 0
    for one in mappings:
        where = f"the mapping {one.start:#x}-{one.end:#x}"
        if not one.start < one.end or one.start % PAGE or one.end % PAGE:
            _wrong(f"{where} is none")
        if one.start < end:
            _wrong(f"{where} overlaps or precedes the one before it, which ends at {end:#x}")
        end = one.end
        if not 0 <= one.start < one.end <= USER_END and not (
            one.kind == "vsyscall" and one.start == VSYSCALL and one.size == PAGE
        ):
            _wrong(f"{where} is outside of user memory")
        if not 0 <= one.prot <= 7:
            _wrong(f"{where} has the protection {one.prot}")
        if not 0 <= one.offset < _I63 - one.size or one.offset % PAGE:
            _wrong(f"{where} is at {one.offset} of its file")
        if one.kind == "file" and one.file not in files:
            _wrong(f"{where} is of file {one.file}, which the image does not have")
        if one.kind == "shared" and (one.object not in objects or not one.shared):
            _wrong(f"{where} is of shared object {one.object}, which the image does not have")
        _page_size(where, one.page_size, one.start, one.end, one.offset)
        huge = one.page_size > PAGE
        own = one.page_size if one.object is None else objects.get(one.object, PAGE)
        fits = one.kind in ("anon", "shared") or not huge
        if not fits or own != one.page_size or huge != ("ht" in one.vm_flags):
            _wrong(f"{where}, of kind {one.kind}, has pages of {one.page_size} bytes")
        _text(where, one.name)


def _threads(process: Process) -> None:
    if not process.threads or process.threads[0].tid != process.pid:
        _wrong(f"the first thread of process {process.pid} is not its leader")
    _unique("thread", (thread.tid for thread in process.threads), MAX_PID, 1)
    for thread in process.threads:
        for what, number in _numbers(thread):
            _number(f"thread {thread.tid}: {what}", number, _U64)
        _text(f"thread {thread.tid}", thread.comm)
        if len(thread.registers) != REGISTERS:
            _wrong(f"thread {thread.tid} has {len(thread.registers)} bytes of registers")
        if len(thread.xstate) > MAX_XSTATE:
            _wrong(f"thread {thread.tid} has {len(thread.xstate)} bytes of CPU state")
        _pending(thread.pending)


def _numbers(thread: Thread) -> Iterator[tuple[str, int]]:
    yield "signal mask", thread.signal_mask
    yield "clear_child_tid", thread.clear_child_tid
    for number in thread.altstack:
        yield "altstack", number
    for number in thread.robust_list:
        yield "robust list", number
    if thread.rseq is not None:
        for name in thread.rseq.__struct_fields__:
            yield f"rseq {name}", getattr(thread.rseq, name)


def _descriptors(process: Process) -> None:
    files = {file.id for file in process.files}
    _unique("open file", (file.id for file in process.files), _U32)
    _unique("descriptor", (one.fd for one in process.descriptors), MAX_FD)
    for one in process.descriptors:
        if one.file not in files:
            _wrong(f"descriptor {one.fd} is of open file {one.file}, which there is none of")
    for file in process.files:
        _number(f"open file {file.id}: flags", file.flags, _U32)
        _number(f"open file {file.id}: offset", file.offset, _I63)
        if file.owner and not all(-_U32 < number < _U32 for number in file.owner):
            _wrong(f"open file {file.id} has the owner {file.owner}")


def _mapped_file(file: MappedFile) -> None:
    _path("mapped file", file.path, absolute=True)
    _number(f"mapped file {file.id}: size", file.size, _I63)


def _object(shared: SharedObject) -> None:
    what = f"shared object {shared.id}"
    _number(f"{what}: size", shared.size, USER_END)
    _number(f"{what}: seals", shared.seals, _U32)
    _number(f"{what}: mode", shared.mode, 0o10000)
    _path(what, shared.name, absolute=shared.kind == "tmpfs")
    if shared.page_size > PAGE:  # another one's last page may be half a page
        _page_size(what, shared.page_size, shared.size)
    if shared.page_size < PAGE or (shared.page_size > PAGE and shared.kind == "tmpfs"):
        _wrong(f"{what} has pages of {shared.page_size} bytes")


def _page_size(what: str, size: int, *multiples: int) -> None:
    """Huge pages of hugetlbfs are never mapped in part."""
    if size not in PAGE_SIZES or any(number % size for number in multiples):
        _wrong(f"{what} has pages of {size} bytes")


def _pending(infos: Iterable[bytes]) -> None:
    for info in infos:
        if len(info) != SIGINFO:
            _wrong(f"a pending signal of {len(info)} bytes")


def _unique(what: str, numbers: Iterable[int], end: int, start: int = 0) -> None:
    seen = set()
    for number in numbers:
        if not start <= number < end:
            _wrong(f"{what} {number}")
        if number in seen:
            _wrong(f"{what} {number} is there twice")
        seen.add(number)


def _number(what: str, number: int, end: int) -> None:
    if not 0 <= number < end:
        _wrong(f"{what} {number}")


def _text(what: str, text: bytes) -> None:
    if b"\0" in text or len(text) > MAX_PATH:
        _wrong(f"{what} has a name of {len(text)} bytes with {text.count(0)} zeros")


def _path(what: str, path: bytes, absolute: bool = False) -> None:
    """The kernel never says `..`: such a path was made up to lead somewhere else."""
    _text(what, path)
    if b".." in path.split(b"/") or (absolute and not path.startswith(b"/")):
        _wrong(f"{what} has the path {path[:200]!r}")


def _wrong(what: str) -> NoReturn:
    raise _Wrong(what)
