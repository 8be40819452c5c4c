"""The store: images and the chunks they share, in one LMDB environment; docs/image-format.md.

An image exists from the transaction that puts its record into `images` until the one that takes it
out. What takes put before that is named in `takes` and is rubbish once their lease is free.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from . import directory, lease, sweep, workingset
from .environment import (
    DATA,
    LEAST,
    MAP_BYTES,
    Environment,
    Transaction,
    is_lmdb,
    no_store,
    open_environment,
)
from .errors import DamagedError, StoreError
from .image import Image
from .records import (
    BASES,
    EARLIER,
    FORMAT,
    FORMAT_KEY,
    NEXT_IMAGE_KEY,
    NEXT_SEQUENCE_KEY,
    NUMBER,
    ImageRecord,
    ProcessIdentity,
    TakeRecord,
    seal,
    unseal,
)
from .units import mib

if TYPE_CHECKING:
    from .writer import Earlier, ImageWriter

__all__ = ["ImageInfo", "ProcessIdentity", "Store"]


NEWEST = "latest"
"""Not the name of an image: it stands for the newest."""


def check_name(name: str) -> None:
    """StoreError when an image cannot be called so: it could not be named on a command line."""
    odd = not name or "\0" in name or name.startswith("-") or name == NEWEST
    if odd or len(name.encode()) > 255:
        raise StoreError(f"{name!r} cannot name an image", "snap take PID --name NAME")


class ImageInfo(NamedTuple):
    image: str
    pid: int
    comm: str
    taken_at: float  # seconds since the epoch, T0
    saved_bytes: int
    stored_bytes: int
    damaged: bool = False  # its record cannot be read; the other fields are empty


class Store:
    """An open store. Cheap to open again: a process has one environment of it, whatever it does."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self.path = environment.path

    @classmethod
    def open(
        cls, path: Path | None = None, create: bool = False, map_bytes: int = MAP_BYTES
    ) -> Store:
        """Opens the store in the directory `path`, or makes it when `create`.

        Raises StoreError when it is no store, somebody else's, or others may write to it;
        DamagedError when its file was cut off.
        """
        path = path or directory.default_path()
        if create:
            _create(path, map_bytes)
        directory.check_trust(path)
        if not is_lmdb(path / DATA):
            raise no_store(path, foreign=directory.is_foreign(path))
        store = cls(open_environment(path, map_bytes))
        store._check_format()
        return store

    def free_name(self, name: str) -> str:
        """`name`, or when an image has it `name-2`, `name-3`, …"""
        with self._environment.read() as transaction:
            taken = self._environment.databases["images"]
            names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
            return next(n for n in names if transaction.get(n.encode(), db=taken) is None)

    def begin(
        self,
        name: str,
        like: ProcessIdentity | None = None,
        around: AbstractContextManager[None] | None = None,
    ) -> ImageWriter:
        """A new image, after removing what dead takes left. `like` names its process: chunks equal
        to those of its newest image, at the same address, are shared with that. The thread that
        writes to the disk lives inside `around`.

        StoreError when an image of the name exists or is being taken.
        """
        from .writer import ImageWriter  # who reads needs none of it

        check_name(name)
        sweep.clear_dead(self._environment)
        # Before the number of the first chunk: what it shares has smaller ones.
        earlier = self._newest(like) if like else None
        held: list[lease.Lease] = []

        def work(transaction: Transaction) -> tuple[int, int]:
            databases = self._environment.databases
            self._check_free(transaction, name)
            meta = databases["meta"]
            number = NUMBER.unpack(transaction.get(NEXT_IMAGE_KEY, db=meta))[0]
            sequence = NUMBER.unpack(transaction.get(NEXT_SEQUENCE_KEY, db=meta))[0]
            for old in held:  # this is done again when the map had to grow
                old.release()
            got = lease.acquire(self.path, number, alone=True)
            if got is None:
                raise StoreError(f"the image number {number} is in use", "snap gc")
            held[:] = [got]
            key = NUMBER.pack(number)
            record = TakeRecord(name=name, pid=os.getpid(), first_sequence=sequence)
            transaction.put(key, seal(key, record), db=databases["takes"])
            transaction.put(NEXT_IMAGE_KEY, NUMBER.pack(number + 1), db=meta)
            transaction.put(FORMAT_KEY, FORMAT, db=meta)
            return number, sequence

        try:
            number, sequence = self._environment.write(work)
        except BaseException:
            if earlier:
                earlier.lease.release()
            raise
        return ImageWriter(self._environment, name, number, sequence, held[0], earlier, around)

    def images(self) -> list[ImageInfo]:
        """All images, the oldest first."""
        found = []
        with self._environment.read() as transaction:
            for key, value in transaction.cursor(self._environment.databases["images"]):
                found.append(_info(bytes(key), value))
        return sorted(found, key=lambda info: info.taken_at)

    def image(self, name: str) -> Image:
        """The image that `resolve` finds. It cannot be removed until it is closed."""
        name = self.resolve(name)
        while True:
            record = self._record(name)
            held = lease.acquire(self.path, record.number, alone=False)
            if held is None:
                raise StoreError(f"the image {name} is being removed", "snap list")
            try:
                if self._record(name).number == record.number:
                    return Image(self._environment, name, record, held)
            except BaseException:
                held.release()
                raise
            held.release()

    def resolve(self, name: str) -> str:
        """The image meant by an exact name, the beginning of only one name, or `latest`."""
        infos = self.images()
        names = [info.image for info in infos]
        if name in names:
            return name
        if name == NEWEST and names:
            return names[-1]
        matching = [known for known in names if name and known.startswith(name)]
        if len(matching) == 1:
            return matching[0]
        if matching:
            listed = ", ".join(matching[:5]) + (", …" if len(matching) > 5 else "")
            raise StoreError(
                f"{name} is the beginning of {len(matching)} images: {listed}", "snap list"
            )
        raise StoreError(f"no image {name} among the {len(names)} in {self.path}", "snap list")

    def remove(self, name: str) -> None:
        """Removes the image of this exact name; `collect` gives its space back afterwards.

        StoreError when it is in use: a restored process may still need pages of it.
        """
        found = self._number(name)
        held = lease.acquire(self.path, found, alone=True)
        if held is None:
            pids = ", ".join(map(str, lease.holders(self.path, found))) or "unknown"
            raise StoreError(
                f"the image {name} is in use (by process {pids}): a restore is still reading it, "
                "or a take compares with it",
                f"ps -p {pids.replace(' ', '')}",
            )
        number = NUMBER.pack(found)
        gone = TakeRecord(name=name, pid=os.getpid(), first_sequence=0, removed=True)

        def work(transaction: Transaction) -> None:
            databases = self._environment.databases
            transaction.delete(name.encode(), db=databases["images"])
            transaction.delete(number, db=databases["manifests"])
            workingset.forget(self._environment, transaction, found)
            transaction.put(number, seal(number, gone), db=databases["takes"])

        try:
            self._environment.write(work, adds=None)
            sweep.clear_index(self._environment, found)
        finally:
            held.release()

    def collect(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Removes leftovers of dead takes and chunks that no image names; returns their bytes.

        DamagedError, and nothing of an image is removed, when the record of one is damaged or lost.
        `progress` is called with the chunks removed and those to remove.
        """
        self._environment.check()
        freed = sweep.clear_dead(self._environment)
        for number, record in sweep.takes(self._environment):
            if record.removed:
                sweep.clear_index(self._environment, number)
        self._check_complete()
        sweep.forget_strays(self._environment)
        return freed + sweep.sweep(self._environment, progress)

    def close(self) -> None:
        """Images and writers that are open keep the environment until they are closed."""
        self.__dict__.pop("_environment", None)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _record(self, name: str) -> ImageRecord:
        key = name.encode()
        with self._environment.read() as transaction:
            value = transaction.get(key, db=self._environment.databases["images"])
            if value is None:
                raise StoreError(f"no image {name} in {self.path}", "snap list")
            try:
                return unseal(key, value, ImageRecord)
            except DamagedError as error:
                raise DamagedError(f"image {name}: {error.message}", f"snap rm {name}") from None

    def _number(self, name: str) -> int:
        """The number of an image, also when its record is damaged: then its manifest is the only
        one that no record names."""
        try:
            return self._record(name).number
        except DamagedError:
            unnamed = self._unnamed()
            if len(unnamed) != 1:
                raise
            return unnamed.pop()

    def _unnamed(self) -> set[int]:
        """Numbers of manifests that belong to no readable record."""
        databases = self._environment.databases
        with self._environment.read() as transaction:
            numbers = {
                NUMBER.unpack(key)[0] for key, _ in transaction.cursor(databases["manifests"])
            }
            for key, value in transaction.cursor(databases["images"]):
                with suppress(DamagedError):
                    numbers.discard(unseal(bytes(key), value, ImageRecord).number)
        return numbers

    def _check_complete(self) -> None:
        unnamed = self._unnamed()
        if unnamed:
            listed = ", ".join(map(str, sorted(unnamed)))
            raise DamagedError(
                f"the store {self.path} has manifests of {len(unnamed)} images whose records are "
                f"damaged or lost (number {listed}); nothing is swept",
                "snap list",
            )

    def _newest(self, like: ProcessIdentity) -> Earlier | None:
        """The newest image of the process that can be held."""
        from .writer import Earlier

        records = []
        with self._environment.read() as transaction:
            for key, value in transaction.cursor(self._environment.databases["images"]):
                try:
                    record = unseal(bytes(key), value, ImageRecord)
                except DamagedError:
                    continue  # sharing is a saving, not a duty
                if record.identity == like:
                    deltas = any(one.space == BASES for one in record.spaces)
                    records.append((record.taken_at, bytes(key).decode(), record.number, deltas))
        for _, name, number, deltas in sorted(records, reverse=True):
            held = lease.acquire(self.path, number, alone=False)
            if held is None:
                continue
            try:
                if self._record(name).number == number:
                    return Earlier(number, held, deltas)
            except (StoreError, DamagedError):
                pass
            held.release()
        return None

    def _check_free(self, transaction: Transaction, name: str) -> None:
        if transaction.get(name.encode(), db=self._environment.databases["images"]) is not None:
            raise StoreError(f"an image named {name} exists", f"snap rm {name}")
        for key, value in transaction.cursor(self._environment.databases["takes"]):
            record = unseal(bytes(key), value, TakeRecord)
            if record.name == name and not record.removed:
                raise StoreError(
                    f"an image named {name} is being taken by process {record.pid}",
                    f"ps -p {record.pid}",
                )

    def _check_format(self) -> None:
        with self._environment.read() as transaction:
            value = transaction.get(FORMAT_KEY, db=self._environment.databases["meta"])
            found = None if value is None else bytes(value)
        if found is None or not found.startswith(FORMAT.rpartition(b" ")[0]):
            raise no_store(self.path, foreign=True)
        if found not in (FORMAT, *EARLIER):
            raise StoreError(
                f"{self.path} is a {found.decode(errors='replace')}; this snap reads "
                f"{FORMAT.decode()}",
                "pip install -U livesnap",
            )


def _create(path: Path, map_bytes: int) -> None:
    """Makes an empty store unless there is one."""
    with directory.made(path) as new:
        if new:
            _check_room(path)
            environment = open_environment(new, map_bytes, create=True)
            environment.write(lambda transaction: _format(environment, transaction))
            environment.sync()
            environment.close()


def _check_room(path: Path) -> None:
    stat = os.statvfs(path)
    free = stat.f_bavail * stat.f_frsize
    if free < LEAST:
        raise StoreError(
            f"no space for a new store in {path}: it takes {mib(LEAST)}, {mib(free)} are free on "
            "its disk",
            f"df -h {path}",
        )


def _format(environment: Environment, transaction: Transaction) -> None:
    meta = environment.databases["meta"]
    for key, value in (
        (FORMAT_KEY, FORMAT),
        (NEXT_SEQUENCE_KEY, NUMBER.pack(1)),
        (NEXT_IMAGE_KEY, NUMBER.pack(1)),
    ):
        transaction.put(key, value, db=meta, overwrite=False)


def _info(key: bytes, value: memoryview) -> ImageInfo:
    name = key.decode(errors="replace")
    try:
        record = unseal(key, value, ImageRecord)
    except DamagedError:
        return ImageInfo(name, 0, "", 0.0, 0, 0, damaged=True)
    return ImageInfo(
        name,
        record.pid,
        record.comm.decode(errors="replace"),
        record.taken_at,
        record.saved_bytes,
        record.stored_bytes,
    )
