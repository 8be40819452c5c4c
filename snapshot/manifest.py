"""What an image says of its processes, and its versioned bytes.

Pure: no I/O. The memory itself is in the store's chunks; the manifest is everything else. State
that one resource module both captures and rebuilds is kept as that module's own encoded bytes
(`Raw`), so that a new kind of resource changes neither this file nor the format.

Addresses and sizes are bytes; ranges are half open; times are nanoseconds where named `_ns`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec

from .errors import DamagedError, UnsupportedError
from .units import PAGE

MAGIC = b"SNAPMAN\n"
VERSION = 1
MAX_BYTES = 256 * 1024 * 1024
"""A larger manifest is refused unread: an image may come from somebody else."""

T = TypeVar("T")

# How many a manifest may hold: a list is refused by its length, before it takes memory.
_Words = Annotated[tuple[str, ...], msgspec.Meta(max_length=1 << 16)]
_Flags = Annotated[tuple[str, ...], msgspec.Meta(max_length=64)]
_Signals = Annotated[tuple[bytes, ...], msgspec.Meta(max_length=1 << 16)]
_Arguments = Annotated[tuple[bytes, ...], msgspec.Meta(max_length=1 << 21)]
_Counts = Annotated[dict[str, int], msgspec.Meta(max_length=256)]
_States = Annotated[dict[str, msgspec.Raw], msgspec.Meta(max_length=256)]


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all that is stored: immutable, keyword only, unknown fields refused."""


MappingKind = Literal[
    "anon",  # private anonymous memory: heap, stacks, mmap
    "file",  # private or shared mapping of a file that is opened again at restore
    "shared",  # a window into a SharedObject (shared anonymous, memfd, tmpfs)
    "vdso",  # vdso, vvar: the kernel's own, put back with ARCH_MAP_VDSO_64
    "vsyscall",  # the same in every process, never touched
]


class Mapping(Record, frozen=True):
    """One line of /proc/PID/maps at T0 with what smaps adds."""

    start: int
    end: int
    prot: int  # PROT_READ 1 | PROT_WRITE 2 | PROT_EXEC 4
    shared: bool  # MAP_SHARED
    kind: MappingKind
    offset: int = 0  # into the file or the shared object
    device: int = 0  # st_dev of the file, 0 without one
    inode: int = 0
    name: bytes = b""  # as in maps: a path, [heap], [stack], [anon:…] or nothing
    vm_flags: _Flags = ()  # smaps VmFlags, e.g. ("rd", "wr", "mr", "mw", "me", "ac")
    object: int | None = None  # SharedObject.id for kind "shared"
    file: int | None = None  # MappedFile.id for kind "file"
    page_size: int = PAGE  # KernelPageSize; a larger one: huge pages of hugetlbfs

    @property
    def size(self) -> int:
        return self.end - self.start


class MappedFile(Record, frozen=True):
    """A file that mappings of kind "file" need again, and how to know that it is the same."""

    id: int
    path: bytes
    device: int
    inode: int
    size: int
    mtime_ns: int
    writable: bool  # must be opened O_RDWR (a MAP_SHARED mapping that could be written)


class SharedObject(Record, frozen=True):
    """Memory outside any one process; its bytes are chunks of space OBJECT_SPACE + id."""

    id: int
    kind: Literal["anon", "memfd", "tmpfs"]
    name: bytes  # of the memfd (without "/memfd:"), or the path of a tmpfs file
    device: int
    inode: int
    size: int
    seals: int = 0  # F_GET_SEALS of a memfd
    mode: int = 0o600
    linked: bool = False  # a tmpfs file that still has a name
    page_size: int = PAGE  # a larger one: huge pages of hugetlbfs


OBJECT_SPACE = 1 << 16
"""Chunk keys carry a space: 0 … is the process index, OBJECT_SPACE + id a shared object, whose
addresses are offsets in the object."""


class Rseq(Record, frozen=True):
    address: int
    size: int
    signature: int
    flags: int = 0
    critical_section: int = 0  # the 8 bytes at address + 8 (rseq_cs) at T0


class Thread(Record, frozen=True):
    tid: int
    comm: bytes
    registers: bytes  # struct user_regs_struct (216 bytes on x86-64), as the kernel reported at T0
    xstate: bytes  # NT_X86_XSTATE: the XSAVE area
    signal_mask: int  # bit n-1 is signal n
    altstack: tuple[int, int, int] = (0, 2, 0)  # ss_sp, ss_flags, ss_size
    robust_list: tuple[int, int] = (0, 0)  # head address, length
    clear_child_tid: int = 0
    rseq: Rseq | None = None
    pending: _Signals = ()  # siginfo (128 bytes each) queued for this thread
    state: _States = {}  # other resource modules, by NAME (e.g. "scheduling")


class OpenFile(Record, frozen=True):
    """One struct file: descriptors that share it (dup, fork) share offset and flags."""

    id: int
    kind: str  # NAME of the module in snapshot/resources that rebuilds it
    label: str  # for people: a path, "pipe:[123]", "tcp 127.0.0.1:6379 listening"
    flags: int = 0  # open(2) flags of /proc/PID/fdinfo, without O_CLOEXEC
    offset: int = 0
    closed: bool = False  # comes back as an ended connection
    owner: tuple[int, int, int] | None = None  # O_ASYNC: F_OWNER_*, whom to signal, F_GETSIG
    state: msgspec.Raw = msgspec.Raw(b"\xc0")  # the module's own


class Descriptor(Record, frozen=True):
    fd: int
    file: int  # OpenFile.id
    cloexec: bool = False


class MemoryLayout(Record, frozen=True):
    """struct prctl_mm_map: the fields of mm that PR_SET_MM_MAP puts back. auxv as raw bytes."""

    start_code: int
    end_code: int
    start_data: int
    end_data: int
    start_brk: int
    brk: int
    start_stack: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int
    auxv: bytes


class Process(Record, frozen=True):
    index: int  # the space of its private memory
    pid: int
    ppid: int
    pgid: int
    sid: int
    comm: bytes
    cmdline: _Arguments
    start_ticks: int  # field 22 of /proc/PID/stat: with pid and boot id it names the process
    exe: bytes
    cwd: bytes
    root: bytes
    umask: int
    personality: int
    layout: MemoryLayout
    mappings: Annotated[tuple[Mapping, ...], msgspec.Meta(max_length=1 << 17)]
    threads: Annotated[tuple[Thread, ...], msgspec.Meta(max_length=1 << 15)]  # the leader first
    files: Annotated[tuple[OpenFile, ...], msgspec.Meta(max_length=1 << 17)]
    descriptors: Annotated[tuple[Descriptor, ...], msgspec.Meta(max_length=1 << 20)]
    pending: _Signals = ()  # siginfo queued for the whole process
    stopped: bool = False  # by SIGSTOP or another stop signal: it waits for SIGCONT
    state: _States = {}  # resource modules by NAME: "signals", "timers", …


class Host(Record, frozen=True):
    boot_id: str
    kernel: str  # uname release
    machine: str  # "x86_64"
    vdso: bytes  # BLAKE3 (16 bytes) of the vdso's bytes
    xcr0: int = 0  # XFEATURE mask in the XSAVE area's header layout


class TakeStats(Record, frozen=True):
    """What a take measured; also its `--json` (docs/cli-contract.md)."""

    threads: int = 0
    regions: int = 0
    pause_us: int = 0  # all stops of all attempts: from the first thread stopped to the last let go
    longest_stop_us: int = 0
    armed_bytes: int = 0
    rounds: int = 0  # of copying ahead of T0
    ahead_bytes: int = 0  # copied in them; what was copied twice counts twice
    remainder_bytes: int = 0  # what had no good copy when T0 came
    guarded: bool = False  # the remainder was copied in the pause, whatever its size
    writers: str = "wait"  # for their page to be saved, or "pass"
    listed: bool = False  # T0 looked at the pages that faults were listed of, and not at all
    saved_bytes: int = 0
    stored_bytes: int = 0
    faults: int = 0
    fault_chunks: int = 0
    fault_pages: int = 0
    sweep_chunks: int = 0
    spilled_chunks: int = 0
    events: int = 0
    attempts: int = 1
    retry_reasons: _Words = ()
    seconds: float = 0.0
    peak_staging_bytes: int = 0
    stages_us: _Counts = {}  # where the pause went: "freeze", "capture", "arm", …


class Manifest(Record, frozen=True):
    image: str
    taken_at: float  # seconds since the epoch, T0
    host: Host
    processes: Annotated[tuple[Process, ...], msgspec.Meta(max_length=1 << 15)]
    files: Annotated[tuple[MappedFile, ...], msgspec.Meta(max_length=1 << 17)] = ()
    objects: Annotated[tuple[SharedObject, ...], msgspec.Meta(max_length=1 << 17)] = ()
    stats: TakeStats = TakeStats()
    warnings: _Words = ()


_decoder = msgspec.msgpack.Decoder(Manifest)


def encode(manifest: Manifest) -> bytes:
    """MAGIC, version (2 bytes, big endian), msgpack of the Manifest (keyed by field names)."""
    return MAGIC + VERSION.to_bytes(2, "big") + msgspec.msgpack.encode(manifest)


def decode(data: bytes | memoryview) -> Manifest:
    """The inverse of `encode`.

    Raises UnsupportedError for a later version, DamagedError for anything that is no manifest.
    """
    head = len(MAGIC) + 2
    if len(data) > MAX_BYTES:
        raise DamagedError(f"manifest of {len(data)} bytes, more than {MAX_BYTES} are refused")
    if len(data) < head or bytes(data[: len(MAGIC)]) != MAGIC:
        raise DamagedError("this is not a manifest (wrong magic)", "snap verify IMAGE")
    version = int.from_bytes(data[len(MAGIC) : head], "big")
    if version != VERSION:
        raise UnsupportedError(
            f"image format {version}; this snap reads {VERSION}", [], "pip install -U livesnap"
        )
    try:
        return _decoder.decode(data[head:])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DamagedError(f"manifest: {error}", "snap verify IMAGE") from None


def pack(state: Any) -> msgspec.Raw:
    """A resource module's own state as it goes into a manifest."""
    return msgspec.Raw(msgspec.msgpack.encode(state))


def unpack(raw: msgspec.Raw, kind: type[T]) -> T:
    """The inverse of `pack`; DamagedError when it is not a `kind`."""
    try:
        return msgspec.msgpack.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        message = f"{kind.__name__} in the manifest: {error}"
        raise DamagedError(message, "snap verify IMAGE") from None
