"""The directory of a store: where it is, whose it is, and making a new one."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from . import lease
from .environment import DATA, LOCK, is_lmdb, no_store
from .errors import StoreError

_NEW = "new"


def default_path() -> Path:
    """$SNAP_STORE, else `livesnap` in the XDG data directory."""
    given = os.environ.get("SNAP_STORE")
    if given:
        return Path(given)
    data = os.environ.get("XDG_DATA_HOME", "")
    base = Path(data) if data.startswith("/") else Path.home() / ".local" / "share"
    return base / "livesnap"


def check_trust(path: Path) -> None:
    """An image holds every secret of a process, and what is restored from it runs: StoreError for a
    store that others may write to, or that is somebody else's."""
    try:
        if not path.is_dir():
            raise no_store(path, foreign=path.exists())
        _check_way(path.resolve())
        _check_place(path, path.stat())
        for name in (DATA, LOCK, lease.DIRECTORY):
            place = path / name
            with suppress(FileNotFoundError):
                _check_place(place, place.lstat())
    except OSError as error:
        message = f"cannot open the store {path}: {error.strerror}"
        raise StoreError(message, f"ls -ld {path}") from None


def _check_way(path: Path) -> None:
    """Whoever can rename a directory on the way can put another store in the place of this one."""
    for above in path.parents:
        mode = above.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            message = f"everybody may write to {above}, on the way to the store {path}"
            raise StoreError(message, f"chmod o-w {above}")


def _check_place(place: Path, found: os.stat_result) -> None:
    if stat.S_ISLNK(found.st_mode):
        message = f"{place} is a symbolic link; the files of a store are in its directory"
        raise StoreError(message, f"ls -l {place}")
    if found.st_uid != os.geteuid():
        raise StoreError(
            f"{place} belongs to user {found.st_uid}, not to {os.geteuid()}: whoever can write to "
            "a store decides what a restored process does",
            f"ls -ld {place}",
        )
    if found.st_mode & 0o022:
        message = f"others may write to {place} (mode {found.st_mode & 0o7777:o})"
        raise StoreError(message, f"chmod go-rwx {place}")


@contextmanager
def made(path: Path) -> Iterator[Path | None]:
    """Makes the directory of a store. When it has no store yet, gives another directory to make the
    data file in; that is moved into its place at the end, so that there never is half a store.
    Whoever else does the same meanwhile waits. StoreError when something else is in it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_trust(path)
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        message = f"cannot make a store in {path}: {error.strerror}"
        raise StoreError(message, f"ls -ld {path}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        if is_lmdb(path / DATA):
            yield None
            return
        _check_empty(path)
        (path / lease.DIRECTORY).mkdir(mode=0o700, exist_ok=True)
        new = path / _NEW
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        yield new
        (new / DATA).rename(path / DATA)
        os.fsync(handle)
        shutil.rmtree(new)
    finally:
        os.close(handle)


def _check_empty(path: Path) -> None:
    if is_foreign(path):
        message = f"{path} is neither a store of snap nor empty"
        raise StoreError(message, "snap --store NEW_DIRECTORY take PID")


def is_foreign(path: Path) -> bool:
    """Whether something is in the directory without a store that is not ours; a store whose making
    was cut short counts as empty."""
    others = {entry.name for entry in path.iterdir()} - {DATA, LOCK, lease.DIRECTORY, _NEW}
    return bool(others) or ((path / DATA).exists() and (path / DATA).stat().st_size > 0)
