"""Giving space back: what a dead take left, what a removed image alone used.

Every transaction here is bounded, so that a take that goes on waits for milliseconds at most.
"""

from __future__ import annotations

from collections.abc import Callable

from . import lease
from .environment import Environment, Transaction
from .errors import DamagedError
from .records import (
    INDEX_VALUE,
    NEXT_SEQUENCE_KEY,
    NUMBER,
    TakeRecord,
    unseal,
)

STEP = 4096
"""Entries for one transaction."""

Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all."""


def takes(environment: Environment) -> list[tuple[int, TakeRecord]]:
    """Takes that go on or died and images that were removed, by image number."""
    found = []
    with environment.read() as transaction:
        for key, value in transaction.cursor(environment.databases["takes"]):
            number = bytes(key)
            found.append((NUMBER.unpack(number)[0], unseal(number, value, TakeRecord)))
    return found


def clear_dead(environment: Environment) -> int:
    """Removes what dead takes left, with the bytes of their chunks; those bytes are returned."""
    return sum(
        _clear_if_dead(environment, number, record)
        for number, record in takes(environment)
        if not record.removed
    )


def _clear_if_dead(environment: Environment, number: int, record: TakeRecord) -> int:
    held = lease.acquire(environment.path, number, alone=True)
    if held is None:
        return 0
    try:
        return clear_take(environment, number, record.first_sequence)
    finally:
        held.release()


def clear_take(environment: Environment, number: int, first_sequence: int) -> int:
    """Removes index, chunks and record of a take; the caller holds its lease. Returns bytes."""

    def work(transaction: Transaction) -> tuple[int, bool]:
        chunks = environment.databases["chunks"]
        freed, count = 0, 0
        cursor = transaction.cursor(environment.databases["index"])
        prefix = NUMBER.pack(number)
        while count < STEP and cursor.set_range(prefix) and bytes(cursor.key()[:8]) == prefix:
            sequence, _ = INDEX_VALUE.unpack(cursor.value())
            if sequence >= first_sequence:
                removed = transaction.pop(NUMBER.pack(sequence), db=chunks)
                freed += len(removed or b"")
            cursor.delete()
            count += 1
        if count < STEP:
            transaction.delete(prefix, db=environment.databases["takes"])
        return freed, count < STEP

    return _repeat(environment, number, work)


def clear_index(environment: Environment, number: int) -> None:
    """Removes the index entries and the record of a removed image; its chunks are swept later."""

    def work(transaction: Transaction) -> tuple[int, bool]:
        count = 0
        cursor = transaction.cursor(environment.databases["index"])
        prefix = NUMBER.pack(number)
        while count < STEP and cursor.set_range(prefix) and bytes(cursor.key()[:8]) == prefix:
            cursor.delete()
            count += 1
        if count < STEP:
            transaction.delete(prefix, db=environment.databases["takes"])
        return 0, count < STEP

    _repeat(environment, number, work)


def _repeat(
    environment: Environment, number: int, work: Callable[[Transaction], tuple[int, bool]]
) -> int:
    total, done = 0, False
    while not done:
        freed, done = environment.write(work, adds=None)
        total += freed
    lease.forget(environment.path, number)
    return total


def forget_strays(environment: Environment) -> None:
    """Removes the lock files of images that are no more and of takes that died early."""
    known = set()
    with environment.read() as transaction:
        for name in ("manifests", "takes"):
            cursor = transaction.cursor(environment.databases[name])
            known |= {NUMBER.unpack(key)[0] for key in cursor.iternext(keys=True, values=False)}
    for number in lease.numbers(environment.path) - known:
        held = lease.acquire(environment.path, number, alone=True)
        if held is not None:
            lease.forget(environment.path, number)
            held.release()


def sweep(environment: Environment, progress: Progress | None = None) -> int:
    """Removes every chunk that no index entry names; returns their bytes.

    Safe beside a take: it puts its chunks together with their index entries, and refers to old
    chunks only of an image whose lease it holds, so what nobody names now stays unnamed.
    """
    freed = 0
    unnamed = _unnamed(environment)
    for start in range(0, len(unnamed), STEP):
        part = unnamed[start : start + STEP]

        def work(transaction: Transaction, part: list[bytes] = part) -> int:
            chunks = environment.databases["chunks"]
            return sum(len(transaction.pop(key, db=chunks) or b"") for key in part)

        freed += environment.write(work, adds=None)
        if progress:
            progress(start + len(part), len(unnamed))
    return freed


def _unnamed(environment: Environment) -> list[bytes]:
    """Keys of the chunks that no index entry names: one bit for each number in use."""
    with environment.read() as transaction:
        databases = environment.databases
        cursor = transaction.cursor(databases["chunks"])
        if not cursor.first():
            return []
        first = NUMBER.unpack(cursor.key())[0]
        end = NUMBER.unpack(transaction.get(NEXT_SEQUENCE_KEY, db=databases["meta"]))[0]
        named = bytearray(max(0, end - first) // 8 + 1)
        for value in transaction.cursor(databases["index"]).iternext(keys=False, values=True):
            bit = INDEX_VALUE.unpack(value)[0] - first
            if not 0 <= bit < end - first:
                raise DamagedError(
                    f"the index names chunk {bit + first}, which does not exist",
                    "snap verify IMAGE",
                )
            named[bit >> 3] |= 1 << (bit & 7)
        unnamed = []
        for key in cursor.iternext(keys=True, values=False):
            bit = NUMBER.unpack(key)[0] - first
            if not named[bit >> 3] >> (bit & 7) & 1:
                unnamed.append(bytes(key))
        return unnamed
