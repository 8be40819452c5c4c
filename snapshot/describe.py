"""What the command says of images: the objects of `--json` (docs/cli-contract.md), and text.

Pure: a manifest in, values or lines out. Bytes that are no printable UTF-8 (paths, names) are
shown with backslash escapes.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .manifest import OBJECT_SPACE, Manifest, Mapping, Process, TakeStats
from .stats import microseconds
from .units import CHUNK, align_down, count, mib

if TYPE_CHECKING:
    from .image import Image
    from .restore import Restored
    from .store import ImageInfo


def text(raw: bytes) -> str:
    """For a terminal: an image may come from somebody else, so nothing unprintable gets through."""
    decoded = raw.decode("utf-8", "backslashreplace")
    if decoded.isprintable():
        return decoded
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in decoded
    )


def moment(seconds: float) -> str:
    """Local time of a moment in seconds since the epoch: `2026-11-23 03:56:02`."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def permissions(mapping: Mapping) -> str:
    """As in /proc/PID/maps: `rw-p`."""
    bits = "".join(letter if mapping.prot & 1 << bit else "-" for bit, letter in enumerate("rwx"))
    return bits + ("s" if mapping.shared else "p")


def closed_connections(manifest: Manifest) -> list[str]:
    """Labels of the open files that come back as ended connections."""
    return [file.label for process in manifest.processes for file in process.files if file.closed]


def counted(labels: Sequence[str]) -> str:
    """One line for people: `tcp 127.0.0.1:7777, pipe:[628155] (20 times)`."""
    counts = Counter(labels)
    return ", ".join(
        label if times == 1 else f"{label} ({times} times)" for label, times in counts.items()
    )


def taken(manifest: Manifest) -> dict[str, Any]:
    """`snap take --json`."""
    stats = manifest.stats
    return {
        "image": manifest.image,
        "pid": manifest.processes[0].pid,
        "processes": len(manifest.processes),
        **statistics(stats),
        "closed_connections": closed_connections(manifest),
        "warnings": list(manifest.warnings),
    }


def statistics(stats: TakeStats) -> dict[str, Any]:
    return {name: getattr(stats, name) for name in stats.__struct_fields__}


Held = Callable[[Process, Mapping], int]
"""Bytes of a mapping that are in the image."""


def held_by(image: Image) -> Held:
    """Counted in whole chunks, as the index knows them: an empty page beside one that holds
    something counts too."""

    def held(process: Process, mapping: Mapping) -> int:
        if mapping.object is None:
            space, start = process.index, mapping.start
        else:
            space, start = OBJECT_SPACE + mapping.object, mapping.offset
        end = start + mapping.size
        addresses = image.addresses(space)
        first = bisect_left(addresses, align_down(start, CHUNK))
        last = bisect_left(addresses, end)
        return sum(min(end, at + CHUNK) - max(start, at) for at in addresses[first:last])

    return held


def shown(manifest: Manifest, held: Held) -> dict[str, Any]:
    """`snap show --json`."""
    host = manifest.host
    return {
        "image": manifest.image,
        "taken_at": manifest.taken_at,
        "host": {"boot_id": host.boot_id, "kernel": host.kernel, "machine": host.machine},
        "processes": [_process(process, held) for process in manifest.processes],
        "shared_objects": [
            {
                "id": one.id,
                "kind": one.kind,
                "name": text(one.name),
                "size": one.size,
                "page_size": one.page_size,
            }
            for one in manifest.objects
        ],
        "stats": statistics(manifest.stats),
        "closed_connections": closed_connections(manifest),
        "warnings": list(manifest.warnings),
    }


def _process(process: Process, held: Held) -> dict[str, Any]:
    files = {file.id: file for file in process.files}
    return {
        "pid": process.pid,
        "ppid": process.ppid,
        "comm": text(process.comm),
        "cmdline": [text(argument) for argument in process.cmdline],
        "exe": text(process.exe),
        "cwd": text(process.cwd),
        "threads": [{"tid": thread.tid, "comm": text(thread.comm)} for thread in process.threads],
        "mappings": [
            {
                "start": mapping.start,
                "end": mapping.end,
                "permissions": permissions(mapping),
                "kind": mapping.kind,
                "name": text(mapping.name),
                "page_size": mapping.page_size,
                "image_bytes": held(process, mapping),
            }
            for mapping in process.mappings
        ],
        "descriptors": [
            {
                "fd": one.fd,
                "kind": files[one.file].kind,
                "label": files[one.file].label,
                "cloexec": one.cloexec,
                "closed": files[one.file].closed,
            }
            for one in process.descriptors
        ],
    }


def summary(manifest: Manifest) -> list[str]:
    """What `snap take` says to people when it is done."""
    stats = manifest.stats
    process = manifest.processes[0]
    lines = [
        f"took {text(process.comm)} (pid {process.pid}, {count(stats.threads, 'thread')}): "
        f"{mib(stats.saved_bytes)} in {stats.seconds:.2f} s, {mib(stats.stored_bytes)} stored; "
        f"it stood still for {microseconds(stats.pause_us)}"
    ]
    if closed := closed_connections(manifest):
        lines.append("comes back closed: " + counted(closed))
    return lines + [f"warning: {warning}" for warning in manifest.warnings]


def statistics_text(stats: TakeStats) -> list[str]:
    """What `--stats` adds."""
    values = statistics(stats)
    lines = [f"{name:<20} {_value(name, value)}" for name, value in values.items()]
    return [line for line in lines if line.strip()]


def _value(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{stage} {microseconds(spent)}" for stage, spent in value.items()) or "-"
    if isinstance(value, tuple):
        return "; ".join(value) or "-"
    if name.endswith("_bytes"):
        return mib(value)
    if name.endswith("_us"):
        return microseconds(value)
    return f"{value:.2f} s" if name == "seconds" else str(value)


def details(manifest: Manifest, held: Held) -> list[str]:
    """`snap show` for people."""
    lines = [
        f"image     {manifest.image}",
        f"taken     {moment(manifest.taken_at)} on Linux {manifest.host.kernel}",
    ]
    for process in manifest.processes:
        lines += ["", *_process_text(process, held)]
    lines += ["", "take", *(f"  {line}" for line in statistics_text(manifest.stats))]
    return lines + [f"warning: {warning}" for warning in manifest.warnings]


def _process_text(process: Process, held: Held) -> list[str]:
    files = {file.id: file for file in process.files}
    command = " ".join(text(argument) for argument in process.cmdline)
    lines = [f"process   {process.pid} {text(process.comm)}: {command}"]
    lines.append(f"  exe     {text(process.exe)}")
    lines.append(f"  cwd     {text(process.cwd)}")
    lines.append(f"threads   {len(process.threads)}")
    lines += [f"  {thread.tid:<8} {text(thread.comm)}" for thread in process.threads]
    lines.append(f"mappings  {len(process.mappings)}")
    for mapping in process.mappings:
        span = f"{mapping.start:012x}-{mapping.end:012x}"
        size = mib(held(process, mapping)) if held(process, mapping) else "-"
        lines.append(f"  {span} {permissions(mapping)} {size:>10}  {text(mapping.name)}".rstrip())
    lines.append(f"descriptors  {len(process.descriptors)}")
    for one in process.descriptors:
        file = files[one.file]
        ended = "  (comes back closed)" if file.closed else ""
        lines.append(f"  {one.fd:<4} {file.kind:<10} {file.label}{ended}")
    return lines


def restored(result: Restored) -> dict[str, Any]:
    """`snap restore --json`."""
    return {
        "image": result.image,
        "pid": result.pid,
        "mode": result.mode,
        "ready_us": result.ready_us,
        "server_pid": result.server_pid,
        "closed_connections": list(result.closed_connections),
        "warnings": list(result.warnings),
    }


def restored_text(result: Restored) -> list[str]:
    """What `snap restore` says to people when the process runs."""
    lines = [
        f"restored {result.image} as pid {result.pid}, {result.mode}: "
        f"it runs after {microseconds(result.ready_us)}"
    ]
    if result.server_pid:
        lines[0] += f"; process {result.server_pid} brings the rest of its memory"
    if result.closed_connections:
        lines.append("came back closed: " + counted(result.closed_connections))
    return lines + [f"warning: {warning}" for warning in result.warnings]


def listed(info: ImageInfo) -> dict[str, Any]:
    """One of `snap list --json`."""
    return {
        "image": info.image,
        "pid": info.pid,
        "comm": info.comm,
        "taken_at": info.taken_at,
        "saved_bytes": info.saved_bytes,
        "stored_bytes": info.stored_bytes,
        "damaged": info.damaged,
    }


def images_table(images: list[dict[str, Any]]) -> list[str]:
    rows = [("IMAGE", "PID", "COMMAND", "TAKEN", "MEMORY", "STORED")]
    for one in images:
        if one["damaged"]:
            rows.append((one["image"], "", "damaged", "", "", ""))
            continue
        sizes = mib(one["saved_bytes"]), mib(one["stored_bytes"])
        rows.append((one["image"], str(one["pid"]), one["comm"], moment(one["taken_at"]), *sizes))
    return table(rows)


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns of equal width, the first row the headings; numbers are the caller's to align."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
