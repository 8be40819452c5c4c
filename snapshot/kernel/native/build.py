"""Builds `snapshot.kernel._native`, the C core, with cffi in API mode.

Every `*.h` in this folder is both the C header of its `*.c` and, with the preprocessor lines that
cffi cannot parse left out, the declaration that Python sees: a signature is written once.
A `#define NAME integer` reaches Python too. A header named `*_internal.h` is for C files only.
"""

from __future__ import annotations

import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


def declarations(header: str) -> str:
    """What cffi may see of a header: no includes, guards or attributes, integer defines kept."""
    kept = []
    for line in header.splitlines():
        if line.startswith("#"):
            if re.match(r"#define\s+\w+\s+[-\w(]", line):
                name = line.split()[1]
                kept.append(f"#define {name} ...")
            continue
        kept.append(line)
    return "\n".join(kept)


def ordered(headers: list[Path]) -> list[Path]:
    """Each after those that it includes."""
    found: list[Path] = []

    def add(header: Path) -> None:
        for name in re.findall(r'#include "(.+)"', header.read_text()):
            add(HERE / name)
        if header not in found:
            found.append(header)

    for header in headers:
        add(header)
    return found


headers = ordered(sorted(p for p in HERE.glob("*.h") if not p.stem.endswith("_internal")))
ffibuilder = FFI()
for header in headers:
    ffibuilder.cdef(declarations(header.read_text()))
ffibuilder.set_source(
    "snapshot.kernel._native",
    "".join(f'#include "{header.name}"\n' for header in headers),
    sources=[str(path.relative_to(ROOT)) for path in sorted(HERE.glob("*.c"))],
    include_dirs=[str(HERE.relative_to(ROOT))],
    extra_compile_args=["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"],
    extra_link_args=["-pthread"],
)

if __name__ == "__main__":
    ffibuilder.compile(tmpdir=str(ROOT), verbose=True)
