"""A Python heap: dicts, lists, strings and numbers, as much as is asked for.

    heap.py --mib N --status PATH --ready FD
"""

from __future__ import annotations

import argparse
import os
import random
import time
from pathlib import Path

AT_ONCE = 2000


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / (1 << 20)


def record(number: int, chance: random.Random) -> dict[str, object]:
    return {
        "id": number,
        "name": f"user-{chance.randrange(10**6)}",
        "scores": [chance.random() for _ in range(8)],
        "tags": [chance.choice(("red", "green", "blue")) for _ in range(4)],
        "text": " ".join(str(chance.getrandbits(24)) for _ in range(12)),
        "parent": (number - 1, number // 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, required=True)
    parser.add_argument("--status")
    parser.add_argument("--ready", type=int, required=True)
    options = parser.parse_args()
    chance = random.Random(20)
    heap: list[dict[str, object]] = []
    while resident_mib() < options.mib:
        heap += [record(len(heap) + i, chance) for i in range(AT_ONCE)]
    os.write(options.ready, b"r")
    os.close(options.ready)
    while True:
        time.sleep(1)


main()
