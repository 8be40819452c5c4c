"""Manifests for tests of the store: a process with one anonymous mapping, or what is asked for."""

from __future__ import annotations

from typing import Any

from snapshot.manifest import Host, Manifest, Mapping, MemoryLayout, Process, Thread
from snapshot.units import ALL_PAGES, CHUNK
from snapshot.writer import RawChunk

BASE = 0x7F00_0000_0000


def mapping(start: int = BASE, size: int = 64 * CHUNK, **fields: Any) -> Mapping:
    return Mapping(
        **{
            "start": start,
            "end": start + size,
            "prot": 3,
            "shared": False,
            "kind": "anon",
            **fields,
        }
    )


def process(*mappings: Mapping, pid: int = 100, index: int = 0) -> Process:
    layout = MemoryLayout(**dict.fromkeys(MemoryLayout.__struct_fields__[:-1], 0), auxv=b"")
    thread = Thread(tid=pid, comm=b"cat", registers=bytes(216), xstate=b"", signal_mask=0)
    return Process(
        index=index, pid=pid, ppid=1, pgid=pid, sid=pid, comm=b"cat", cmdline=(b"cat",),
        start_ticks=5, exe=b"/bin/cat", cwd=b"/", root=b"/", umask=0o22, personality=0,
        layout=layout, mappings=mappings or (mapping(),), threads=(thread,), files=(),
        descriptors=(),
    )  # fmt: skip


def manifest(name: str, *processes: Process, **fields: Any) -> Manifest:
    host = Host(boot_id="boot", kernel="6.18", machine="x86_64", vdso=bytes(16))
    return Manifest(
        **{"image": name, "taken_at": 1.0, "host": host,
           "processes": processes or (process(),), **fields}
    )  # fmt: skip


def raw(data: bytes, address: int = BASE, space: int = 0, pages: int = ALL_PAGES) -> RawChunk:
    return RawChunk(space, address, pages, memoryview(data.ljust(CHUNK, b"\0")))
