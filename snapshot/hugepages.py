"""Huge pages of hugetlbfs that an image needs, and whether this machine has them.

They come from a pool of fixed size: a mapping without MAP_NORESERVE reserves all of its pages when
it is made, others are taken when they are written to, and where there is none left, by SIGBUS. So
they are counted before anything is done.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from .errors import RestoreError
from .kernel import hugetlb
from .lazy import PageSource
from .manifest import OBJECT_SPACE, Manifest, SharedObject
from .ranges import Ranges
from .units import PAGE, align_down, count, mib


def check(manifest: Manifest, source: PageSource) -> None:
    """RestoreError when a pool has not the pages that a restore of the image takes from it."""
    lacking, hint = [], ""
    for size, needed in sorted(needs(manifest, source).items()):
        pool = hugetlb.pool(size)
        if pool is None:
            what = "this kernel has none of that size"
            lacking.append(f"{count(needed, 'page')} of {mib(size)}: {what}")
            hint = hint or "ls /sys/kernel/mm/hugepages"
        elif needed > pool.free:
            lacking.append(
                f"{count(needed, 'page')} of {mib(size)}: {pool.free} of {pool.total} are free"
            )
            hint = hint or hugetlb.enlarge(size, pool.total + needed - pool.free)
    if lacking:
        raise RestoreError(
            "\n  - ".join([f"image {manifest.image} needs huge pages of hugetlbfs:", *lacking]),
            hint,
        )


def needs(manifest: Manifest, source: PageSource) -> dict[int, int]:
    """Page size → how many pages of hugetlbfs a restore uses or reserves."""
    found: dict[int, int] = {}
    for process in manifest.processes:
        for mapping in process.mappings:
            if mapping.page_size == PAGE or mapping.kind != "anon":
                continue
            taken = Ranges([(mapping.start, mapping.end)])
            if "nr" in mapping.vm_flags:
                place = (process.index, mapping.start, mapping.end)
                taken = Ranges(_in_use(source, *place, mapping.page_size))
            _add(found, mapping.page_size, taken)
    for shared in manifest.objects:
        if shared.page_size > PAGE:
            _add(found, shared.page_size, _of_object(manifest, shared, source))
    return found


def _add(found: dict[int, int], page_size: int, taken: Ranges) -> None:
    if taken.size:
        found[page_size] = found.get(page_size, 0) + taken.size // page_size


def _of_object(manifest: Manifest, shared: SharedObject, source: PageSource) -> Ranges:
    """What has content, and what a mapping will reserve; offsets in the object."""
    place = (OBJECT_SPACE + shared.id, 0, shared.size)
    taken = Ranges(_in_use(source, *place, shared.page_size))
    for process in manifest.processes:
        for mapping in process.mappings:
            if mapping.object == shared.id and "nr" not in mapping.vm_flags:
                taken.add(mapping.offset, mapping.offset + mapping.size)
    return taken


def _in_use(
    source: PageSource, space: int, start: int, end: int, page_size: int
) -> Iterator[tuple[int, int]]:
    """The huge pages of [start, end) that hold anything but zeros. One chunk of each is enough."""
    known = source.addresses(space)
    done = start
    for address in known[bisect_left(known, start) : bisect_left(known, end)]:
        chunk = source.chunk(space, address) if address >= done else None
        if chunk is not None and chunk.nonzero:
            page = align_down(address, page_size)
            done = page + page_size
            yield page, done
