"""An image without a store: a process is stopped, copied whole, and let go (or killed).

Memory is read through /proc/PID/mem and pagemap; what else an image holds comes from the capture
of snapshot/resources. Rebuild and page server are tested with it, apart from take and store.
"""

from __future__ import annotations

import os
import struct
import time
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from snapshot import examine
from snapshot.freeze import freeze
from snapshot.image import Image
from snapshot.kernel import pidfd as pidfds
from snapshot.kernel import procfs, vdso
from snapshot.manifest import OBJECT_SPACE, Host, Manifest, SharedObject
from snapshot.regions import Window
from snapshot.resources import descriptors
from snapshot.resources.capture import capture_process
from snapshot.resources.memfd import SharedMemory
from snapshot.store import Store
from snapshot.units import CHUNK, PAGE, PAGES_PER_CHUNK, align_down
from snapshot.writer import RawChunk

PRESENT, SWAPPED, FILE = 1 << 63, 1 << 62, 1 << 61


class Copied(NamedTuple):
    present: int
    data: bytes
    nonzero: int


class StoppedCopy:
    """Has what rebuild and lazy need of an image: manifest, chunk, addresses, name."""

    def __init__(self, manifest: Manifest, pages: dict[int, dict[int, bytes]]) -> None:
        self.manifest = manifest
        self.name = manifest.image
        self._pages = pages
        self._addresses = {
            space: sorted({align_down(address, CHUNK) for address in found})
            for space, found in pages.items()
        }

    def addresses(self, space: int) -> Sequence[int]:
        return self._addresses.get(space, [])

    def chunk(self, space: int, address: int) -> Copied | None:
        known = self.addresses(space)
        index = bisect_left(known, address)
        if index == len(known) or known[index] != address:
            return None
        present = nonzero = 0
        data = bytearray(CHUNK)
        for page in range(PAGES_PER_CHUNK):
            found = self._pages[space].get(address + page * PAGE)
            if found is not None:
                present |= 1 << page
                nonzero |= (found != bytes(PAGE)) << page
                data[page * PAGE : (page + 1) * PAGE] = found
        return Copied(present, bytes(data), nonzero)

    def put(self, directory: Path) -> Image:
        """The same in a store; the caller closes the image."""
        with Store.open(directory, create=True) as store:
            with store.begin(self.name) as writer:
                for space in self._pages:
                    for address in self.addresses(space):
                        chunk = self.chunk(space, address)
                        assert chunk is not None
                        data = memoryview(chunk.data)
                        writer.put([RawChunk(space, address, chunk.present, data)])
                writer.commit(self.manifest)
            return store.image(self.name)

    def page(self, address: int, space: int = 0) -> bytes:
        """The bytes of T0, zeros where there was nothing."""
        return self._pages[space].get(address, bytes(PAGE))


def copy(pid: int) -> StoppedCopy:
    """The process goes on afterwards."""
    pages: dict[int, dict[int, bytes]] = {}
    with freeze(pid) as frozen:
        plan = examine.examine(pid).plan
        assert not plan.problems, plan.problems
        files, table, problems = descriptors.capture(pid, frozen.pidfd)
        assert not problems, problems
        process = capture_process(
            frozen, 0, mappings=tuple(plan.mappings), files=files, descriptors=table
        )
        frozen.close_remote()
        with (
            open(f"/proc/{pid}/mem", "rb", buffering=0) as memory,
            open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap,
        ):
            for window in plan.windows:
                _read(window, memory.fileno(), pagemap.fileno(), pages.setdefault(window.space, {}))
        shared = list(plan.objects.values())
        for key, needed in descriptors.needed(files, table).items():
            if key not in plan.objects:
                shared.append(_object(len(shared), needed))
                pages[OBJECT_SPACE + shared[-1].id] = _contents(frozen.pidfd, needed)
    uname = os.uname()
    host = Host(
        boot_id=procfs.boot_id(),
        kernel=uname.release,
        machine=uname.machine,
        vdso=vdso.digest(),
    )
    manifest = Manifest(
        image=f"copy-{pid}",
        taken_at=time.time(),
        host=host,
        processes=(process,),
        files=tuple(plan.files.values()),
        objects=tuple(shared),
    )
    return StoppedCopy(manifest, pages)


def _read(window: Window, memory: int, pagemap: int, pages: dict[int, bytes]) -> None:
    count = (window.end - window.start) // PAGE
    raw = os.pread(pagemap, count * 8, window.start // PAGE * 8)
    entries = struct.unpack(f"<{count}Q", raw) if len(raw) == count * 8 else ()
    for page, entry in enumerate(entries):
        there = entry & (PRESENT | SWAPPED)
        if not window.whole and (not there or (window.object is None and entry & FILE)):
            continue
        offset = page * PAGE
        pages[window.at + offset] = os.pread(memory, PAGE, window.start + offset)


def _object(number: int, needed: SharedMemory) -> SharedObject:
    return SharedObject(
        id=number,
        kind=needed.kind,
        name=needed.name,
        device=needed.device,
        inode=needed.inode,
        size=needed.size,
        seals=needed.seals,
        mode=needed.mode,
    )


def _contents(pidfd: int, needed: SharedMemory) -> dict[int, bytes]:
    with pidfds.borrowed(pidfd, needed.fd) as fd:
        own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    try:
        return {
            offset: os.pread(own, PAGE, offset).ljust(PAGE, b"\0")
            for offset in range(0, needed.size, PAGE)
        }
    finally:
        os.close(own)
