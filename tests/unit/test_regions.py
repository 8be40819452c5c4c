"""What becomes of each kind of mapping."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from snapshot.manifest import OBJECT_SPACE
from snapshot.maps import HIGHEST, LOWEST, Line
from snapshot.regions import FileFacts, Plan, plan
from snapshot.resources.memfd import SharedMemory
from snapshot.units import GIB, HUGE, PAGE

RW = ("rd", "wr", "mr", "mw", "me", "ac")


def line(start: int, pages: int, name: bytes = b"", **changes: Any) -> Line:
    fields: dict[str, Any] = {
        "start": start,
        "end": start + pages * PAGE,
        "prot": 3,
        "shared": False,
        "offset": 0,
        "device": 0,
        "inode": 0,
        "name": name,
        "vm_flags": RW,
    }
    return Line(**{**fields, **changes})


def facts(**changes: Any) -> FileFacts:
    fields: dict[str, Any] = {
        "path": b"/lib/x.so",
        "named": True,
        "tmpfs": False,
        "character": False,
        "device": 9,
        "inode": 7,
        "size": 4 * PAGE,
        "mtime_ns": 1,
        "mode": 0o100644,
    }
    return FileFacts(**{**fields, **changes})


def made(one: Line, about: FileFacts | None = None) -> Plan:
    return plan([one], 0, lambda _: about or facts())


def test_anonymous_memory_is_armed_whatever_its_protection() -> None:
    for prot in (0, 1, 3, 5):
        found = made(line(0x10000, 4, prot=prot))
        assert [(w.start, w.end, w.at, w.armed) for w in found.windows] == [
            (0x10000, 0x14000, 0x10000, True)
        ]
        assert found.mappings[0].kind == "anon"


def test_droppable_memory_is_kept_but_not_saved() -> None:
    found = made(line(0x10000, 1, vm_flags=(*RW, "dp")))
    assert not found.windows
    assert len(found.mappings) == 1


def test_private_file_pages_are_copied_in_the_pause() -> None:
    found = made(line(0x10000, 4, b"/lib/x.so", inode=7))
    assert [w.armed for w in found.windows] == [False]
    assert found.mappings[0].kind == "file"
    (file,) = found.files.values()
    assert (file.path, file.writable) == (b"/lib/x.so", False)


def test_a_file_without_a_name_goes_into_the_image_as_far_as_it_reaches() -> None:
    gone = facts(named=False, size=PAGE + 1)
    found = made(line(0x10000, 8, b"/lib/x.so", inode=7, deleted=True), gone)
    assert [(w.whole, w.end - w.start) for w in found.windows] == [(True, 2 * PAGE)]
    assert found.mappings[0].kind == "anon"
    assert found.warnings


def test_a_shared_file_is_opened_again_and_its_bytes_stay_there() -> None:
    found = made(line(0x10000, 4, b"/data", inode=7, shared=True))
    assert not found.windows
    assert [file.writable for file in found.files.values()] == [True]


@pytest.mark.parametrize(
    ("changes", "about", "words"),
    [
        ({"vm_flags": (*RW, "uw")}, None, "another userfaultfd"),
        ({"vm_flags": (*RW, "io", "pf")}, None, "device"),
        ({"name": b"/huge/file", "inode": 3, "vm_flags": (*RW, "ht")}, None, "hugetlbfs"),
        ({"name": b"/memfd:x", "inode": 3, "vm_flags": (*RW, "ht")}, None, "private mapping of a"),
        ({"name": b"/SYSV00000000", "shared": True, "inode": 3}, None, "System V"),
        ({"name": b"anon_inode:[io_uring]", "shared": True, "inode": 3}, None, "kernel shares"),
        ({"name": b"/dev/card", "inode": 3}, {"character": True}, "device"),
        ({"name": b"/x", "inode": 3, "shared": True}, {"named": False}, "no name"),
    ],
)
def test_what_cannot_be_handled_is_named(
    changes: dict[str, Any], about: dict[str, Any] | None, words: str
) -> None:
    found = made(line(0x10000, 1, **changes), facts(**(about or {})))
    assert len(found.problems) == 1
    assert words in found.problems[0]
    assert "10000-11000" in found.problems[0]


def huge(name: bytes, **changes: Any) -> Line:
    fields = {"inode": 5, "deleted": True, "vm_flags": (*RW, "ht"), "page_size": HUGE, **changes}
    return line(HUGE, 2 * HUGE // PAGE, name, **fields)


def test_anonymous_huge_pages_are_armed() -> None:
    found = made(huge(b"/anon_hugepage"))
    assert [(w.start, w.end, w.armed, w.whole, w.huge) for w in found.windows] == [
        (HUGE, 3 * HUGE, True, False, HUGE)
    ]
    (kept,) = found.mappings
    assert (kept.kind, kept.shared, kept.page_size, kept.offset) == ("anon", False, HUGE, 0)
    assert (found.problems, found.files, found.objects, found.costs) == ([], {}, {}, [])


@pytest.mark.parametrize("shared", [False, True])
def test_pages_of_1_gib_are_refused_by_name(shared: bool) -> None:
    one = line(GIB, GIB // PAGE, b"/anon_hugepage", inode=5, deleted=True, shared=shared)
    found = made(replace(one, vm_flags=(*RW, "ht"), page_size=GIB))
    assert not found.windows
    assert ["huge pages of 1.00 GiB" in problem for problem in found.problems] == [True]


@pytest.mark.parametrize(
    ("name", "kind"), [(b"/anon_hugepage", "anon"), (b"/memfd:box", "memfd")]
)
def test_shared_huge_pages_are_an_object_of_their_own(name: bytes, kind: str) -> None:
    found = made(huge(name, shared=True, offset=HUGE), facts(named=False, size=4 * HUGE))
    (only,) = found.objects.values()
    assert (only.kind, only.size, only.page_size) == (kind, 4 * HUGE, HUGE)
    assert [(w.at, w.end - w.start, w.armed) for w in found.windows] == [
        (HUGE, 2 * HUGE, False),
        (0, HUGE, False),
        (3 * HUGE, HUGE, False),
    ]
    assert (found.mappings[0].kind, found.mappings[0].page_size) == ("shared", HUGE)
    assert found.costs == [
        "8.0 MiB of shared memory in huge pages are copied while the process stands still"
    ]


def test_small_pages_say_so() -> None:
    """smaps gives a page size for every mapping: without the flag it is that of all memory."""
    assert made(line(0x10000, 4)).mappings[0].page_size == PAGE
    assert made(line(0x10000, 4)).costs == []


def memfd(start: int, pages: int, offset: int = 0) -> Line:
    return line(start, pages, b"/memfd:box", inode=5, shared=True, offset=offset, deleted=True)


def box(**changes: Any) -> FileFacts:
    return facts(path=b"/memfd:box", named=False, size=8 * PAGE, device=1, inode=5, **changes)


def test_an_object_mapped_twice_is_one_and_what_is_not_mapped_is_copied_in_the_pause() -> None:
    lines = [memfd(0x10000, 2), memfd(0x20000, 2, offset=PAGE)]
    found = plan(lines, 0, lambda _: box())
    (only,) = found.objects.values()
    assert (only.kind, only.name, only.size) == ("memfd", b"box", 8 * PAGE)
    space = OBJECT_SPACE + only.id
    assert [(w.space, w.at, w.armed) for w in found.windows[:2]] == [
        (space, 0, True),
        (space, PAGE, True),
    ]
    rest = found.windows[2:]
    assert [(w.at, w.end - w.start, w.armed) for w in rest] == [(3 * PAGE, 5 * PAGE, False)]


def test_an_object_that_a_descriptor_can_write_is_copied_in_the_pause() -> None:
    found = plan([memfd(0x10000, 8)], 0, lambda _: box(written=True))
    assert [w.armed for w in found.windows] == [False]


def test_which_objects_are_armed() -> None:
    """Only for them is the kernel asked to tell of forks, and are others looked for."""
    private = line(0x90000, 1)
    both = [memfd(0x10000, 2), memfd(0x20000, 2, offset=4 * PAGE), private]
    assert plan(both, 0, lambda _: box()).armed_objects == {(1, 5)}
    assert plan(both, 0, lambda _: box(written=True)).armed_objects == frozenset()
    assert plan([private], 0, lambda _: facts()).armed_objects == frozenset()


def test_an_object_that_only_a_descriptor_holds_is_in_the_plan() -> None:
    memory = SharedMemory(1, 5, 3 * PAGE, 4, "memfd", b"box", 0, 0o100777)
    found = plan([], 0, lambda _: facts(), [memory])
    assert [(w.at, w.end - w.start, w.armed) for w in found.windows] == [(0, 3 * PAGE, False)]
    assert found.object_source == {0: memory}


def test_an_object_keeps_its_id_in_later_plans() -> None:
    """Its id is its space, and chunks of it may be in the store already."""
    one, two = (SharedMemory(1, inode, PAGE, 4, "memfd", b"box", 0, 0o100777) for inode in (5, 6))
    first = plan([], 0, lambda _: facts(), [one, two])
    second = plan([], 0, lambda _: facts(), [two], first)
    third = plan(
        [], 0, lambda _: facts(), [SharedMemory(1, 7, PAGE, 4, "memfd", b"new", 0, 0o600)], second
    )
    assert {known.inode: known.id for known in second.objects.values()} == {6: 1}
    assert {known.inode: known.id for known in third.objects.values()} == {7: 2}


def test_a_file_that_is_mapped_no_more() -> None:
    """The target runs while it is looked at: another look follows when it stands still."""
    gone = plan([line(0x10000, 2, inode=9, name=b"/lib/x")], 0, lambda _: None)
    assert (gone.mappings, gone.windows, gone.files, gone.problems) == ([], [], {}, [])


def test_runs_end_at_mappings_of_other_kinds() -> None:
    """Holes are in them, as far as to the neighbours: what grows grows into a hole."""
    lines = [
        line(0x20000, 2, b"/bin/x", inode=7),
        line(0x30000, 2),
        line(0x34000, 2, prot=0),
        line(0x40000, 1, b"/lib/y", inode=8),
        line(0x41000, 1, b"/lib/y", inode=8),
        line(0x42000, 1),
        line(0x50000, 1, vm_flags=(*RW, "dp")),
        line(0x60000, 1, b"[vdso]"),
    ]
    found = list(plan(lines, 0, lambda _: facts()).runs())
    assert found == [(0x22000, 0x40000), (0x42000, 0x50000)]


def test_the_last_run_ends_where_user_memory_does() -> None:
    lines = [line(0x30000, 2), line(0xFFFFFFFFFF600000, 1, b"[vsyscall]")]
    assert list(plan(lines, 0, lambda _: None).runs()) == [(LOWEST, HIGHEST)]
    assert list(plan(lines[:1], 0, lambda _: None).runs()) == [(LOWEST, HIGHEST)]
    assert list(plan(lines[1:], 0, lambda _: None).runs()) == []
