"""Text of maps and smaps as the kernel writes it, and as a hostile file name can make it look."""

import ctypes
import itertools
import mmap
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshot import maps
from snapshot.kernel import procfs


def line(text: bytes) -> maps.Line:
    (only,) = maps.parse_maps(text)
    return only


def test_anonymous() -> None:
    found = line(b"7f0000000000-7f0000021000 rw-p 00000000 00:00 0 \n")
    assert (found.start, found.end) == (0x7F0000000000, 0x7F0000021000)
    assert found.size == 0x21000
    assert found.prot == maps.PROT_READ | maps.PROT_WRITE
    assert not found.shared
    assert (found.device, found.inode, found.name, found.deleted) == (0, 0, b"", False)


def test_file() -> None:
    found = line(b"00400000-00401000 r-xs 00002000 103:02 173521      /usr/bin/a b\n")
    assert found.prot == maps.PROT_READ | maps.PROT_EXEC
    assert found.shared
    assert found.offset == 0x2000
    assert found.device == os.makedev(0x103, 0x02)
    assert found.inode == 173521
    assert found.name == b"/usr/bin/a b"


@pytest.mark.parametrize(
    ("printed", "name", "deleted"),
    [
        (b"/tmp/x (deleted)", b"/tmp/x", True),
        (b"/tmp/x (deleted) (deleted)", b"/tmp/x (deleted)", True),
        (b"/tmp/x (deleted)y", b"/tmp/x (deleted)y", False),
        (b"/tmp/two  spaces ", b"/tmp/two  spaces ", False),
        (b"/tmp/a\\012b", b"/tmp/a\nb", False),
        (b"/tmp/back\\slash", b"/tmp/back\\slash", False),
        (b"/tmp/\xff\x85\xa0\x1c", b"/tmp/\xff\x85\xa0\x1c", False),
        (b"/memfd:name (deleted)", b"/memfd:name", True),
        (b"[anon: my heap ]", b"[anon: my heap ]", False),
        (b"[heap]", b"[heap]", False),
    ],
)
def test_names(printed: bytes, name: bytes, deleted: bool) -> None:
    found = line(b"00400000-00401000 r--p 00000000 fe:00 5                    " + printed + b"\n")
    assert (found.name, found.deleted) == (name, deleted)
    assert found.printed == printed.replace(b"\\012", b"\n")


def test_highest_address() -> None:
    found = line(b"ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0     [vsyscall]\n")
    assert found.end == 0xFFFFFFFFFF601000
    assert found.prot == maps.PROT_EXEC


def test_nothing() -> None:
    assert maps.parse_maps(b"") == []
    assert maps.parse_smaps(b"") == []


@pytest.mark.parametrize("text", [b"x", b"x\n", b"00400000-00401000 r--p 0 fe:00 5"])
def test_not_maps(text: bytes) -> None:
    with pytest.raises((ValueError, IndexError)):
        maps.parse_maps(text)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2**47),
            st.integers(1, 2**30),
            st.sampled_from([b"rwxp", b"---p", b"r--s", b"rw-p", b"r-xp"]),
            st.binary(min_size=1, max_size=40).filter(lambda name: b"\n" not in name),
        )
    )
)
def test_any_name(rows: list[tuple[int, int, bytes, bytes]]) -> None:
    text = b"".join(
        b"%08x-%08x %s %08x fe:02 %d %s\n" % (start, start + size, perm, size, size, b"/" + name)
        for start, size, perm, name in rows
    )
    found = maps.parse_maps(text)
    assert [(one.start, one.size) for one in found] == [row[:2] for row in rows]
    for one, (_, _, _, name) in zip(found, rows, strict=True):
        assert one.printed == (b"/" + name).replace(b"\\012", b"\n")


def test_smaps_agrees_with_maps() -> None:
    pid = os.getpid()
    with mmap.mmap(-1, 8 * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area.write(b"x" * 3 * mmap.PAGESIZE)
        area.madvise(mmap.MADV_DONTFORK)
        address = ctypes.addressof(ctypes.c_char.from_buffer(area))
        lines = procfs.smaps(pid)
        plain = procfs.maps(pid)
        (ours,) = [one for one in lines if one.start <= address < one.end]
    assert {"rd", "wr", "dc"} <= set(ours.vm_flags)
    assert ours.anonymous >= 3 * mmap.PAGESIZE
    assert ours.page_size == mmap.PAGESIZE
    seen = {(one.start, one.prot, one.name, one.inode, one.device) for one in plain}
    same = [(one.start, one.prot, one.name, one.inode, one.device) in seen for one in lines]
    assert sum(same) >= len(same) - 3  # the interpreter may have mapped something in between


def test_every_process_here() -> None:
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                text = Path(f"/proc/{name}/maps").read_bytes()
            except OSError:
                continue
            found = maps.parse_maps(text)
            assert len(found) == text.count(b"\n")
            assert all(a.end <= b.start for a, b in itertools.pairwise(found))


def test_ten_thousand_mappings() -> None:
    text = b"".join(
        b"%x-%x rw-p 00000000 00:00 0 \n" % (at, at + 4096)
        if at % 16384
        else b"%x-%x r-xp %08x fe:01 %d            /usr/lib/lib%d.so\n"
        % (at, at + 4096, at, at, at)
        for at in range(0x7F0000000000, 0x7F0000000000 + 10_000 * 8192, 8192)
    )
    assert len(maps.parse_maps(text)) == 10_000
