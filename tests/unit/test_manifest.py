"""The manifest comes back as it was, and nothing else is taken for one."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshot import manifest as manifests
from snapshot.errors import DamagedError, UnsupportedError
from snapshot.manifest import Mapping, Record
from tests.unit import images

u64 = st.integers(0, (1 << 64) - 1)
mappings = st.builds(
    Mapping,
    start=u64,
    end=u64,
    prot=st.integers(0, 7),
    shared=st.booleans(),
    kind=st.sampled_from(["anon", "file", "shared", "vdso", "vsyscall"]),
    offset=u64,
    inode=u64,
    name=st.binary(max_size=40),
    vm_flags=st.lists(st.text(max_size=3), max_size=4).map(tuple),
    object=st.none() | st.integers(0, 9),
)


@given(st.lists(mappings, max_size=5), st.text(max_size=20), st.floats(allow_nan=False))
def test_round_trip(maps: list[Mapping], name: str, taken_at: float) -> None:
    made = images.manifest(name, images.process(*maps), taken_at=taken_at)
    assert manifests.decode(manifests.encode(made)) == made
    assert manifests.decode(memoryview(manifests.encode(made))) == made


def test_state_of_resource_modules_is_kept_as_it_is() -> None:
    class State(Record, frozen=True):
        mask: int
        names: tuple[bytes, ...]

    state = State(mask=1 << 63, names=(b"\xff", b""))
    process = msgspec.structs.replace(images.process(), state={"signals": manifests.pack(state)})
    back = manifests.decode(manifests.encode(images.manifest("a", process))).processes[0]
    assert manifests.unpack(back.state["signals"], State) == state
    with pytest.raises(DamagedError, match="Mapping in the manifest"):
        manifests.unpack(back.state["signals"], Mapping)


@given(st.binary(max_size=200))
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(DamagedError):
        manifests.decode(data)


@given(st.data())
def test_a_cut_or_changed_manifest_never_raises_anything_else(data: st.DataObject) -> None:
    """Whether a change is noticed here is luck; the store's checksum notices every one."""
    whole = bytearray(manifests.encode(images.manifest("a")))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(DamagedError, UnsupportedError):
        manifests.decode(bytes(whole[: data.draw(st.integers(0, len(whole)))]))


def test_a_later_version() -> None:
    data = manifests.MAGIC + (2).to_bytes(2, "big")
    with pytest.raises(UnsupportedError, match="image format 2; this snap reads 1"):
        manifests.decode(data)


def test_an_unknown_field() -> None:
    head = manifests.MAGIC + (1).to_bytes(2, "big")
    fields = msgspec.msgpack.decode(manifests.encode(images.manifest("a"))[len(head) :])
    data = head + msgspec.msgpack.encode(fields | {"surprise": 1})
    with pytest.raises(DamagedError, match="surprise"):
        manifests.decode(data)


def test_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "MAX_BYTES", 100)
    with pytest.raises(DamagedError, match="more than 100 are refused"):
        manifests.decode(manifests.encode(images.manifest("a")))
