"""The programs that the bench is made of, in C, and what they write (64-bit numbers)."""

from __future__ import annotations

import subprocess
from array import array
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.harness import victims

HERE = Path(__file__).resolve().parent
BIN = HERE / "bin"


@cache
def build() -> None:
    victims.build()
    made = subprocess.run(["make", "-s", "-C", str(HERE)], capture_output=True, text=True)
    if made.returncode:
        raise RuntimeError(f"make -C {HERE} failed:\n{made.stderr}")


def numbers(path: Path, fields: int) -> Iterator[tuple[int, ...]]:
    """Of a file of 64-bit numbers, so many at a time."""
    flat = array("Q", path.read_bytes())
    return zip(*(flat[field::fields] for field in range(fields)), strict=True)
