"""The programs that the bench is made of, in C; `build` compiles them."""

from __future__ import annotations

import subprocess
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
