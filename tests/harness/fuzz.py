"""Many hostile images, one after the other: `python -m tests.harness.fuzz SEED CASES` with little
memory allowed, `--atheris DIRECTORY CASES SEED` with cases that atheris chooses by what they reach.
"""

from __future__ import annotations

import importlib
import itertools
import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from snapshot import chunkcodec, describe, index, plausible
from snapshot import manifest as manifests
from snapshot.errors import SnapError
from snapshot.units import PAGE
from tests.harness import hostile

MEMORY = 1 << 30
"""Address space that a run may use beside what it starts with."""
SLOWEST = 5.0
"""Seconds for one case."""


def case(random: Random) -> str:
    """One case; -> the reader and how it ended. Raises what is a defect."""
    kind = random.choices(("manifest", "state", "record", "chunk", "index", "store"),
                          (50, 10, 10, 20, 6, 4))[0]  # fmt: skip
    try:
        match kind:
            case "manifest":
                fields: Any = msgspec.msgpack.decode(hostile.seed_fields())
                for _ in range(random.randrange(1, 4)):
                    fields = hostile.changed(random, fields)
                data = msgspec.msgpack.encode(fields)
                hostile.read_manifest(
                    hostile.mangled(random, data) if random.random() < 0.3 else data
                )
            case "state":
                hostile.read_state(hostile.state(random))
            case "record":
                data = hostile.record(random)
                hostile.read_record(
                    hostile.mangled(random, data) if random.random() < 0.3 else data
                )
            case "chunk":
                hostile.read_chunk(
                    hostile.chunk(random) if random.random() < 0.7 else random.randbytes(40)
                )
            case "index":
                hostile.read_index(random.randbytes(random.randrange(200)))
            case _:
                hostile.read_store(random)
    except SnapError:
        return f"{kind}: refused"
    return f"{kind}: read"


def _perhaps_mangled(random: Random, data: bytes) -> bytes:
    return hostile.mangled(random, data) if random.random() < 0.3 else data


def run(seed: int, cases: int) -> Counter[str]:
    """Each case from a seed of its own, which an exception names."""
    found: Counter[str] = Counter()
    for number in range(cases):
        before = time.monotonic()
        try:
            found[case(Random(f"{seed}/{number}"))] += 1
        except BaseException as error:
            error.add_note(f'case(Random("{seed}/{number}"))')
            raise
        took = time.monotonic() - before
        assert took < SLOWEST, f'case(Random("{seed}/{number}")) took {took:.1f} s'
    return found


def limit_memory(beside: int = MEMORY) -> None:
    """From here on MemoryError instead of an absurd size."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * PAGE
    resource.setrlimit(resource.RLIMIT_AS, (now + beside, now + beside))


def corpus() -> list[bytes]:
    """Seeds for atheris: one of each that is right."""
    random = Random(0)
    record = msgspec.msgpack.encode({"name": "a", "pid": 1, "first_sequence": 1})
    return [bytes([0]) + hostile.seed_fields(), bytes([1]) + record, bytes([2]) + record,
            bytes([3]) + hostile.chunk(random), bytes([4]) + bytes(64),
            bytes([5, 0, 3, 0, 1]) + bytes(6) + bytes(PAGE)]  # fmt: skip


def _atheris(directory: Path, cases: int, seed: int) -> None:
    atheris = importlib.import_module("atheris")  # an extra: pip install -e .[fuzz]

    directory.mkdir(exist_ok=True)
    for number, data in enumerate(corpus()):
        (directory / f"seed-{number}").write_bytes(data)
    for module in (manifests, plausible, chunkcodec, index, describe):
        atheris.instrument_imports(include=[module.__name__])
    for function in itertools.chain(hostile.READERS, (plausible._manifest, plausible._process)):
        atheris.instrument_func(function)
    options = [
        f"-runs={cases}",
        f"-seed={seed}",
        "-rss_limit_mb=2048",
        "-timeout=10",
        "-max_len=8192",
    ]
    atheris.Setup([sys.argv[0], str(directory), *options], hostile.read_any)
    atheris.Fuzz()


def main(arguments: Sequence[str]) -> None:
    if arguments[0] == "--atheris":
        _atheris(Path(arguments[1]), int(arguments[2]), int(arguments[3]))
        return
    hostile.kinds()
    limit_memory()
    found = run(int(arguments[0]), int(arguments[1]))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
