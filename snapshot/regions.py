"""What becomes of each mapping of a target: armed, copied in the pause, opened again, or refused.

Pure: the facts about mapped files come from the caller. Addresses and sizes are bytes, ranges are
half open: [start, end).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from msgspec.structs import replace

from .manifest import OBJECT_SPACE, MappedFile, Mapping, MappingKind, SharedObject
from .maps import HIGHEST, LOWEST, Line
from .resources.memfd import SharedMemory
from .units import PAGE, PAGE_SIZES, align_up, mib

KERNEL_OWN = (b"[vdso]", b"[vvar]", b"[vvar_vclock]")
NOWHERE = 1 << 62
"""Run-time addresses from here on stand for bytes of shared objects that nobody has mapped."""
ANON_HUGE = b"/anon_hugepage"
"""The name that the kernel gives MAP_ANONYMOUS | MAP_HUGETLB, whose file is its own."""


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What stat and the mount table say of the file behind a mapping."""

    path: bytes
    named: bool  # the path still leads to this very file
    tmpfs: bool
    character: bool  # a character device
    device: int
    inode: int
    size: int
    mtime_ns: int
    mode: int
    written: bool = False  # a descriptor of the target can write to it, or another process


@dataclass(frozen=True, slots=True)
class Window:
    """Memory that the pump saves: the target's [start, end) are the bytes of `space` from `at`."""

    space: int
    start: int
    end: int
    at: int
    armed: bool  # write-protected at T0; otherwise copied in the pause
    object: int | None = None  # SharedObject.id whose descriptor it is read from
    whole: bool = False  # every page belongs to the image, also those that are the file's
    huge: int = 0  # the size of its pages when it is private and of hugetlbfs
    fickle: bool = False  # its pages may lose their protection without an event


@dataclass(slots=True)
class Plan:
    """All mappings of one process, and what the image needs beside them."""

    space: int
    mappings: list[Mapping] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    files: dict[tuple[int, int], MappedFile] = field(default_factory=dict)  # by (device, inode)
    objects: dict[tuple[int, int], SharedObject] = field(default_factory=dict)
    object_source: dict[int, Line | SharedMemory] = field(default_factory=dict)  # to open it by
    object_ids: dict[tuple[int, int], int] = field(default_factory=dict)  # given so far
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    costs: list[str] = field(default_factory=list)  # what makes the pause long

    @property
    def armed_objects(self) -> frozenset[tuple[int, int]]:
        """(device, inode) of the shared objects of which something is armed."""
        ids = {one.object for one in self.windows if one.armed}
        return frozenset(key for key, known in self.objects.items() if known.id in ids)

    def runs(self) -> Iterator[tuple[int, int]]:
        """[start, end) of private memory that is armed, as much of it and of what is free around it
        as lies between two mappings of other kinds."""
        armed = {one.start for one in self.windows if one.armed and one.object is None}
        start, end, found = LOWEST, LOWEST, False
        for mapping in (*self.mappings, None):
            if mapping is not None and mapping.start in armed:
                found = True
                continue
            end = min(mapping.start, HIGHEST) if mapping is not None else HIGHEST
            if found:
                yield start, end
            start, found = (mapping.end if mapping is not None else end), False


def plan(
    lines: Iterable[Line],
    space: int,
    facts: Callable[[Line], FileFacts | None],
    needed: Iterable[SharedMemory] = (),
    earlier: Plan | None = None,
) -> Plan:
    """`lines` are those of smaps (VmFlags decide). `facts` is asked for mappings with an inode;
    None: it is mapped no more. `needed`: the shared objects that descriptors lead to, mapped or
    not. `earlier`: a plan of the same process; what was a shared object in it keeps its id, and so
    its space."""
    made = Plan(space)
    if earlier is not None:
        made.object_ids.update(earlier.object_ids)
        # Ours by now; one that is not refuses to be registered.
        lines = [
            replace(line, vm_flags=tuple(f for f in line.vm_flags if f != "uw")) for line in lines
        ]
    for memory in needed:
        _object(made, memory)
    for line in lines:
        refusal = _refusal(line)
        if refusal:
            made.problems.append(f"{where(line)}: {refusal}")
        elif line.name == b"[vsyscall]":
            _keep(made, line, "vsyscall")
        elif line.name in KERNEL_OWN:
            _keep(made, line, "vdso")
        elif _is_huge(line) and not line.shared:
            _keep(made, line, "anon")
            _save(made, line, armed=True, huge=line.page_size)
        elif line.inode == 0 or (line.name == b"/dev/zero" and not line.shared):
            # Droppable memory ("dp") may read as zeros at any time: so it may after a restore.
            _keep(made, line, "anon")
            if "dp" not in line.vm_flags:
                _save(made, line, armed=True)
        elif (found := facts(line)) is not None:
            _file(made, line, found)
    _unmapped_parts(made)
    _count_huge(made)
    return made


def where(line: Line) -> str:
    """`7f12a000-7f12c000 rw-s /dev/dri/card0`, as a message names a mapping."""
    prot = "".join(c if line.prot & bit else "-" for c, bit in (("r", 1), ("w", 2), ("x", 4)))
    name = line.printed.decode("utf-8", "backslashreplace")
    return f"{line.start:x}-{line.end:x} {prot}{'s' if line.shared else 'p'} {name}".rstrip()


def _refusal(line: Line) -> str:
    flags = line.vm_flags
    if line.name in (*KERNEL_OWN, b"[vsyscall]"):
        return ""
    if "um" in flags or "uw" in flags or "ui" in flags:
        return "belongs to another userfaultfd"
    if "io" in flags or "pf" in flags or "mm" in flags:
        return "memory of a device"
    if "ss" in flags:
        return "a shadow stack"
    if line.name.startswith(b"/SYSV") and line.shared:
        return "System V shared memory"
    if _page_size(line) not in PAGE_SIZES:
        return f"huge pages of {mib(line.page_size)}"
    if _is_huge(line) and line.name.startswith(b"/memfd:") and not line.shared:
        return "a private mapping of a memfd in huge pages"
    if _is_huge(line) and line.name != ANON_HUGE and not line.name.startswith(b"/memfd:"):
        return "a file of hugetlbfs"
    if line.name.startswith((b"/[aio]", b"anon_inode:", b"socket:", b"/secretmem", b"[uprobes]")):
        return "memory that the kernel shares with the process"
    return ""


def _is_huge(line: Line) -> bool:
    return "ht" in line.vm_flags


def _page_size(line: Line) -> int:
    return line.page_size if _is_huge(line) else PAGE


def _keep(
    made: Plan,
    line: Line,
    kind: MappingKind,
    file: int | None = None,
    shared_object: int | None = None,
) -> None:
    made.mappings.append(
        Mapping(
            start=line.start,
            end=line.end,
            prot=line.prot,
            shared=line.shared and kind != "anon",
            kind=kind,
            offset=line.offset if kind in ("file", "shared") else 0,
            device=line.device,
            inode=line.inode,
            name=line.printed,
            vm_flags=line.vm_flags,
            file=file,
            object=shared_object,
            page_size=_page_size(line),
        )
    )


def _save(
    made: Plan, line: Line, *, armed: bool, whole: bool = False, end: int = 0, huge: int = 0
) -> None:
    end = end or line.end
    made.windows.append(
        Window(
            made.space,
            line.start,
            end,
            line.start,
            armed=armed,
            whole=whole,
            huge=huge,
            fickle="mg" in line.vm_flags or line.lazy_free > 0,
        )
    )


def _file(made: Plan, line: Line, facts: FileFacts) -> None:
    name = facts.path.decode("utf-8", "backslashreplace")
    memfd = line.name.startswith(b"/memfd:")
    nameless = memfd or (line.name in (b"/dev/zero", ANON_HUGE) and line.shared)
    if facts.character and not nameless:
        made.problems.append(f"{where(line)}: memory of the device {name}")
    elif line.shared and (nameless or facts.tmpfs):
        _shared(made, line, facts, memfd)
    elif line.shared and not facts.named:
        made.problems.append(f"{where(line)}: a shared mapping of a file that has no name any more")
    elif line.shared or facts.named:
        key = (facts.device, facts.inode)
        writable = line.shared and "mw" in line.vm_flags
        known = made.files.get(key)
        made.files[key] = MappedFile(
            id=known.id if known else len(made.files),
            path=facts.path,
            device=facts.device,
            inode=facts.inode,
            size=facts.size,
            mtime_ns=facts.mtime_ns,
            writable=writable or (known.writable if known else False),
        )
        _keep(made, line, "file", file=made.files[key].id)
        if not line.shared:
            _save(made, line, armed=False)
    else:
        # The file cannot be opened again, so its pages go into the image; those past its end
        # cannot be read by anybody (SIGBUS).
        readable = min(line.end, line.start + max(0, align_up(facts.size, PAGE) - line.offset))
        _keep(made, line, "anon")
        if readable > line.start:
            _save(made, line, armed=False, whole=True, end=readable)
        made.warnings.append(
            f"{where(line)}: the file has no name any more; its bytes are in the image and come "
            "back as private memory"
        )


def _object_id(made: Plan, key: tuple[int, int]) -> int:
    return made.object_ids.setdefault(key, len(made.object_ids))


def _object(made: Plan, memory: SharedMemory) -> None:
    known = SharedObject(
        id=_object_id(made, (memory.device, memory.inode)),
        kind=memory.kind,
        name=memory.name,
        device=memory.device,
        inode=memory.inode,
        size=memory.size,
        seals=memory.seals,
        mode=memory.mode & 0o7777,
        page_size=memory.page_size,
    )
    made.objects[memory.device, memory.inode] = known
    made.object_source[known.id] = memory


def _shared(made: Plan, line: Line, facts: FileFacts, memfd: bool) -> None:
    key = (facts.device, facts.inode)
    known = made.objects.get(key)
    if known is None:
        anonymous = line.name in (b"/dev/zero", ANON_HUGE)
        kind = "memfd" if memfd else "anon" if anonymous else "tmpfs"
        known = SharedObject(
            id=_object_id(made, key),
            kind=kind,  # type: ignore[arg-type]
            name=line.name.removeprefix(b"/memfd:") if memfd else facts.path,
            device=facts.device,
            inode=facts.inode,
            size=facts.size,
            mode=facts.mode & 0o7777,
            linked=facts.named and not memfd,
            page_size=_page_size(line),
        )
        made.objects[key] = known
        made.object_source[known.id] = line
    _keep(made, line, "shared", shared_object=known.id)
    # write(2), ftruncate and fallocate reach the object without a fault of any mapping, and another
    # process through a mapping of its own.
    length = min(line.size, max(0, align_up(known.size, PAGE) - line.offset))
    if length:
        made.windows.append(
            Window(
                OBJECT_SPACE + known.id,
                line.start,
                line.start + length,
                line.offset,
                armed=not facts.written and not _is_huge(line),
                object=known.id,
            )
        )


def _unmapped_parts(made: Plan) -> None:
    """Bytes of shared objects outside every window: nothing traps their writers, so the pause."""
    nowhere = NOWHERE
    for known in made.objects.values():
        space = OBJECT_SPACE + known.id
        covered = sorted((w.at, w.at + w.end - w.start) for w in made.windows if w.space == space)
        at = 0
        size = align_up(known.size, PAGE)
        for start, end in [*covered, (size, size)]:
            if start > at:
                made.windows.append(
                    Window(space, nowhere, nowhere + start - at, at, armed=False, object=known.id)
                )
                nowhere += start - at
            at = max(at, end)


def _count_huge(made: Plan) -> None:
    """Objects in huge pages are copied in the pause, and whole: hugetlbfs does not say where the
    holes of a file are."""
    sizes = [one.size for one in made.objects.values() if one.page_size > PAGE]
    if sizes:
        made.costs.append(
            f"{mib(sum(sizes))} of shared memory in huge pages are copied while the process stands "
            "still"
        )
