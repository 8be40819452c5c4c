"""Bytes of an image into the memory of a stopped process, before it runs.

All that is mapped empty for an eager restore; for a lazy one only what cannot wait: dirty pages of
private file mappings (no userfaultfd there), locked memory, and huge pages of hugetlbfs, which a
userfaultfd takes only whole.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence

from .kernel.ptrace import Tracee
from .lazy import Content, PageSource
from .manifest import Mapping, Process
from .ranges import Ranges
from .units import CHUNK, PAGE, PAGES_PER_CHUNK, align_down

_BATCH = 32
"""Chunks that one worker does in a row."""


def private(process: Process) -> list[Mapping]:
    """Mappings whose bytes are in the image under the process's own addresses."""
    return [one for one in process.mappings if one.kind == "anon" or _is_private_file(one)]


def _is_private_file(mapping: Mapping) -> bool:
    return mapping.kind == "file" and not mapping.shared


def lazy_ranges(process: Process) -> list[tuple[int, int]]:
    """What a page server may bring later: anonymous private memory in small pages that is not
    locked."""
    return [
        (mapping.start, mapping.end)
        for mapping in process.mappings
        if mapping.kind == "anon"
        and mapping.page_size == PAGE
        and not {"lo", "dp"} & set(mapping.vm_flags)
    ]


def at_once(process: Process) -> Ranges:
    """What a page server cannot bring: the rest of `private`."""
    ranges = Ranges((mapping.start, mapping.end) for mapping in private(process))
    for start, end in lazy_ranges(process):
        ranges.remove(start, end)
    return ranges


def fill(
    source: PageSource,
    process: Process,
    ranges: Ranges,
    tracee: Tracee,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Writes the bytes of `ranges`; what is not mapped there or not in the image is passed over.
    `progress` is told the bytes written so far. -> bytes written.

    Memory that nobody has touched yet is zeros: pages of zeros are not written, unless they hide
    bytes of a file.
    """
    mappings = _Mappings(private(process))
    known = source.addresses(process.index)
    near = _within(known, ranges)
    todo = [address for address in near if mappings.wanted(address, ranges)]
    space = process.index

    def work(addresses: Sequence[int]) -> int:
        written = 0
        for address in addresses:
            content = source.chunk(space, address)
            if content is None:
                continue
            for start, end in mappings.runs(address, content, ranges):
                tracee.write(start, bytes(content.data[start - address : end - address]))
                written += end - start
        return written

    done = 0
    batches = [todo[i : i + _BATCH] for i in range(0, len(todo), _BATCH)]
    if len(batches) < 2:
        return work(todo)
    from concurrent.futures import ThreadPoolExecutor  # not for a lazy restore

    with ThreadPoolExecutor(os.cpu_count() or 1) as workers:
        for written in workers.map(work, batches):
            done += written
            progress(done)
    return done


def _within(known: Sequence[int], ranges: Ranges) -> Iterator[int]:
    """The chunks that any of the ranges touches: few of very many, in a lazy restore."""
    position = 0
    for start, end in ranges:
        first = bisect_left(known, align_down(start, CHUNK), position)
        position = bisect_left(known, end, first)
        yield from known[first:position]


class _Mappings:
    """Sorted, to find those of a chunk."""

    def __init__(self, mappings: Iterable[Mapping]) -> None:
        self._all = sorted(mappings, key=lambda mapping: mapping.start)
        self._starts = [mapping.start for mapping in self._all]
        self._ends = [mapping.end for mapping in self._all]

    def wanted(self, address: int, ranges: Ranges) -> bool:
        """Whether any of the chunk is mapped and in `ranges`."""
        return any(
            ranges.overlaps(max(one.start, address), min(one.end, address + CHUNK))
            for one in self._of(address)
        )

    def runs(self, address: int, content: Content, ranges: Ranges) -> Iterator[tuple[int, int]]:
        """[start, end) of the process to be written from the chunk at `address`."""
        for mapping in self._of(address):
            start, end = max(mapping.start, address), min(mapping.end, address + CHUNK)
            bits = content.present if mapping.kind == "file" else content.nonzero
            for low, high in ranges.within(start, end):
                yield from _runs(bits, address, low, high)

    def _of(self, address: int) -> list[Mapping]:
        first = bisect_right(self._ends, address)
        last = bisect_left(self._starts, address + CHUNK)
        return self._all[first:last]


def _runs(bits: int, address: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Runs of set pages of [start, end), which lies in the chunk at `address`."""
    run = -1
    for page in range(PAGES_PER_CHUNK + 1):
        at = address + page * PAGE
        inside = page < PAGES_PER_CHUNK and bits >> page & 1 and start <= at < end
        if inside and run < 0:
            run = at
        elif not inside and run >= 0:
            yield run, at
            run = -1
