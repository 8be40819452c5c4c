"""Memory of hugetlbfs: taken exactly, and it comes back in huge pages of the same size."""

from __future__ import annotations

from pathlib import Path

import pytest

import snapshot
from snapshot.errors import SnapError
from snapshot.kernel import hugetlb
from tests.conftest import Snap, Spawn
from tests.harness import hugepages
from tests.harness.takes import compared, restored
from tests.harness.victims import Victim

pytestmark = pytest.mark.live

MODES = pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
KINDS = ("private", "reserveless", "shared", "memfd", "readonly")
PAGES = 4
"""Huge pages of each kind, half of them touched."""


def lines(victim: Victim) -> dict[str, list[str]]:
    """What smaps says of each kind of huge memory that the victim has."""
    blocks: dict[int, list[str]] = {}
    for row in Path(f"/proc/{victim.pid}/smaps").read_text().splitlines():
        if not row.split()[0].endswith(":"):
            at = int(row.split("-")[0], 16)
            blocks[at] = [f"{row.split()[0]} {row.split()[1]}"]
        elif row.startswith(("KernelPageSize:", "VmFlags:")):
            blocks[at].append(row)
    places = zip(KINDS, victim.status().values[2:], strict=False)
    return {kind: blocks[place] for kind, place in places if place}


@MODES
@pytest.mark.parametrize("kind", [*KINDS, "all"])
def test_huge_pages_come_back(
    huge_pages: None, spawn: Spawn, store: Path, kind: str, lazy: bool
) -> None:
    """Byte for byte, of the same size and protection; no page that was not in use, or was given
    up, is used by the take or the restore; a second take is exact too."""
    victim = spawn("huge", pages=PAGES, kind=kind)
    victim.goes_on()
    before, used = lines(victim), hugepages.used()
    assert len(before) == (len(KINDS) if kind == "all" else 1)
    assert used == PAGES // 2 * len(before)
    assert compared(victim.pid, store, "image") == []
    victim.goes_on()
    victim.verify()
    assert hugepages.used() == used
    victim.kill()
    assert hugepages.used() == 0
    with restored(victim, "image", store, lazy) as back:
        victim.goes_on()
        assert back.complete() is None
        victim.verify()
        assert lines(victim) == before
        assert hugepages.used() == used
        assert compared(back.pid, store, "second") == []
        victim.goes_on()
        victim.verify()
        assert hugepages.used() == used


@pytest.mark.parametrize("now", [False, True], ids=["ahead", "now"])
def test_private_ones_are_not_copied_in_the_pause(
    huge_pages: None, spawn: Spawn, store: Path, now: bool
) -> None:
    """Ahead of T0 when nobody writes to them, else armed and copied after it."""
    victim = spawn("huge", pages=2 * PAGES, kind="private" if now else "readonly")
    victim.goes_on()
    huge = PAGES * hugepages.SIZE
    assert compared(victim.pid, store, "image", now=now, guard="never") == []
    with snapshot.open_image("image", store=store) as image:
        stats = image.manifest.stats
    if now:
        assert stats.remainder_bytes >= huge
        assert stats.armed_bytes >= huge
    else:
        assert stats.ahead_bytes >= huge
        assert stats.remainder_bytes < huge
    victim.verify()
    victim.goes_on()


def test_they_are_mapped_moved_discarded_and_unmapped_meanwhile(
    huge_pages: None, spawn: Spawn, store: Path
) -> None:
    victim = spawn("huge", pages=PAGES, kind="private", churn=1)
    for number in range(5):
        victim.goes_on()
        assert compared(victim.pid, store, f"image-{number}") == []
    victim.verify()
    victim.kill()
    with restored(victim, "image-4", store, lazy=True):
        victim.goes_on()
        victim.verify()


@MODES
def test_without_free_huge_pages_nothing_runs(
    huge_pages: None, spawn: Spawn, snap: Snap, store: Path, lazy: bool
) -> None:
    """One error, which says how many are needed and how many are free, and what to do; then the
    restore works."""
    victim = spawn("huge", pages=PAGES, kind="all")
    snap("take", victim.pid, "--name", "image")
    victim.kill()
    # Reserved: three kinds whole, of the memfd what is mapped; of the reserveless what is touched.
    needed = 4 * PAGES + PAGES // 2
    taken = hugepages.free() - (needed - 1)
    hugepages.resize(-taken)
    try:
        mode = "--lazy" if lazy else "--eager"
        ran = snap("restore", "image", mode, ok=False)
        assert ran.code == 9
        free = f"{needed - 1} of {needed - 1} are free"
        assert f"{needed} pages of 2.0 MiB: {free}" in ran.json["error"]
        assert ran.json["hint"] == f"sudo sysctl vm.nr_hugepages={needed}"
        assert not victim.lives()
        assert hugepages.used() == 0
        hugepages.resize(1)
        with restored(victim, "image", store, lazy):
            victim.goes_on()
            victim.verify()
    finally:
        hugepages.resize(taken - (hugepages.total() - (needed - 1)))
    assert hugepages.used() == 0


def test_the_price_is_said(huge_pages: None, spawn: Spawn, snap: Snap) -> None:
    """Of shared memory: what of it is written, no fault of a mapping would tell."""
    victim = spawn("huge", pages=PAGES, kind="shared")
    words = "8.0 MiB of shared memory in huge pages are copied while the process stands still"
    assert words in snap("check", victim.pid).out
    assert words in snap("take", victim.pid, "--name", "image").json["warnings"]
    mappings = snap("show", "image").json["processes"][0]["mappings"]
    assert [one["page_size"] for one in mappings if one["page_size"] != 4096] == [2 << 20]


@MODES
@pytest.mark.parametrize("kind", ["private", "reserveless", "memfd", "shared"])
def test_the_pool_may_run_dry_after_it_was_counted(
    huge_pages: None,
    spawn: Spawn,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    lazy: bool,
) -> None:
    """Others use it too: then an error all the same, and nothing is left."""
    victim = spawn("huge", pages=PAGES, kind=kind)
    snapshot.take(victim.pid, name="image", store=store).close()
    victim.kill()
    monkeypatch.setattr(hugetlb, "pool", lambda size: hugetlb.Pool(PAGES, PAGES))
    taken = hugepages.free()
    hugepages.resize(-taken)
    try:
        with pytest.raises(SnapError):
            snapshot.restore("image", lazy=lazy, store=store)
        assert not victim.lives()
    finally:
        hugepages.resize(taken)
    assert hugepages.used() == 0
    assert hugepages.free() == taken
    with restored(victim, "image", store, lazy):
        victim.goes_on()
