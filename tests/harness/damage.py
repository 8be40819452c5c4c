"""Damage of every kind to a copy of a store, chosen at random, and what our readers say of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import lmdb

from snapshot.units import PAGE

DATA, LOCK = "data.mdb", "lock.mdb"


@dataclass
class Damage:
    """What was done to a store, for messages."""

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


def used(store: Path) -> int:
    """Bytes of the data file without its reserve."""
    return len((store / DATA).read_bytes().rstrip(b"\0"))


def _flip(store: Path, random: Random) -> str:
    at, bit = random.randrange(used(store)), random.randrange(8)
    with (store / DATA).open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))
    return f"bit {bit} of byte {at}"


def _burst(store: Path, random: Random) -> str:
    at, data = random.randrange(used(store)), random.randbytes(random.randrange(1, 600))
    with (store / DATA).open("r+b") as file:
        file.seek(at)
        file.write(data)
    return f"{len(data)} random bytes at {at}"


def _zero(store: Path, random: Random) -> str:
    page = random.randrange(used(store) // PAGE + 1)
    with (store / DATA).open("r+b") as file:
        file.seek(page * PAGE)
        file.write(bytes(PAGE))
    return f"page {page} zeroed"


def _swap_pages(store: Path, random: Random) -> str:
    pages = [random.randrange(used(store) // PAGE + 1) for _ in range(2)]
    with (store / DATA).open("r+b") as file:
        found = []
        for page in pages:
            file.seek(page * PAGE)
            found.append(file.read(PAGE))
        for page, data in zip(pages, reversed(found), strict=True):
            file.seek(page * PAGE)
            file.write(data)
    return f"pages {pages} swapped"


def _truncate(store: Path, random: Random) -> str:
    length = random.choice((random.randrange(used(store)), random.randrange(3 * PAGE)))
    os.truncate(store / DATA, length)
    return f"cut to {length} bytes"


def _inside(database: str, change: Callable[..., str]) -> Callable[[Path, Random], str]:
    """A change that leaves LMDB's own structure sound: through LMDB."""

    def damage(store: Path, random: Random) -> str:
        engine: dict[str, Any] = {}
        if hasattr(lmdb.Environment, "lib_version"):  # the file format is that of LMDB 0.9
            engine["lib_version"] = 0
        with ExitStack() as stack:
            environment = lmdb.open(str(store), max_dbs=6, map_size=1 << 30, **engine)
            stack.callback(environment.close)
            handle = environment.open_db(database.encode(), create=False)
            transaction = stack.enter_context(environment.begin(write=True, db=handle))
            keys = [bytes(key) for key, _ in transaction.cursor()]
            return change(transaction, keys, random)

    return damage


def _get(transaction: lmdb.Transaction, key: bytes) -> bytes:
    value = transaction.get(key)
    assert value is not None
    return bytes(value)


def _remove(transaction: lmdb.Transaction, keys: list[bytes], random: Random) -> str:
    key = random.choice(keys)
    transaction.delete(key)
    return f"{key.hex()} removed"


def _swap(transaction: lmdb.Transaction, keys: list[bytes], random: Random) -> str:
    one, other = random.sample(keys, 2)
    first, second = _get(transaction, one), _get(transaction, other)
    transaction.put(one, second)
    transaction.put(other, first)
    return f"{one.hex()} and {other.hex()} swapped"


def _change(transaction: lmdb.Transaction, keys: list[bytes], random: Random) -> str:
    key = random.choice(keys)
    value = bytearray(_get(transaction, key))
    at = random.randrange(len(value))
    value[at] ^= 1 << random.randrange(8)
    transaction.put(key, bytes(value))
    return f"byte {at} of {key.hex()}"


def _cut(transaction: lmdb.Transaction, keys: list[bytes], random: Random) -> str:
    key = random.choice(keys)
    value = _get(transaction, key)
    length = random.randrange(len(value))
    transaction.put(key, value[:length])
    return f"{key.hex()} cut to {length} bytes"


def _lock(store: Path, random: Random) -> str:
    """What a crash may leave of the lock files; they hold nothing that an image needs."""
    data = random.randbytes(random.choice((0, 1, 64, 8192, 1 << 17)))
    match random.randrange(4):
        case 0:
            (store / LOCK).unlink(missing_ok=True)
            return "no lock.mdb"
        case 1:
            (store / LOCK).write_bytes(data)
            (store / LOCK).chmod(0o600)
            return f"{len(data)} random bytes in lock.mdb"
        case 2:
            for path in (store / "use").iterdir():
                path.write_bytes(data)
            return f"{len(data)} random bytes in each lease"
        case _:
            shutil.rmtree(store / "use")
            return "no leases"


KINDS: dict[str, Callable[[Path, Random], str]] = {
    "bit": _flip,
    "burst": _burst,
    "zeroed block": _zero,
    "swapped blocks": _swap_pages,
    "truncation": _truncate,
    "chunk removed": _inside("chunks", _remove),
    "chunks swapped": _inside("chunks", _swap),
    "chunk cut": _inside("chunks", _cut),
    "chunk changed": _inside("chunks", _change),
    "index entry removed": _inside("index", _remove),
    "index entries swapped": _inside("index", _swap),
    "index entry changed": _inside("index", _change),
    "index entry cut": _inside("index", _cut),
    "manifest changed": _inside("manifests", _change),
    "manifest cut": _inside("manifests", _cut),
    "record changed": _inside("images", _change),
    "lock files": _lock,
}
_MAYBE = {"bit", "burst", "zeroed block", "swapped blocks", "lock files"}
_FRAMES = {"chunk changed", "manifest changed"}
"""A bit of a zstd frame's header may mean nothing: the bytes are right then, as reading shows."""
ALWAYS_SEEN = frozenset(KINDS) - _MAYBE - _FRAMES
"""What touches something that the image needs, whatever is chosen."""


def damage(store: Path, random: Random, kind: str) -> Damage:
    return Damage(kind, KINDS[kind](store, random))
