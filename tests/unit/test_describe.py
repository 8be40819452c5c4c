"""What the command says of an image, where the image is not friendly."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapshot import describe
from snapshot.manifest import MappedFile
from snapshot.stats import Progress, Stopwatch, microseconds
from snapshot.store import Store
from snapshot.units import CHUNK

from .images import BASE, manifest, mapping, process, raw


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"/usr/bin/cat", "/usr/bin/cat"),
        ("köln".encode(), "köln"),
        (b"\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        (b"a\xffb", "a\\xffb"),
        (b"two\nlines", "two\\nlines"),
    ],
)
def test_nothing_unprintable_reaches_a_terminal(raw: bytes, shown: str) -> None:
    assert describe.text(raw) == shown


def test_details_name_every_mapping_and_what_of_it_is_held(tmp_path: Path) -> None:
    stack = mapping(start=BASE + 0x8000, size=2 * CHUNK, name=b"[stack]")
    code = mapping(start=0x40_0000, prot=5, kind="file", name=b"/bin/cat", shared=True, file=1)
    cat = MappedFile(
        id=1, path=b"/bin/cat", device=1, inode=2, size=9, mtime_ns=3, writable=False
    )
    with Store.open(tmp_path / "store", create=True) as store:
        with store.begin("one") as writer:
            writer.put([raw(b"x", BASE), raw(b"y", BASE + CHUNK)])
            writer.commit(manifest("one", process(code, stack), files=(cat,)))
        with store.image("one") as image:
            held = describe.held_by(image)
            text = "\n".join(describe.details(image.manifest, held))
            sizes = [
                one["image_bytes"]
                for one in describe.shown(image.manifest, held)["processes"][0]["mappings"]
            ]
    assert "000000400000-000000800000 r-xs          -  /bin/cat" in text
    assert "7f0000008000-7f0000028000 rw-p     96 KiB  [stack]" in text
    assert sizes == [0, 2 * CHUNK - 0x8000]


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0 µs"), (999, "999 µs"), (1500, "1.5 ms"), (2_500_000, "2.50 s")]
)
def test_times_for_people(value: int, shown: str) -> None:
    assert microseconds(value) == shown


def test_progress_before_anything_is_known() -> None:
    start = Progress("arming")
    assert (start.fraction, start.rate) == (0.0, 0.0)
    late = Progress("saving", saved_bytes=6 << 20, armed_bytes=4 << 20, faults=3, seconds=2.0)
    assert late.fraction == 1.0  # what is armed may be known late
    assert late.line() == "saving  6.0 MiB of 4.0 MiB, 3 faults, 3.0 MiB/s"


def test_stages_add_up_also_when_they_fail() -> None:
    clock = Stopwatch()
    for _ in range(2):
        with clock.stage("one"):
            pass
    with pytest.raises(ValueError, match="no"), clock.stage("two"):
        raise ValueError("no")
    assert set(clock.stages_us) == {"one", "two"}
    assert sum(clock.stages_us.values()) <= clock.elapsed_us <= clock.seconds * 1e6
