"""Images that somebody made up to harm who restores them: made, and read by all our readers.

Everything here has right checksums: whoever makes an image makes them too. A reader may
answer or raise SnapError; anything else is a defect (fuzz.py runs them).
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, cast

import msgspec
import zstandard
from blake3 import blake3

import snapshot.resources
from snapshot import chunkcodec, describe, fill, plausible
from snapshot import manifest as manifests
from snapshot.environment import Environment
from snapshot.errors import SnapError
from snapshot.image import Image
from snapshot.index import Space
from snapshot.kernel.ptrace import Tracee
from snapshot.lease import Lease
from snapshot.manifest import Descriptor, Manifest, MappedFile, OpenFile, Record, SharedObject
from snapshot.ranges import Ranges
from snapshot.records import (
    BASES,
    INDEX_ENTRY,
    INDEX_KEY,
    INDEX_VALUE,
    NUMBER,
    ImageRecord,
    TakeRecord,
    base_address,
    digest,
    unseal,
)
from snapshot.units import CHUNK, PAGE
from tests.unit.images import BASE, manifest, mapping, process

HEAD = manifests.MAGIC + b"\0\1"
NASTY: tuple[Any, ...] = (
    *(0, 1, -1, 2, 4095, 4096, 65535, 65536, 1 << 31, 1 << 32, (1 << 47) - PAGE, 1 << 47),
    *((1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63), 0xFFFF_FFFF_FF60_0000, 1e308, 0.5),
    *(float("nan"), float("inf"), None, True, False, "", "\0", "\x1b[2J", "../../etc/passwd"),
    *(b"", b"\0", b"/", b"/../..", b"x" * 5000, b"\xff" * 128, bytes(216), [], {}, [0], [[]]),
    *({"": 0}, {0: 0}, {"a": {"a": {}}}),
)


def rich() -> Manifest:
    """One of everything that a manifest can hold."""
    maps = (
        mapping(0x40_0000, 4 * CHUNK, kind="file", file=1, prot=5, name=b"/bin/cat"),
        mapping(BASE, 16 * CHUNK, vm_flags=("rd", "wr")),
        mapping(BASE + 16 * CHUNK, CHUNK, kind="shared", shared=True, object=1),
        mapping(plausible.VSYSCALL, PAGE, kind="vsyscall", prot=4),
    )
    base = process(*maps)
    thread = msgspec.structs.replace(
        base.threads[0],
        pending=(bytes(128),),
        rseq=manifests.Rseq(address=BASE, size=32, signature=1),
        state={"scheduling": manifests.pack({"nice": 1})},
    )
    files = tuple(
        OpenFile(id=number, kind=kind, label=kind, owner=(1, 2, 3), state=manifests.pack({"a": 1}))
        for number, kind in enumerate(("files", "pipes", "sockets"))
    )
    one = msgspec.structs.replace(
        base,
        threads=(thread, msgspec.structs.replace(thread, tid=101)),
        files=files,
        descriptors=tuple(Descriptor(fd=10 + file.id, file=file.id) for file in files),
        state={"signals": manifests.pack([1, 2])},
        pending=(bytes(128),),
    )
    cat = MappedFile(id=1, path=b"/bin/cat", device=1, inode=2, size=9, mtime_ns=3, writable=False)
    shared = SharedObject(id=1, kind="memfd", name=b"x", device=1, inode=3, size=CHUNK)
    return manifest("one", one, files=(cat,), objects=(shared,), warnings=("a",))


@cache
def seed_fields() -> bytes:
    return manifests.encode(rich())[len(HEAD) :]


@cache
def kinds() -> list[type[Record]]:
    """The records of all resource modules, whatever they are called."""
    found: set[type[Record]] = set()
    for module in pkgutil.iter_modules(snapshot.resources.__path__):
        loaded = importlib.import_module(f"snapshot.resources.{module.name}")
        for value in vars(loaded).values():
            if isinstance(value, type) and issubclass(value, Record) and value is not Record:
                found.add(value)
    return sorted(found, key=lambda kind: f"{kind.__module__}.{kind.__qualname__}")


def changed(random: Random, value: Any) -> Any:
    """`value` with something in it that should not be."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(list(value))
        if random.random() < 0.03:
            return {name: one for name, one in value.items() if name != key}
        return {**value, key: changed(random, value[key])}
    if isinstance(value, list) and value and random.random() < 0.85:
        where = random.randrange(len(value))
        match random.randrange(8):
            case 0:
                return value * random.choice((0, 2, 3))
            case 1:
                return value[::-1]
            case 2:
                return [*value, value[where]]
            case _:
                return [*value[:where], changed(random, value[where]), *value[where + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and random.random() < 0.5:
        moved = value + random.choice((-CHUNK, -PAGE, -1, 1, PAGE, CHUNK, 1 << 32))
        return max(-(1 << 63), min((1 << 64) - 1, moved))
    return random.choice(NASTY)


def mangled(random: Random, data: bytes) -> bytes:
    """Bytes that are no longer what they were."""
    made = bytearray(data)
    for _ in range(random.randrange(1, 4)):
        at = random.randrange(len(made) + 1)
        match random.randrange(4):
            case 0 if at < len(made):
                made[at] = random.randrange(256)
            case 1:
                made[at : at + random.randrange(9)] = b""
            case 2:
                made[at:at] = random.randbytes(random.randrange(9))
            case _:
                made[at : at + 5] = (
                    random.choice((b"\xdd", b"\xdf", b"\xdb", b"\xc6")) + b"\xff" * 4
                )
    return bytes(made)


def state(random: Random) -> bytes:
    """A record of some resource module with some of its fields, right or not."""
    names = random.choice(kinds()).__struct_fields__
    given = [name for name in names if random.random() < 0.9]
    return msgspec.msgpack.encode({name: random.choice(NASTY) for name in given})


def record(random: Random) -> bytes:
    """An image's record as the store has it, right or not."""
    summary = {"space": 0, "chunks": 1, "digest": b"x" * 16}
    good = {
        "number": 1,
        "pid": 100,
        "comm": b"cat",
        "boot_id": "b",
        "start_ticks": 1,
        "taken_at": 1.0,
        "saved_bytes": 1,
        "stored_bytes": 1,
        "spaces": [summary],
        "manifest": bytes(16),
        "manifest_bytes": 5,
    }
    return msgspec.msgpack.encode(changed(random, good))


# --- readers, each of bytes that somebody else chose ----------------------------------------------


def read_manifest(data: bytes) -> None:
    made = manifests.decode(HEAD + data)
    plausible.check(made)
    use(made)


def use(made: Manifest) -> None:
    """What `show` and the pure part of a restore do with a manifest that is plausible."""
    describe.details(made, lambda process, mapping: 0)
    msgspec.json.encode(describe.shown(made, lambda process, mapping: 0))
    for one in made.processes:
        fill.at_once(one)
    json.dumps(describe.statistics(made.stats))


def read_record(data: bytes) -> None:
    for kind in (ImageRecord, TakeRecord):
        with suppress(SnapError):
            unseal(b"name", digest(b"name", data) + data, kind)


def read_state(data: bytes) -> None:
    for kind in kinds():
        with suppress(SnapError):
            manifests.unpack(msgspec.Raw(data), kind)


def sealed_chunk(present: int, nonzero: int, codec: int, payload: bytes, content: bytes) -> bytes:
    """A chunk value whose checksum is right for `content`."""
    key = chunkcodec._DIGEST_KEY.pack(present, nonzero)
    found = blake3(content, key=key).digest(16)
    return chunkcodec.HEADER.pack(present, nonzero, codec, found) + payload


def sealed_delta(present: int, head: bytes, payload: bytes, content: bytes) -> bytes:
    """A delta whose checksum and check are right for these."""
    value = sealed_chunk(present, present, chunkcodec.DELTA, head, content)
    return value + chunkcodec.CHECK.pack(chunkcodec._check(value, payload)) + payload


def read_chunk(data: bytes) -> None:
    """The bytes as they come, and as the payload of a value that says they are right."""
    with suppress(SnapError):
        chunkcodec.decode(data)
    present, codec = int.from_bytes(data[:2], "big"), data[2] if len(data) > 2 else 0
    value = sealed_chunk(present, present, codec, data[3:], data[3:])
    chunk, _ = chunkcodec.decode(value)
    assert len(chunk.data) == CHUNK


def read_delta(data: bytes) -> None:
    """The bytes as the payload of a delta against a sound chunk, whose checksum is right."""
    base = sealed_chunk(0b111, 0b011, chunkcodec.RAW, b"a" * 2 * PAGE, b"a" * 2 * PAGE)
    present = int.from_bytes(data[:2], "big")
    content = b"a" * present.bit_count() * PAGE
    former = sealed_chunk(present, present, chunkcodec.UNCHECKED_DELTA, data[2:], content)
    head, payload = data[2:10].ljust(chunkcodec.DELTA_HEADER.size, b"\0"), data[10:]
    for value in (former, sealed_delta(present, head, payload, content)):
        chunk, _ = chunkcodec.decode(value, base)
        assert len(chunk.data) == CHUNK


def read_index(data: bytes) -> None:
    size = INDEX_ENTRY.size  # in order, each address once: keys of a tree that was checked
    entries = {data[at : at + 8]: data[at : at + size] for at in range(0, len(data) - size, size)}
    space = Space(0, b"".join(entries[address] for address in sorted(entries)))
    for address in space.addresses:
        entry = space.find(address)
        assert entry is not None
        assert entry.address == address


Reader = Callable[[bytes], None]
READERS: tuple[Reader, ...] = (
    read_manifest,
    read_record,
    read_state,
    read_chunk,
    read_index,
    read_delta,
)


def read_any(data: bytes) -> None:
    """For fuzzers that know nothing: the first byte chooses the reader."""
    if data:
        with suppress(SnapError):
            READERS[data[0] % len(READERS)](data[1:])


# --- a whole store, in memory ---------------------------------------------------------------------


class _Table:
    """What the readers need of an LMDB environment with read transactions."""

    path = Path("/nowhere")

    def __init__(self, tables: dict[str, dict[bytes, bytes]]) -> None:
        self.databases = {name: name for name in tables}
        self._tables = tables

    def read(self, buffers: bool = True) -> _Table:
        return self

    def check(self) -> None:
        """As if the trees were sound."""

    def entries(self, database: str, prefix: bytes, entry: int, most: int) -> bytes | None:
        found = [k[len(prefix) :] + v for k, v in sorted(self._tables[database].items())
                 if k.startswith(prefix)]  # fmt: skip
        whole = len(found) <= most and all(len(one) == entry for one in found)
        return b"".join(found) if whole else None

    def __enter__(self) -> _Table:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get(self, key: bytes, db: str) -> memoryview | None:
        found = self._tables[db].get(key)
        return None if found is None else memoryview(found)

    def cursor(self, db: str) -> _Cursor:
        return _Cursor(sorted(self._tables[db].items()))


@dataclass
class _Cursor:
    items: list[tuple[bytes, bytes]]
    at: int = 0

    def set_range(self, key: bytes) -> bool:
        self.at = next((i for i, (k, _) in enumerate(self.items) if k >= key), len(self.items))
        return self.at < len(self.items)

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        return iter(self.items[self.at :])


@dataclass
class _Memory:
    """A process that is being filled."""

    written: list[tuple[int, int]] = field(default_factory=list)

    def write(self, address: int, data: bytes) -> None:
        self.written.append((address, address + len(data)))


def hostile_store(random: Random) -> Image:
    """An image whose seals and digests are right, whatever it says."""
    fields = msgspec.msgpack.decode(seed_fields())
    for _ in range(random.randrange(3)):
        fields = changed(random, fields)
    data = HEAD + msgspec.msgpack.encode(fields)
    frame = zstandard.ZstdCompressor(level=1, write_content_size=random.random() < 0.95).compress(
        data
    )
    chunks, entries = {}, {}
    sound = random.random() < 0.5
    addresses = [BASE + number * CHUNK for number in range(-1, 4)] + [0x40_0000]
    for sequence, address in enumerate(addresses, 1):
        if random.random() < 0.05:
            address = random.choice([one for one in NASTY if isinstance(one, int) and one >= 0])
        chunks[NUMBER.pack(sequence)] = value = chunk(random, sound)
        entries[INDEX_KEY.pack(1, 0, address)] = INDEX_VALUE.pack(sequence, value[8:24])
    for delta in list(chunks):
        if random.random() < 0.9:  # some are deltas; their bases are anything
            base = random.choice(sorted(chunks))
            key = INDEX_KEY.pack(1, BASES, base_address(NUMBER.unpack(delta)[0]))
            entries[key] = base + chunks[base][8:24]
    summaries = []
    for number in (0, BASES):
        inside = [key for key in sorted(entries) if key[8:12] == number.to_bytes(4, "big")]
        found = digest(b"".join(key[12:] + entries[key] for key in inside))
        summaries.append({"space": number, "chunks": len(inside), "digest": found})
    record: Any = {
        "number": 1,
        "pid": 100,
        "comm": b"cat",
        "boot_id": "b",
        "start_ticks": 1,
        "taken_at": 1.0,
        "saved_bytes": 1,
        "stored_bytes": 1,
        "spaces": summaries,
        "manifest": digest(data),
        "manifest_bytes": len(frame),
    }
    if random.random() < 0.1:
        record = changed(random, record)
    body = msgspec.msgpack.encode(record)
    read = unseal(b"one", digest(b"one", body) + body, ImageRecord)
    tables = {"manifests": {NUMBER.pack(1): frame}, "index": entries, "chunks": chunks}
    return Image(cast(Environment, _Table(tables)), "one", read, cast(Lease, None))


def chunk(random: Random, sound: bool = False) -> bytes:
    present = random.choice((0, 1, 0xFFFF, random.randrange(1 << 16)))
    content = random.randbytes(8) * (present.bit_count() * PAGE // 8)
    payload = zstandard.compress(content, 1)
    if sound:
        return sealed_chunk(present, present, chunkcodec.ZSTD, payload, content)
    if random.random() < 0.3:
        own = random.choice((0, present, random.randrange(1 << 16)))
        head = chunkcodec.DELTA_HEADER.pack(own, random.choice((0, 1, 1, 2)))
        if random.random() < 0.5:
            return sealed_delta(present, head, payload, content)
        return sealed_chunk(present, present, chunkcodec.UNCHECKED_DELTA, head + payload, content)
    match random.randrange(8):
        case 0:  # a bomb: it says what belongs and gives more, or says more
            payload = zstandard.compress(bytes(random.choice((1 << 16, 1 << 24))), 1)
        case 1:
            payload = mangled(random, payload)
    codec = random.choice((1, 1, 1, 1, 0, 2, 3, 4, 5, 255))
    return sealed_chunk(present, present, codec, payload, content)


def read_store(random: Random) -> None:
    """What `show`, `read`, `verify` and a restore read of it."""
    image = hostile_store(random)
    for damage in image.verify():
        str(damage)
    used = image.manifest
    use(used)
    held = describe.held_by(image)
    describe.details(used, held)
    everything = Ranges([(0, 1 << 47)])
    for one in used.processes:
        memory = _Memory()
        fill.fill(image, one, everything, cast(Tracee, memory))
        for start, end in memory.written:
            assert any(m.start <= start and end <= m.end for m in one.mappings)
        for m in one.mappings[:4]:
            with suppress(SnapError):
                image.read(m.start, min(m.size, CHUNK), one.pid)
