"""Takes of `storm`, counted: exact at the first T0, exact after another one, failed."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snapshot.errors import TakeError

from . import oracle
from .takes import take_with_oracle

MORE = [
    *("fixed", "onto", "free", "remove", "cold", "huge", "merge", "lock", "new", "stack"),
    *("forks", "vfork", "read", "zero", "twice", "holes", "direct"),
]
"""Operations of tests/targets/storm_more.c that stand still when the program does."""
SHARING = ["remove", "twice", "holes", "direct"]
"""Those whose writers have to wait."""


@dataclass
class Tally:
    takes: int = 0
    exact_at_once: int = 0
    retried: int = 0
    failed: int = 0
    passed: int = 0
    """Takes of writers that were let through, exact or not."""
    torn: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    def take(self, pid: int, store: Path, name: str, **options: Any) -> None:
        """One take, compared with the oracle."""
        self.takes += 1
        try:
            memory, image = take_with_oracle(pid, store, name, **options)
        except TakeError as error:
            self.failed += 1
            self.reasons[error.message] += 1
            return
        with image:
            different = oracle.compare(memory, image, pid)
            reasons = image.manifest.stats.retry_reasons
            self.passed += image.manifest.stats.writers == "pass"
        self.torn += [f"{name} {options}: {one}" for one in different]
        self.reasons.update(reason.split(" (")[0] for reason in reasons)
        self.retried += bool(reasons) and not different
        self.exact_at_once += not reasons and not different

    def __str__(self) -> str:
        reasons = "".join(f"; {count} x {reason}" for reason, count in self.reasons.items())
        return (
            f"{self.takes} takes: {self.exact_at_once} exact at the first T0, {self.retried} after "
            f"another, {self.failed} failed, {len(self.torn)} differences{reasons}"
        )


@contextmanager
def swap(directory: Path, mib: int = 256) -> Iterator[str]:
    """Swap in a file of `directory` for as long as the block lasts; yields why not, or ''."""
    if not shutil.which("mkswap") or not shutil.which("swapon"):
        yield "no mkswap or swapon here"
        return
    path = directory / "swap"
    try:
        with path.open("wb") as file:
            path.chmod(0o600)
            for _ in range(mib):  # swap in a file with holes is refused
                file.write(bytes(1 << 20))
        subprocess.run(["mkswap", "-q", path], check=True, capture_output=True)
        on = subprocess.run(["swapon", path], check=False, capture_output=True, text=True)
        try:
            yield on.stderr.strip()
        finally:
            if on.returncode == 0:
                subprocess.run(["swapoff", path], check=True)
    finally:
        path.unlink(missing_ok=True)


def swapped_out() -> int:
    """Pages that this machine has written to swap since it was booted."""
    lines = Path("/proc/vmstat").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("pswpout "))


@contextmanager
def merging() -> Iterator[str]:
    """KSM runs for as long as the block lasts; yields why not, or ''."""
    run = Path("/sys/kernel/mm/ksm/run")
    if not run.exists():
        yield "this kernel merges no pages (KSM)"
        return
    before = run.read_text()
    run.write_text("1")
    try:
        yield ""
    finally:
        run.write_text(before)
