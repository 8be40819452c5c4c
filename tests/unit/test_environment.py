"""What LMDB does not check for us: one environment, no fork, growth, a file that was cut off."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import lmdb
import pytest

from snapshot import environment as environments
from snapshot.environment import DATA, RESERVE, Environment, Transaction
from snapshot.errors import DamagedError, StoreError
from snapshot.units import MIB

SMALL = 1 * MIB


def open_environment(path: Path, map_bytes: int = 64 * MIB) -> Environment:
    return environments.open_environment(path, map_bytes, create=True)


def fill(environment: Environment, first: int, count: int, size: int = 30_000) -> None:
    def work(transaction: Transaction) -> None:
        for number in range(first, first + count):
            key = number.to_bytes(8, "big")
            transaction.put(key, key * (size // 8), db=environment.databases["chunks"])

    environment.write(work)


def count(environment: Environment) -> int:
    with environment.read() as transaction:
        return int(transaction.stat(environment.databases["chunks"])["entries"])


def test_one_environment_for_one_directory(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    first = open_environment(tmp_path)
    assert open_environment(tmp_path / "link") is first
    del first
    gc.collect()
    assert count(open_environment(tmp_path)) == 0


def test_modes(tmp_path: Path) -> None:
    held = open_environment(tmp_path)
    assert {path.name: path.stat().st_mode & 0o777 for path in held.path.iterdir()} == {
        "data.mdb": 0o600,
        "lock.mdb": 0o600,
    }


def test_growth(tmp_path: Path) -> None:
    environment = open_environment(tmp_path, SMALL)
    for first in range(0, 400, 100):
        fill(environment, first, 100)
    assert count(environment) == 400


def test_growth_waits_for_readers(tmp_path: Path) -> None:
    """Were the map moved under a reader, its view would read freed addresses: a crash."""
    environment = open_environment(tmp_path, SMALL)
    fill(environment, 0, 5)
    stop, wrong = threading.Event(), []

    def read() -> None:
        while not stop.wait(0.001):  # else these threads keep the GIL from the writer
            with environment.read() as transaction:
                for key, value in transaction.cursor(environment.databases["chunks"]):
                    if bytes(value[:8]) != bytes(key):
                        wrong.append(bytes(key))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for first in range(5, 45):
        fill(environment, first, 1, size=1_000_000)
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert count(environment) == 45


OTHER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.unit.test_environment import fill, open_environment
environment = open_environment(Path(sys.argv[1]), 1 << 20)
for line in sys.stdin:
    fill(environment, int(line), 100)
    print("done", flush=True)
"""


def test_growth_by_another_process(tmp_path: Path) -> None:
    """A reader and a writer here meet a map that another process has made larger."""
    environment = open_environment(tmp_path, SMALL)
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", OTHER, str(tmp_path), root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdin
        assert other.stdout
        for first in range(0, 600, 200):
            other.stdin.write(f"{first}\n")
            other.stdin.flush()
            assert other.stdout.readline() == "done\n"
            assert count(environment) == first + 100
            fill(environment, first + 100, 100)
        other.stdin.close()
        assert other.wait(10) == 0
    assert count(environment) == 600


def test_an_error_in_a_write_undoes_it(tmp_path: Path) -> None:
    environment = open_environment(tmp_path)

    def work(transaction: Transaction) -> None:
        transaction.put(b"key", b"value", db=environment.databases["chunks"])
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        environment.write(work)
    assert count(environment) == 0


def test_not_after_fork(tmp_path: Path) -> None:
    environment = open_environment(tmp_path)
    fill(environment, 0, 1)
    pid = os.fork()
    if not pid:
        try:
            with pytest.raises(StoreError, match="before a fork"), environment.read():
                pass
            with pytest.raises(StoreError, match="before a fork"):
                environment.write(lambda transaction: None)
            again = open_environment(tmp_path)
            fill(again, 1, 1)
            os._exit(0 if again is not environment and count(again) == 2 else 1)
        finally:
            os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0
    fill(environment, 2, 1)
    assert count(environment) == 3


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    environment = open_environment(tmp_path)
    fill(environment, 0, 100)
    used = environment.used_bytes()
    del environment
    gc.collect()
    data = tmp_path / DATA
    assert used + RESERVE <= data.stat().st_size <= used + 4 * RESERVE
    os.truncate(data, used)
    assert count(open_environment(tmp_path)) == 100
    gc.collect()
    os.truncate(data, used - 1)
    with pytest.raises(DamagedError, match=f"was cut off: it has {used - 1} bytes of {used}"):
        open_environment(tmp_path)


def test_databases_are_made_only_when_asked(tmp_path: Path) -> None:
    lmdb.open(str(tmp_path)).close()
    before = (tmp_path / DATA).read_bytes()
    with pytest.raises(StoreError, match="there is no store of snap in"):
        environments.open_environment(tmp_path)
    assert (tmp_path / DATA).read_bytes() == before


def test_is_lmdb(tmp_path: Path) -> None:
    held = open_environment(tmp_path)
    assert environments.is_lmdb(held.path / DATA)
    assert not environments.is_lmdb(tmp_path / "absent")
    assert not environments.is_lmdb(tmp_path)
    (tmp_path / "short").write_bytes(b"x")
    assert not environments.is_lmdb(tmp_path / "short")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid():
        pytest.skip("mounting a tmpfs of 40 MiB needs root: run the tests as root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m,mode=700", "none", str(disk)]
    result = subprocess.run(mount, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {result.stderr.strip()}")
    yield disk
    gc.collect()
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    """Nothing half written, and what frees space can still be done."""
    environment = open_environment(small_disk)
    fill(environment, 0, 10)
    with pytest.raises(
        StoreError, match=r"cannot write to the store .* free on its disk"
    ) as caught:
        fill(environment, 10, 2000)
    assert caught.value.hint == f"df -h {small_disk}"
    assert count(environment) == 10

    filler = os.open(small_disk / "filler", os.O_WRONLY | os.O_CREAT)
    with suppress(OSError):
        while True:
            os.write(filler, bytes(4096))
    os.close(filler)
    with pytest.raises(StoreError, match=r"No space left on device .*\(0 KiB free on its disk\)"):
        environment.write(lambda transaction: None, adds=64 * MIB)

    def empty(transaction: Transaction) -> None:
        for number in range(10):
            transaction.delete(number.to_bytes(8, "big"), db=environment.databases["chunks"])

    environment.write(empty, adds=None)
    assert count(environment) == 0
