"""redis's own snapshot: BGSAVE forks, and the child writes."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from bench.figures import Row
from tests.harness import redis

PAUSE = 0.01


def why_not() -> str | None:
    return None if shutil.which("redis-server") else "no redis-server here"


def _persistence(client: redis.Client, section: str) -> dict[str, str]:
    lines = client("INFO", section).decode().splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def save(server: redis.Redis) -> Row:
    with server.client() as client:
        began = time.monotonic_ns()
        client("BGSAVE")
        while _persistence(client, "persistence")["rdb_bgsave_in_progress"] != "0":
            time.sleep(PAUSE)
        ended = time.monotonic_ns()
        fork = int(_persistence(client, "stats")["latest_fork_usec"])
        good = _persistence(client, "persistence")["rdb_last_bgsave_status"] == "ok"
    dump = Path(server.directory) / "dump.rdb"
    row: Row = {
        "seconds": (ended - began) / 1e9, "pause_us": fork, "exit_code": 0 if good else 1,
        "began": began, "ended": ended,
    }  # fmt: skip
    if dump.exists():
        row["stored_bytes"] = dump.stat().st_size
        dump.unlink()
    return row
