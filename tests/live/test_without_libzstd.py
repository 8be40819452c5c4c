"""Where the system has no libzstd (a mount namespace in which its file is empty) all works as well,
only slower."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from snapshot.chunkcodec import RAW, RAW_BLOCKS, ZSTD, ZSTD_BLOCKS
from snapshot.image import Image
from snapshot.records import NUMBER
from snapshot.store import Store
from tests.conftest import ROOT
from tests.harness.processes import become_subreaper, wait_until

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sudo pytest tests/live"),
]
SOURCE = ROOT / "tests" / "targets" / "changes.c"


@pytest.fixture(scope="module")
def without() -> list[str]:
    """What to put before a command."""
    ctypes.CDLL("libzstd.so.1")
    mapped = (line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines())
    found = next(path for path in mapped if "libzstd.so" in path)
    script = f'mount --bind /dev/null {found} && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, "sh"]


@pytest.fixture
def changes(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    become_subreaper()
    program = tmp_path / "changes"
    subprocess.run(["gcc", "-std=gnu11", "-O2", "-pthread", "-o", program, SOURCE], check=True)
    with subprocess.Popen([program, "16"], cwd=tmp_path, stdin=subprocess.DEVNULL) as victim:
        try:
            wait_until((tmp_path / "done").exists, "changes ready")
            (tmp_path / "done").unlink()
            yield victim
        finally:
            victim.kill()


def snap(prefix: list[str], store: Path, *words: object) -> dict[str, Any]:
    command = [*prefix, sys.executable, str(ROOT / "cli.py"), "--store", str(store)]
    done = subprocess.run(
        [*command, *map(str, words), "--json"],
        capture_output=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def codecs(image: Image) -> Counter[int]:
    found: Counter[int] = Counter()
    with image._environment.read() as transaction:
        for entry in image._space(0).entries():
            chunks = image._environment.databases["chunks"]
            found[transaction.get(NUMBER.pack(entry.sequence), db=chunks)[4]] += 1
    return found


def test_check_says_so(without: list[str], tmp_path: Path) -> None:
    for prefix, state in ((without, "degraded"), ([], "ok")):
        items = snap(prefix, tmp_path / "store", "check")["items"]
        (item,) = [item for item in items if item["item"] == "libzstd"]
        assert item["state"] == state


@pytest.mark.parametrize("taken_without", [True, False])
def test_take_and_restore(
    without: list[str],
    changes: subprocess.Popen[bytes],
    tmp_path: Path,
    taken_without: bool,
) -> None:
    """Also of an image that has blocks, where they cannot be read one by one."""
    store = tmp_path / "store"
    snap(without if taken_without else [], store, "take", changes.pid, "--name", "one")
    changes.kill()
    changes.wait()
    with Store.open(store) as opened, opened.image("one") as image:
        assert set(codecs(image)) <= ({RAW, ZSTD} if taken_without else {RAW_BLOCKS, ZSTD_BLOCKS})
    snap(without, store, "verify", "one")
    pid = snap(without, store, "restore", "one", "--lazy")["pid"]
    try:
        (tmp_path / "do").write_text("all")
        wait_until((tmp_path / "done").exists, "an answer of changes")
        assert (tmp_path / "done").read_text() == "ok"
    finally:
        os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)
