"""The mappings of an image, made in the new process by injected calls.

Everything of the stub goes, vdso included (only vsyscall stays), but the scratch that the calls are
made from, which lies where the image has nothing. Mappings are made empty, with their final
protection; fill.py brings the bytes.

Source of the flags: mmap(2), madvise(2), proc_pid_smaps(5) (VmFlags).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from .errors import RestoreError
from .kernel import arch_x86_64 as arch
from .kernel import hugetlb, procfs
from .kernel.arch_x86_64 import NR
from .kernel.errnames import error_name
from .kernel.remote import Call, Remote
from .manifest import Mapping, Process
from .maps import HIGHEST, LOWEST, gap, parse_maps
from .resources.context import Context, attempt, demand
from .units import PAGE

PROT_READ, PROT_WRITE = 1, 2
MAP_SHARED, MAP_PRIVATE, MAP_DROPPABLE = 0x01, 0x02, 0x08
MAP_ANONYMOUS, MAP_GROWSDOWN, MAP_NORESERVE = 0x20, 0x100, 0x4000
MAP_STACK, MAP_FIXED_NOREPLACE = 0x20000, 0x100000

_ADVICE = {
    "sr": 2,  # MADV_SEQUENTIAL
    "rr": 1,  # MADV_RANDOM
    "dc": 10,  # MADV_DONTFORK
    "mg": 12,  # MADV_MERGEABLE
    "hg": 14,  # MADV_HUGEPAGE
    "nh": 15,  # MADV_NOHUGEPAGE
    "dd": 16,  # MADV_DONTDUMP
    "wf": 18,  # MADV_WIPEONFORK
}
_PR_SET_VMA, _PR_SET_VMA_ANON_NAME = 0x53564D41, 0
_MLOCK_ONFAULT = 1


def free_place(process: Process, tid: int, size: int) -> int:
    """Where neither the image nor the new process has anything: `size` bytes, a page free on both
    sides, so that it merges with nothing."""
    lines = parse_maps(procfs.read(tid, "maps"))
    taken = [(line.start, line.end) for line in lines]
    taken += [(mapping.start, mapping.end) for mapping in process.mappings]
    found = gap(taken, size)
    if not found:
        raise RestoreError("the image has no room for a scratch page", "snap show IMAGE")
    return found


def clear(remote: Remote) -> None:
    """Unmaps all but the scratch."""
    end = remote.scratch + remote.scratch_size
    demand(
        remote,
        [
            ("munmap below the scratch", Call(NR.munmap, (LOWEST, remote.scratch - LOWEST))),
            ("munmap above the scratch", Call(NR.munmap, (end, HIGHEST - end))),
        ],
    )


def put_vdso(process: Process, remote: Remote) -> None:
    """The kernel's own mappings at their old addresses; RestoreError when they come out other than
    in the image (another kernel)."""
    wanted = [mapping for mapping in process.mappings if mapping.kind == "vdso"]
    if not wanted:
        return
    (result,) = remote.batch([Call(NR.arch_prctl, (arch.ARCH_MAP_VDSO_64, wanted[0].start))])
    if -4096 < result < 0:
        name = error_name(result)
        raise RestoreError(f"arch_prctl(ARCH_MAP_VDSO_64): {name}", "snap check")
    lines = parse_maps(procfs.read(remote.tracee.tid, "maps"))
    found = [(line.start, line.end, line.name) for line in lines if line.name in _KERNEL_OWN]
    if found != [(mapping.start, mapping.end, mapping.name) for mapping in wanted]:
        shown = ", ".join(f"{start:#x}-{end:#x} {name.decode()}" for start, end, name in found)
        raise RestoreError(
            f"the vdso of this kernel does not fit: it came out as {shown}",
            "boot the kernel that `snap show IMAGE` names",
        )
    remote.renew()


_KERNEL_OWN = (b"[vdso]", b"[vvar]", b"[vvar_vclock]")


def make(mappings: Iterable[Mapping], remote: Remote, descriptor: Callable[[Mapping], int]) -> None:
    """Makes all mappings, empty. `descriptor` is asked for those with a file or shared object and
    answers with a descriptor of the new process."""
    steps = []
    for mapping in mappings:
        if mapping.kind in ("vdso", "vsyscall"):
            continue
        backed = mapping.kind in ("file", "shared")
        fd = descriptor(mapping) if backed else -1
        offset = mapping.offset if backed else 0
        what = _describe(mapping)
        prot = mapping.prot
        if mapping.kind == "file" and "ac" in mapping.vm_flags and not mapping.shared:
            prot |= PROT_WRITE  # it was writable once, and counts as such (RELRO)
        late = _is_filled_writable(mapping)
        if late:
            prot = PROT_READ | PROT_WRITE
        args = (mapping.start, mapping.size, prot, _flags(mapping, backed), fd, offset)
        steps.append((what, Call(NR.mmap, args)))
        if prot != mapping.prot and not late:
            steps.append((what, Call(NR.mprotect, (mapping.start, mapping.size, mapping.prot))))
    results = demand(remote, steps)
    for (what, call), result in zip(steps, results, strict=True):
        if call.nr == NR.mmap and result != call.args[0]:
            raise RestoreError(f"{what}: mapped at {result:#x}", "snap check")


def advise(process: Process, remote: Remote, ctx: Context) -> None:
    """Flags and names that are given to a mapping after it was made."""
    steps = []
    for mapping in process.mappings:
        if mapping.kind in ("vdso", "vsyscall"):
            continue
        for advice, what in _advice(mapping):
            call = Call(NR.madvise, (mapping.start, mapping.size, advice))
            steps.append((f"{_describe(mapping)}: {what}", call))
    if steps:
        attempt(remote, ctx, steps)
    _name_all(process, remote, ctx)


def protect(process: Process, remote: Remote) -> None:
    """The final protection of what had to be writable to be filled."""
    demand(
        remote,
        [
            (_describe(one), Call(NR.mprotect, (one.start, one.size, one.prot)))
            for one in process.mappings
            if _is_filled_writable(one)
        ],
    )


def _is_filled_writable(mapping: Mapping) -> bool:
    """Through /proc/PID/mem nobody writes to read-only memory of hugetlbfs (until Linux 6.14)."""
    return mapping.kind == "anon" and mapping.page_size > PAGE and not mapping.prot & PROT_WRITE


def lock(process: Process, remote: Remote, ctx: Context) -> None:
    """mlock, when the bytes are there; and mseal, after which nothing can be changed."""
    steps = []
    for mapping in process.mappings:
        place = (mapping.start, mapping.size)
        if "lo" in mapping.vm_flags:
            flags = _MLOCK_ONFAULT if "lf" in mapping.vm_flags else 0
            steps.append((f"{_describe(mapping)}: mlock", Call(NR.mlock2, (*place, flags))))
        if "sl" in mapping.vm_flags and mapping.kind not in ("vdso", "vsyscall"):
            steps.append((f"{_describe(mapping)}: mseal", Call(NR.mseal, (*place, 0))))
    if steps:
        attempt(remote, ctx, steps)


def _flags(mapping: Mapping, backed: bool) -> int:
    flags = MAP_FIXED_NOREPLACE
    if not backed:
        flags |= MAP_ANONYMOUS | hugetlb.map_flags(mapping.page_size)
    if "dp" in mapping.vm_flags:
        return flags | MAP_DROPPABLE
    flags |= MAP_SHARED if mapping.shared else MAP_PRIVATE
    if "gd" in mapping.vm_flags:
        flags |= MAP_GROWSDOWN
    if "nr" in mapping.vm_flags:
        flags |= MAP_NORESERVE
    if "nh" in mapping.vm_flags and not backed:
        flags |= MAP_STACK  # else neighbouring stacks merge
    return flags


def _advice(mapping: Mapping) -> Iterator[tuple[int, str]]:
    brought = {"dp": ("wf", "dd"), "ht": ("nh",)}  # along by MAP_DROPPABLE and MAP_STACK
    given = {flag for kind in brought if kind in mapping.vm_flags for flag in brought[kind]}
    for flag in mapping.vm_flags:
        if flag in _ADVICE and flag not in given:
            yield _ADVICE[flag], f"flag {flag!r}"


def _name_all(process: Process, remote: Remote, ctx: Context) -> None:
    """Names given with PR_SET_VMA_ANON_NAME (Linux 5.17, CONFIG_ANON_VMA_NAME)."""
    steps: list[tuple[str, Call]] = []
    offset = 0
    for mapping in process.mappings:
        name = _given_name(mapping)
        if not name:
            continue
        if offset + len(name) + 1 > remote.data_size:
            attempt(remote, ctx, steps)
            steps, offset = [], 0
        address = remote.put(name + b"\0", offset)
        offset += len(name) + 1
        args = (_PR_SET_VMA, _PR_SET_VMA_ANON_NAME, mapping.start, mapping.size, address)
        steps.append((f"{_describe(mapping)}: its name", Call(NR.prctl, args)))
    if steps:
        attempt(remote, ctx, steps)


def _given_name(mapping: Mapping) -> bytes:
    for prefix in (b"[anon:", b"[anon_shmem:"):
        if mapping.name.startswith(prefix) and mapping.name.endswith(b"]"):
            return mapping.name[len(prefix) : -1]
    return b""


def _describe(mapping: Mapping) -> str:
    name = mapping.name.decode("utf-8", "backslashreplace")
    return f"mapping {mapping.start:#x}-{mapping.end:#x} {name}".rstrip()
