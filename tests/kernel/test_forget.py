"""A mapped file that leaves our page tables, and is there all the same."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

from snapshot.kernel.forget import forget_file

SIZE = 4 << 20


def mapped_bytes(path: Path) -> int:
    """Of the file, as /proc/self/smaps counts it for us."""
    smaps = Path("/proc/self/smaps").read_text()
    found = re.search(rf" {re.escape(str(path))}\n(?:.*\n)*?Rss: +(\d+) kB", smaps)
    assert found
    return int(found[1]) * 1024


def test_what_is_mapped_is_forgotten_and_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), SIZE, prot=mmap.PROT_READ) as memory:
        assert memory[:] == path.read_bytes()
        assert mapped_bytes(path) == SIZE
        assert forget_file(file.fileno()) == 1
        assert mapped_bytes(path) == 0
        assert memory[:] == path.read_bytes()


def test_what_is_not_mapped_or_not_only_read_is_left(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a" * SIZE)
    with path.open("r+b") as file:
        assert forget_file(file.fileno()) == 0
        with mmap.mmap(file.fileno(), SIZE, flags=mmap.MAP_PRIVATE) as own:
            own[0] = ord("b")
            assert forget_file(file.fileno()) == 0
            assert own[:2] == b"ba"
