"""The LMDB environment under a store: opened once in a process, grown when full, never torn.

What LMDB asks of its users and does not check is kept here, so that nobody else needs to know it:
one environment per file and process, none used after fork, no growth while a transaction is open,
no page read beyond the end of a file that was cut off.

Transactions are durable in order: each is synced before the page that makes it visible is written
(`metasync=False`), so a power failure undoes the last ones and tears none. `sync` makes them final.
"""

from __future__ import annotations

import os
import struct
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import lmdb

from . import soundness
from .errors import DamagedError, SnapError, StoreError
from .kernel import btree, folios
from .kernel.forget import forget_file
from .units import MIB, PAGE, mib

T = TypeVar("T")

DATA, LOCK = "data.mdb", "lock.mdb"
DATABASES = ("meta", "images", "manifests", "takes", "index", "chunks")
MAP_BYTES = 1 << 36
"""Address space reserved at first; it costs nothing, and doubles when the store outgrows it."""
RESERVE = 8 * MIB
"""The file is always this much longer than what LMDB uses of it, with its blocks allocated: so a
store on a full disk can still be made smaller, a file shorter than its last page has certainly been
cut off (LMDB may count free pages beyond the end), and a length that a damaged page makes up
does not lead beyond the end."""
LEAST = RESERVE + MIB
"""What an empty environment takes on its disk."""
_STEP = 16 * MIB
_FORGET = 32 * MIB
"""Bytes put after which the pages of the file leave our page tables. The kernel maps 16 for each
that LMDB reads, and all of them count as memory of ours, although it can have them at any time."""

_PAGE_HEADER = 16
_MAGIC_AND_VERSION = struct.pack("=II", 0xBEEFC0DE, 1)  # LMDB writes in the machine's byte order
_READERS = 510
_ENGINE: dict[str, Any] = {"lib_version": 0} if hasattr(lmdb.Environment, "lib_version") else {}
"""Newer lmdb has two engines; the file format is that of LMDB 0.9."""
_DAMAGE = (
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.InvalidError,
    lmdb.PanicError,
    struct.error,  # a key or value of another length than ours have
)

Transaction = Any
"""lmdb.Transaction: typed by the newest lmdb alone."""


class Environment:
    """One LMDB environment; use `open_environment`, which never makes two of the same file.

    Reads run side by side from any thread; writes one at a time. Neither may be nested.
    """

    def __init__(self, path: Path, map_bytes: int, create: bool, checked: bool) -> None:
        self.path = path
        self._pid = os.getpid()
        self._gate = threading.Condition()
        self._active = 0  # transactions of this process; growth waits until there are none
        self._growing = False
        self._writing = threading.Lock()
        self._put_bytes = 0  # since the pages of the file were forgotten
        self._stopped: lmdb.Error | None = None
        """Why a write failed first: LMDB may refuse everything from then on (PanicError)."""
        with self._understood("cannot open"), _none_missing(path):
            if not create:
                soundness.check_head(path / DATA)
            self._lmdb = lmdb.open(
                str(path),
                map_size=map_bytes,
                max_dbs=len(DATABASES),
                max_readers=_READERS,
                metasync=False,
                mode=0o600,
                max_spare_txns=0,  # their reader slots would be shared with a forked child
                **_ENGINE,
            )
            self._begin_lmdb: Callable[..., Transaction] = self._lmdb.begin
            self._check_length()
            self._lmdb.reader_check()
            self._data = os.open(path / DATA, os.O_RDWR | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._data)
            if not checked:
                soundness.check_trees(path / DATA, self._data, self.read)
            with self._lmdb.begin(write=True) as transaction:  # a read one would forget them
                self.databases = {
                    name: self._lmdb.open_db(name.encode(), transaction, create=create)
                    for name in DATABASES
                }

    def read(self, buffers: bool = True) -> Reading:
        """A read transaction, for `with`. Keep it short: pages freed meanwhile cannot be used
        again. With `buffers` its values are views that are void when it ends, else bytes."""
        return Reading(self, buffers)

    def write(self, work: Callable[[Transaction], T], adds: int | None = 0) -> T:
        """Runs `work` in a write transaction and commits it; again from its start when the map had
        to grow. So `work` must not change anything but the transaction.

        `adds` is about how many bytes it puts; None when it gives space back: that may use the
        reserve. StoreError, and nothing is changed, when the disk is full.
        """
        with self._writing, self._understood("cannot write to"):
            while True:
                self.enter()
                try:
                    with self.begin(True, True) as transaction:
                        self._lengthen(transaction, adds)
                        result = work(transaction)
                    self._forget(adds or 0)
                    return result
                except lmdb.MapFullError:
                    pass
                except lmdb.Error as error:  # without its frames, which hold views
                    self._stopped = self._stopped or type(error)(*error.args)
                    raise
                finally:
                    self.leave()
                self._resize(2 * int(self._lmdb.info()["map_size"]))

    def await_writer(self) -> None:
        """Until a write that is under way has ended, and said why it failed."""
        with self._writing:
            pass

    def sync(self) -> None:
        """When it returns, all that was committed outlives a power failure."""
        self._check_process()
        with self._understood("cannot write to"):
            self._lmdb.sync(True)

    def check(self) -> None:
        """DamagedError when the trees are no longer what they must be, and before pages are freed:
        a long value says itself how many it takes."""
        self._check_process()
        with self._understood("cannot read"):
            self._check_length()
            soundness.check_trees(self.path / DATA, self._data, self.read, deep=True)

    def close(self) -> None:
        """For who knows that nobody else has it; else it closes with its last reference."""
        self._lmdb.close()

    def let_go(self) -> bool:
        """In a child after fork: forgets the environment, so that it can be opened anew. Not while
        another thread of the parent had a transaction."""
        if self._active == 0:
            self._lmdb.close()
        return self._active == 0

    @property
    def descriptors(self) -> set[int]:
        """Those that are closed with it, but for LMDB's own."""
        return {self._data}

    def used_bytes(self) -> int:
        """Length of the part of the data file that LMDB uses or has used."""
        self._check_process()
        return (int(self._lmdb.info()["last_pgno"]) + 1) * self._page_bytes()

    def entries(self, database: str, prefix: bytes, entry: int, most: int) -> bytes | None:
        """kernel.btree.entries of now."""
        with self.read() as transaction:
            if most > transaction.stat(self.databases[database])["entries"]:
                return None  # no memory on the word of a damaged record
            number = transaction.id()
            return btree.entries(self._data, PAGE, number, database, prefix, entry, most)

    def places(self, database: str, entries: bytes, entry: int, key: int) -> tuple[int, Any]:
        """The data file, open for as long as this is, and kernel.btree.places of now: small values
        move when others are written."""
        with self.read() as transaction:
            number = transaction.id()
            found = btree.places(self._data, PAGE, number, database, entries, entry, key)
        return self._data, found

    def begin(self, write: bool, buffers: bool) -> Transaction:
        """A transaction; between `enter` and `leave`."""
        while True:
            try:
                return self._begin_lmdb(write=write, buffers=buffers)
            except lmdb.MapResizedError:  # by another process
                self.leave()
                try:
                    self._resize(0)
                finally:
                    self.enter()

    def enter(self) -> None:
        """Before each transaction: waits while the map is being grown."""
        if os.getpid() != self._pid:
            self._check_process()
        with self._gate:
            while self._growing:
                self._gate.wait()
            self._active += 1

    def leave(self) -> None:
        with self._gate:
            self._active -= 1
            if self._growing:
                self._gate.notify_all()

    def _resize(self, size: int) -> None:
        """A map of `size` bytes, or as large as another process made it (0). The caller has no
        transaction open; waits until no thread has."""
        with self._gate:
            while self._growing:
                self._gate.wait()
            self._growing = True
            try:
                while self._active:
                    self._gate.wait()
                self._lmdb.set_mapsize(size)
            finally:
                self._growing = False
                self._gate.notify_all()

    def _lengthen(self, transaction: Transaction, adds: int | None) -> None:
        """Keeps the file ahead of its pages, and what is written next in small folios; within a
        write transaction, so one process at once."""
        used, length = self.used_bytes(), os.fstat(self._data).st_size
        if adds is None:
            if length < used + MIB:
                os.ftruncate(self._data, used + MIB)
            return
        missing = used + adds + RESERVE - length
        if missing > 0:
            try:
                self._allocate(length, missing)
            except OSError:
                if self._free_bytes(transaction) < 2 * adds + RESERVE:
                    raise
        folios.bound(self._data, used, used + adds)

    def _allocate(self, length: int, missing: int) -> None:
        """Real blocks at the end of the file; OSError when the disk has none left."""
        try:
            os.posix_fallocate(self._data, length, missing + _STEP)
        except OSError:
            os.posix_fallocate(self._data, length, missing)

    def _forget(self, put: int) -> None:
        """Between `enter` and `leave`, so that the map is not moved."""
        self._put_bytes += put
        if self._put_bytes >= _FORGET:
            self._put_bytes = 0
            forget_file(self._data)

    def _free_bytes(self, transaction: Transaction) -> int:
        """About what is free inside the file: what was removed."""
        stats = [transaction.stat(database) for database in self.databases.values()]
        kinds = ("branch_pages", "leaf_pages", "overflow_pages")
        pages = sum(stat[kind] for stat in stats for kind in kinds)
        return self.used_bytes() - int(pages) * self._page_bytes()

    def _check_length(self) -> None:
        """Reading beyond the end of a mapped file is SIGBUS: DamagedError instead."""
        used = self.used_bytes()
        length = (self.path / DATA).stat().st_size
        if length < used:
            raise DamagedError(
                f"{self.path / DATA} was cut off: it has {length} bytes of {used}",
                "bring the file back from a copy, or start a new store: snap --store DIR take PID",
            )

    def _page_bytes(self) -> int:
        return int(self._lmdb.stat()["psize"])

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise StoreError(
                f"the store {self.path} was opened by process {self._pid}, before a fork",
                "open it again in the new process: Store.open(path)",
            )

    @contextmanager
    def _understood(self, doing: str) -> Iterator[None]:
        """Errors of LMDB and of the system become ours."""
        try:
            yield
        except (lmdb.Error, OSError, struct.error) as error:
            raise self.failure(doing, error) from error

    def damage(self, error: Exception) -> DamagedError:
        return DamagedError(f"the store {self.path} is damaged: {error}", "snap verify IMAGE")

    def failure(self, doing: str, error: Exception) -> SnapError:
        """What an error of LMDB or of the system means, with the space that is left."""
        if isinstance(error, lmdb.PanicError) and self._stopped is not None:
            error = self._stopped
        if isinstance(error, _DAMAGE):
            return self.damage(error)
        try:
            stat = os.statvfs(self.path)
            free = stat.f_bavail * stat.f_frsize
        except OSError:
            return StoreError(f"{doing} the store {self.path}: {error}", f"ls -ld {self.path}")
        return StoreError(
            f"{doing} the store {self.path}: {error} ({mib(free)} free on its disk)",
            f"df -h {self.path}" if free < _STEP + RESERVE else f"ls -l {self.path}",
        )


class Reading:
    """A read transaction of an environment as a context manager; a class, because a generator
    would cost a page fault's way 3 µs."""

    __slots__ = ("_buffers", "_environment", "_transaction")

    def __init__(self, environment: Environment, buffers: bool) -> None:
        self._environment = environment
        self._buffers = buffers

    def __enter__(self) -> Transaction:
        environment = self._environment
        environment.enter()
        try:
            self._transaction = environment.begin(False, self._buffers)
        except BaseException as error:
            environment.leave()
            if isinstance(error, lmdb.PanicError):
                environment.await_writer()
            if isinstance(error, (lmdb.Error, OSError)):
                raise environment.failure("cannot read", error) from error
            raise
        return self._transaction

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._transaction.abort()
        self._environment.leave()
        if isinstance(error, (lmdb.Error, struct.error)):  # a page that says what no page can
            raise self._environment.damage(error) from error


_open: weakref.WeakValueDictionary[tuple[int, int], Environment] = weakref.WeakValueDictionary()
_opening = threading.Lock()
_inherited: list[Environment] = []
"""Of the parent, in the middle of a transaction: ending that here would end it there."""


def open_environment(
    path: Path, map_bytes: int = MAP_BYTES, create: bool = False, checked: bool = False
) -> Environment:
    """The environment in the directory `path`, the same object while anyone in this process holds
    it. Its databases are made when `create`, else they must be there. `checked`: the parent of this
    process had it open, so its trees have just been looked at."""
    with _opening:
        stat = path.stat()
        key = stat.st_dev, stat.st_ino
        environment = _open.get(key)
        if environment is None:
            environment = Environment(path, map_bytes, create, checked)
            _open[key] = environment
        return environment


def no_store(path: Path, *, foreign: bool = False) -> StoreError:
    """`foreign`: something else is there, in which no take would make a store either."""
    message = f"there is no store of snap in {path}"
    if foreign:
        return StoreError(f"{message}, and it is not empty", "snap --store DIR list")
    return StoreError(message, f"the first take makes one: snap --store {path} take PID")


@contextmanager
def _none_missing(path: Path) -> Iterator[None]:
    """An LMDB environment without our databases is somebody else's."""
    try:
        yield
    except lmdb.NotFoundError:
        raise no_store(path, foreign=True) from None


def is_lmdb(path: Path) -> bool:
    """Whether the file begins as an LMDB data file of the version that we write does."""
    try:
        with path.open("rb") as file:
            head = file.read(_PAGE_HEADER + len(_MAGIC_AND_VERSION))
    except OSError:
        return False
    return head[_PAGE_HEADER:] == _MAGIC_AND_VERSION


def _after_fork() -> None:
    global _open, _opening
    for environment in list(_open.values()):
        if not environment.let_go():
            _inherited.append(environment)
    _open = weakref.WeakValueDictionary()
    _opening = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
