"""The order in which a restored process first touched its memory: a hint for the next restore.

One small record for each image and space beside the image (docs/image-format.md). It is never
needed: without it, or when it is damaged, pages come in another order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from .environment import Environment, Transaction
from .records import NUMBER, digest
from .units import CHUNK

_KEY = struct.Struct(">5sQI")  # "order", image number, space
_PREFIX = b"order"
_DIGEST = 16
MOST = 1 << 14
"""Chunks that are remembered: 1 GiB of memory, 128 KiB of the store."""


def load(environment: Environment, number: int, space: int) -> list[int]:
    """Chunk addresses; none when there is no record that can be read."""
    key = _KEY.pack(_PREFIX, number, space)
    with environment.read() as transaction:
        value = bytes(transaction.get(key, db=environment.databases["meta"]) or b"")
    body = value[_DIGEST:]
    if len(body) % NUMBER.size or digest(key, body) != value[:_DIGEST]:
        return []
    return [at for (at,) in NUMBER.iter_unpack(body) if at % CHUNK == 0 and at >> 47 == 0]


def save(environment: Environment, number: int, space: int, chunks: Iterable[int]) -> None:
    """In the place of what was there. The caller has the lease of the image. StoreError."""
    key = _KEY.pack(_PREFIX, number, space)
    body = b"".join(NUMBER.pack(chunk) for chunk in chunks)[: MOST * NUMBER.size]

    def work(transaction: Transaction) -> None:
        transaction.put(key, digest(key, body) + body, db=environment.databases["meta"])

    environment.write(work, adds=len(body) + 4096)


def forget(environment: Environment, transaction: Transaction, number: int) -> None:
    """All of an image that is being removed."""
    cursor = transaction.cursor(environment.databases["meta"])
    first = _KEY.pack(_PREFIX, number, 0)
    while cursor.set_range(first) and bytes(cursor.key()).startswith(first[:-4]):
        cursor.delete()
