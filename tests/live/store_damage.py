"""A damaged store as its users meet it: `verify`, `read` and both ways of `restore`, each in a
process of its own, so that a crash of ours would be seen."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

from snapshot import service
from tests.conftest import ROOT
from tests.harness import damage
from tests.harness.processes import wait_until
from tests.live.servers import await_end

READER = """
import sys
from pathlib import Path
from snapshot.errors import SnapError
from snapshot.store import Store
store, reference, name = Path(sys.argv[1]), Path(sys.argv[2]).read_bytes(), sys.argv[3]
try:
    with Store.open(store) as opened, opened.image(name) as image:
        for damage in image.verify():
            print(damage)
        print("verified")
        at = 0
        for mapping in image.process().mappings:
            if mapping.kind != "anon":
                continue
            for address in range(mapping.start, mapping.end, 65536):
                length = min(65536, mapping.end - address)
                try:
                    data = image.read(address, length)
                except SnapError as error:
                    print(error.message)
                else:
                    if data != reference[at : at + length]:
                        sys.exit(99)
                at += length
except SnapError as error:
    print(error.message)
    sys.exit(error.exit_code)
"""
WRONG = 99


class Store:
    """A good store with the image of a `changes`, and copies of it to be damaged."""

    def __init__(self, directory: Path, store: Path, name: str, scratch: Path) -> None:
        self.directory = directory
        self.good = store
        self.name = name
        self.path = scratch / "store"
        self.reference = scratch / "reference"

    def fresh(self) -> Path:
        shutil.rmtree(self.path, ignore_errors=True)
        # Not its reserve: 8 MiB that would be written hundreds of times.
        self.path.mkdir(mode=0o700)
        subprocess.run(
            ["cp", "-r", "--sparse=always", f"{self.good}/.", str(self.path)], check=True
        )
        return self.path

    def snap(self, *words: str, seconds: float = 60.0) -> tuple[int, str]:
        """`snap` on the damaged store. -> exit status and all that it said."""
        out = self.path.parent / "said"
        with out.open("wb") as file:
            code = subprocess.run(
                [sys.executable, str(ROOT / "cli.py"), *words, "--store", str(self.path)],
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=self.directory,
                timeout=seconds, check=False,
            ).returncode  # fmt: skip
        return code, out.read_text(errors="replace")

    def read(self) -> tuple[int, str]:
        ran = subprocess.run(
            [sys.executable, "-c", READER, str(self.path), str(self.reference), self.name],
            capture_output=True, text=True, cwd=ROOT, timeout=60, check=False,
        )  # fmt: skip
        return ran.returncode, ran.stdout + ran.stderr


def check(store: Store, random: Random, kind: str) -> str:
    """One damage, verified and read; -> "found", or "unseen": it touched nothing that matters."""
    store.fresh()
    done = damage.damage(store.path, random, kind)
    code, text = store.read()
    assert code in (0, 6, 7), f"{done}: reading ended with {code}: {text}"
    assert "Traceback" not in text, f"{done}: {text}"
    said, verified, read = text.partition("verified\n")
    found = code != 0 or bool(said)
    _named(store, done, said if verified else text, found)
    assert found or not read, f"{done}: verify saw nothing, reading: {read}"
    return "found" if found else "unseen"


def check_commands(store: Store, random: Random, kind: str, *, lazy: bool) -> str:
    """The same of the commands: `snap verify`, and `snap restore --wait`."""
    store.fresh()
    done = damage.damage(store.path, random, kind)
    code, said = store.snap("verify", store.name)
    assert code in (0, 6, 7), f"{done}: verify ended with {code}: {said}"
    assert "Traceback" not in said, f"{done}: {said}"
    _named(store, done, said, code != 0)
    restores(store, done, code != 0, lazy=lazy)
    return "found" if code else "unseen"


def _named(store: Store, done: damage.Damage, said: str, found: bool) -> None:
    """What is damaged is said: the image, the process (space), the address of a chunk."""
    assert found or done.kind not in damage.ALWAYS_SEEN, f"{done}: verify found nothing"
    if found:
        assert store.name in said or str(store.path) in said, f"{done}: {said}"
    if found and done.kind.startswith("chunk"):
        assert re.search(r"space \d+, 0x[0-9a-f]+", said), f"{done}: no address: {said}"


def restores(store: Store, done: damage.Damage, found: bool, *, lazy: bool) -> None:
    """The program checks all of its memory: it must say that it is right, or not come to it."""
    for name in ("do", "done"):
        (store.directory / name).unlink(missing_ok=True)
    (store.directory / "do").write_text("all")
    words = ["restore", store.name, "--lazy" if lazy else "--eager", "--wait"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), *words, "--store", str(store.path)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        cwd=store.directory, env={**os.environ, service.PAUSE: "1"},
    )  # fmt: skip
    answer = store.directory / "done"
    try:
        wait_until(lambda: answer.exists() or process.poll() is not None, f"{done}: an end", 60)
        if answer.exists():
            assert answer.read_text() == "ok", f"{done}: {answer.read_text()}"
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)  # is passed on
    finally:
        try:
            said, _ = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
            said += " (it hung)"
    assert "Traceback" not in said, f"{done}: {said}"
    code = process.returncode
    log = store.path / "pageserver.log"
    told = log.read_text() if log.exists() else ""
    assert "Traceback" not in told, f"{done}: {told}"
    if code == 128 + signal.SIGKILL:
        assert lazy, f"{done}: {said}"
        assert "killed process" in told, f"{done}: {told}"
    else:
        assert code in (6, 7, 9, 128 + signal.SIGTERM), f"{done}: exit status {code}: {said}"
    if not found:
        assert code == 128 + signal.SIGTERM, f"{done}: {code}: {said} {told}"
    await_end()


def total(results: Counter[tuple[str, str]]) -> str:
    kinds = sorted({kind for kind, _ in results})
    return "\n".join(
        f"{kind}: {results[kind, 'found']} found, {results[kind, 'unseen']} touched nothing"
        for kind in kinds
    )
