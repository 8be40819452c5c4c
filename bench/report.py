"""Tables and plots of a run put into docs/benchmarks.md, between markers; prose stays as it is.

    <!-- bench: pause -->      generated, written over by the next report
    <!-- bench end -->

A pair of markers for each case, and `machine` for what the run ran on. A case without markers in
the file gets them at its end.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from .cases import CASES
from .figures import MISSING, Part, Plot, Rows, Table
from .machine import ROOT

DOCUMENT = ROOT / "docs" / "benchmarks.md"
END = "<!-- bench end -->"


def read(path: Path) -> Rows:
    return Rows(json.loads(line) for line in path.read_text().splitlines() if line)


def begin(name: str) -> str:
    return f"<!-- bench: {name} -->"


def replaced(document: str, name: str, text: str) -> str:
    """The document with `text` between the markers of `name`, which are added when missing."""
    if begin(name) not in document:
        document = f"{document.rstrip()}\n\n{begin(name)}\n{END}\n"
    pattern = re.compile(re.escape(begin(name)) + r"\n.*?" + re.escape(END), re.DOTALL)
    return pattern.sub(lambda _: f"{begin(name)}\n{text.strip()}\n{END}", document, count=1)


def text_of(parts: Sequence[Part], plots: str = "") -> str:
    """`plots`: where the pictures are, as seen from the document; '' leaves them out."""
    found = []
    for part in parts:
        if isinstance(part, Table):
            if part.rows:
                found.append(part.markdown())
        elif isinstance(part, Plot):
            if plots:
                found.append(f"![{part.title}]({plots}/{part.name}.png)")
        else:
            found.append(part)
    return "\n\n".join(found)


def parts(name: str, rows: Rows) -> Sequence[Part]:
    """Of one case: what it makes of its rows, and why it is not all there is."""
    good = Rows(row for row in rows if "failed" not in row)
    notes = [f"This case failed: {row['failed']}" for row in rows if "failed" in row]
    return [*(CASES[name].report(good) if good else ()), *notes]


def failures(rows: Rows) -> list[str]:
    """Cases that did not come to their end."""
    return [name for (name, *_) in rows.distinct("case", "failed")]


def machine_text(rows: Rows) -> str:
    """What all rows have in common, and how busy the machine was."""

    def one(name: str) -> str:
        return ", ".join(str(value) for (value,) in rows.distinct(name)) or MISSING

    loads = sorted(rows.values("load"))
    busy = f"{loads[0]:.1f} to {loads[-1]:.1f}" if loads else MISSING
    seconds = rows.values("time")
    minutes = (max(seconds) - min(seconds)) / 60 if seconds else 0
    return (
        f"Commit {one('commit')}, Linux {one('kernel')}, {one('cpus')} CPUs, {one('memory_mib')} "
        f"MiB of memory; load average {busy}, the bench's own work included; {minutes:.0f} minutes."
    )


def draw(plot: Plot, directory: Path) -> None:
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    plot.draw(axes)
    axes.set_title(plot.title)
    axes.grid(alpha=0.3)
    directory.mkdir(parents=True, exist_ok=True)
    # Without the version of matplotlib: the same rows make the same file.
    figure.savefig(directory / f"{plot.name}.png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def write(rows: Rows, document: Path = DOCUMENT) -> list[str]:
    """Tables and plots of every case that has rows -> their names."""
    text = document.read_text() if document.exists() else "# Benchmarks\n"
    text = replaced(text, "machine", machine_text(rows))
    directory = document.with_suffix("")
    written = []
    for name in CASES:
        some = rows.where(case=name)
        if not some:
            continue
        found = parts(name, some)
        for part in found:
            if isinstance(part, Plot):
                draw(part, directory)
        text = replaced(text, name, text_of(found, directory.name))
        written.append(name)
    document.parent.mkdir(exist_ok=True)
    document.write_text(text)
    return written
