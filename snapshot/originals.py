"""The files that mappings of an image need again: the same as at T0, or no restore.

The image holds only the pages of a private mapping that the process had written; all others are
the file's own. A file that a process maps shared and writable changes by being used: for such a
file a difference is a warning.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from .errors import RestoreError
from .manifest import Manifest, MappedFile, Mapping


class Originals:
    """The files opened in `snap`; the new process inherits `descriptors` under the same numbers."""

    def __init__(self, manifest: Manifest, warnings: list[str]) -> None:
        """RestoreError lists all that are missing or changed; then nothing is left open."""
        self._opened: dict[tuple[int, bool], int] = {}
        problems: list[str] = []
        needs = _needs(manifest)
        try:
            for file in manifest.files:
                for writable in needs.get(file.id, set()):
                    problem = self._open(file, writable, warnings)
                    if problem:
                        problems.append(problem)
                        break
        except BaseException:
            self.close()
            raise
        if problems:
            self.close()
            raise RestoreError(
                "\n  - ".join(["mapped files are not what they were at T0:", *problems]),
                "reinstall that version of them, then: snap restore IMAGE",
            )

    @property
    def descriptors(self) -> list[int]:
        return list(self._opened.values())

    def descriptor(self, mapping: Mapping) -> int:
        assert mapping.file is not None
        return self._opened[mapping.file, writes(mapping)]

    def close(self) -> None:
        for fd in self._opened.values():
            os.close(fd)
        self._opened.clear()

    def _open(self, file: MappedFile, writable: bool, warnings: list[str]) -> str | None:
        """What is wrong with the file, or None."""
        path = os.fsdecode(file.path)
        flags = os.O_RDWR if writable else os.O_RDONLY
        try:
            fd = os.open(file.path, flags | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
        except OSError as error:
            return f"{path}: {error.strerror}"
        self._opened[file.id, writable] = fd
        change = _change(file, os.fstat(fd))
        if change and file.writable:
            warnings.append(f"mapped file {path}: {change}; the process sees what it is now")
            return None
        return f"{path}: {change}" if change else None


def writes(mapping: Mapping) -> bool:
    """Whether it needs a descriptor that can write: a shared mapping that was or could become
    writable."""
    return mapping.shared and (bool(mapping.prot & 2) or "mw" in mapping.vm_flags)


def _needs(manifest: Manifest) -> dict[int, set[bool]]:
    """MappedFile.id -> whether it must be opened for reading, for writing, or each way once."""
    found: dict[int, set[bool]] = {}
    for mapping in _file_mappings(manifest):
        if mapping.file is not None:
            found.setdefault(mapping.file, set()).add(writes(mapping))
    return found


def _file_mappings(manifest: Manifest) -> Iterable[Mapping]:
    for process in manifest.processes:
        yield from (mapping for mapping in process.mappings if mapping.kind == "file")


def _change(file: MappedFile, found: os.stat_result) -> str | None:
    if found.st_size != file.size:
        return f"{found.st_size} bytes now, {file.size} at T0"
    if found.st_mtime_ns != file.mtime_ns:
        later = (found.st_mtime_ns - file.mtime_ns) / 1e9
        how = f"{later:.3f} s later" if later > 0 else f"{-later:.3f} s earlier"
        return f"modified {how} than the one at T0"
    return None
