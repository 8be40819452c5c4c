"""A process that takes itself: T0 is inside the call, which returns in a restored process too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import snapshot
from snapshot.errors import HookError

if TYPE_CHECKING:
    from tests.conftest import Snap

pytestmark = pytest.mark.live
ROOT = Path(__file__).resolve().parents[2]

# Threads write and allocate at full speed all the while: a handler that needed the interpreter
# lock, or any lock of this process, would not come to an end.
OWN = r"""
import hashlib, json, os, sys, threading
import snapshot
from snapshot.inprocess import restored

directory, store = sys.argv[1:]
data = os.urandom(4 << 20)
digest = hashlib.sha256(data).hexdigest()
stages, stop = [], threading.Event()

def busy():
    block = bytearray(1 << 20)
    while not stop.is_set():
        block[:] = os.urandom(1) * len(block)
        hashlib.sha256(block)

threads = [threading.Thread(target=busy) for _ in range(3)]
for thread in threads:
    thread.start()
note = lambda context: stages.append([context.stage, context.pid, context.image])
image = snapshot.take(
    os.getpid(), name="own", store=store, hooks={"before-freeze": note, "committed": note}
)
again = restored(image)
stop.set()
for thread in threads:
    thread.join()
report = {
    "pid": os.getpid(),
    "restored": again,
    "data": hashlib.sha256(data).hexdigest() == digest,
    "digest": digest,
    "stages": stages,
    "image": image.name,
    "threads": len(image.threads),
    "descriptors": sorted(os.listdir("/proc/self/fd")),
}
number = len(os.listdir(directory))
with open(f"{directory}/{number}", "w") as file:
    json.dump(report, file)
os._exit(7 if again else 3)
"""


def _reports(directory: Path) -> list[dict[str, object]]:
    return [json.loads((directory / name).read_text()) for name in sorted(os.listdir(directory))]


def test_it_returns_in_the_original_and_in_every_restored_process(
    snap: Snap, tmp_path: Path
) -> None:
    reports = tmp_path / "reports"
    reports.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", OWN, str(reports), str(snap.store)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
    )
    assert process.wait(120) == 3
    (original,) = _reports(reports)
    stages = [["before-freeze", process.pid, "own"], ["committed", process.pid, "own"]]
    assert original["stages"] == stages
    assert not original["restored"]
    assert original["data"]
    assert snap.names() == ["own"]
    for number, options in enumerate(([], ["--lazy"], ["--pid", "new"], ["--lazy"]), start=1):
        ran = snap("restore", "own", "--wait", *options, ok=False)
        assert ran.code == 7, ran.err
        report = _reports(reports)[number]
        assert report["restored"]
        assert report["data"]
        assert report["digest"] == original["digest"]
        assert report["pid"] == original["pid"]
        assert report["image"] == "own"
        assert report["stages"] == original["stages"][:1]  # committed is the original's affair


ITSELF = """
import os, sys
from pathlib import Path
import snapshot

known = bytes(range(256)) * 64
before = sorted(os.listdir("/proc/self/fd"))
with snapshot.take(os.getpid(), store=Path(sys.argv[1]), memory=16 << 20) as image:
    assert image.manifest.processes[0].pid == os.getpid()
    assert any(
        known in image.read(mapping.start, mapping.size)
        for mapping in image.mappings
        if mapping.kind == "anon" and mapping.prot == 3 and mapping.size < 64 << 20
    )
del image
assert sorted(os.listdir("/proc/self/fd"))[: len(before)] == before
print("good")
"""


def test_this_process(tmp_path: Path, store: Path) -> None:
    """A program takes itself, and reads its own memory of T0. (Not pytest: what other tests have
    left open in it would be part of the image.)"""
    ran = subprocess.run(
        [sys.executable, "-c", ITSELF, str(store)],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "good\n", "")
    assert not list(tmp_path.glob("snap-*/reply"))


def test_hooks_that_cannot_run_here_are_refused(store: Path) -> None:
    for stage in ("frozen", "resumed"):
        with pytest.raises(ValueError, match="cannot run in the process that is taken"):
            snapshot.take(os.getpid(), store=store, hooks={stage: print})
    assert not store.exists()


def test_a_failing_hook_and_a_failing_helper_are_errors_as_ever(store: Path) -> None:
    failed: list[object] = []

    def refuse(context: object) -> None:
        raise RuntimeError("not now")

    with pytest.raises(HookError, match="not now"):
        snapshot.take(
            os.getpid(), store=store, hooks={"before-freeze": refuse, "failed": failed.append}
        )
    assert len(failed) == 1
    store.parent.mkdir(exist_ok=True)
    store.write_text("not a store")
    with pytest.raises(snapshot.SnapError) as caught:
        snapshot.take(os.getpid(), store=store)
    assert caught.value.exit_code == 6
    store.unlink()
