"""redis-server under write load: taken while it serves, killed, brought back.

The ledger (tests/harness/ledger.py) shows an order that only a single instant has; the values set
before the take are known byte by byte.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Snap
from tests.harness import ledger, oracle
from tests.harness.ledger import Ledger, Report
from tests.harness.redis import Redis
from tests.harness.takes import take_with_oracle

pytestmark = pytest.mark.live

CLIENTS = 20
Start = Callable[..., Redis]
StartLoad = Callable[..., Ledger]


def check_ledgers(server: Redis, before: Report, after: Report) -> None:
    """Each is possible at one instant, between the two reports."""
    with server.client() as client:
        found = ledger.read(client, CLIENTS)
    assert [p for counts in found if (p := ledger.problems(counts))] == []
    pairs = zip(before.acknowledged, found, after.acknowledged, strict=True)
    for number, (early, counts, late) in enumerate(pairs):
        # A command may have been carried out whose answer was still under way.
        bounds = zip(early, counts, late, strict=True)
        assert all(low <= count <= high + 1 for low, count, high in bounds), (
            f"client {number}: {early} then {counts} then {late}"
        )


def check_serves(server: Redis, load: StartLoad, keys: int) -> None:
    """All values of T0, and it goes on: writes, SAVE, TCP and unix socket."""
    assert server.wrong_values() == []
    for tcp in (False, True):
        with server.client(tcp=tcp) as client:
            assert client("DBSIZE") == keys + 3 * CLIENTS
            assert client("SET", "new", "value") == "OK"
            assert client("GET", "new") == b"value"
            assert client("DEL", "new") == 1
    clients = load(server.socket_path, CLIENTS)
    clients.works()
    with server.client() as client:
        assert client("SAVE") == "OK"
        assert int(client("INFO", "persistence").split(b"rdb_last_bgsave_status:")[1][:2] == b"ok")
    assert clients.stop().errors == 0
    with server.client() as client:
        assert [p for c in ledger.read(client, CLIENTS) if (p := ledger.problems(c))] == []


@pytest.mark.parametrize(
    ("mode", "mib"), [("--lazy", 512), ("--eager", 96)], ids=["lazy-512", "eager-96"]
)
def test_under_load(redis_server: Start, load: StartLoad, snap: Snap, mode: str, mib: int) -> None:
    server = redis_server()
    keys = server.fill(mib)
    clients = load(server.socket_path, CLIENTS)
    before = clients.works()
    taken = snap("take", server.pid, "--name", "redis").json
    clients.works()
    after = clients.stop()
    assert after.errors == 0, after.first_error
    assert taken["saved_bytes"] > mib << 20
    assert len(taken["closed_connections"]) == CLIENTS
    print(
        f"{mib} MiB: pause {taken['pause_us']} µs, take {taken['seconds']:.2f} s, "
        f"{taken['faults']} faults; clients p50 {after.p50_ms:.2f} p99 {after.p99_ms:.2f} "
        f"max {after.max_ms:.1f} ms"
    )
    server.kill()
    back = snap("restore", "redis", mode).json
    assert back["pid"] == server.pid
    assert len(back["closed_connections"]) == CLIENTS
    with server.client() as client:
        assert client("PING") == "PONG"
    check_ledgers(server, before, after)
    check_serves(server, load, keys)


def test_killed_under_load(redis_server: Start, load: StartLoad, snap: Snap) -> None:
    """The clients are there when it dies, and come back while pages are still missing."""
    server = redis_server()
    keys = server.fill(96)
    clients = load(server.socket_path, CLIENTS)
    before = clients.works()
    snap("take", server.pid, "--name", "redis")
    clients.works()
    server.kill()
    after = clients.stop()
    assert after.errors == CLIENTS, "each lost its connection, none earlier"
    snap("restore", "redis", "--lazy")
    check_ledgers(server, before, after)
    again = load(server.socket_path, CLIENTS)
    again.works()
    assert again.stop().errors == 0
    check_serves(server, load, keys)


def test_every_byte(redis_server: Start, load: StartLoad, store: Path) -> None:
    """Under load, against the oracle."""
    server = redis_server()
    server.fill(48)
    clients = load(server.socket_path, CLIENTS)
    for number in range(3):
        clients.works()
        memory, image = take_with_oracle(server.pid, store, f"redis-{number}")
        with image:
            differences = oracle.compare(memory, image, server.pid)
            assert [str(difference) for difference in differences] == []
    assert clients.stop().errors == 0


def test_several_images(redis_server: Start, load: StartLoad, snap: Snap) -> None:
    """Three instants under one load; the first one is brought back, later ones stay whole."""
    server = redis_server()
    keys = server.fill(48)
    clients = load(server.socket_path, CLIENTS)
    reports = []
    for number in range(3):
        reports.append(clients.works())
        snap("take", server.pid, "--name", f"redis-{number}")
    reports.append(clients.works())
    assert clients.stop().errors == 0
    server.kill()
    for number in (0, 2):
        snap("restore", f"redis-{number}", "--lazy")
        check_ledgers(server, reports[number], reports[number + 1])
        assert server.wrong_values() == []
        with server.client() as client:
            assert client("DBSIZE") == keys + 3 * CLIENTS
        server.kill()
    assert all(snap("verify", f"redis-{number}").json["ok"] for number in range(3))


def test_background_save_of_a_restored_server(redis_server: Start, snap: Snap) -> None:
    """BGSAVE forks while pages are missing: the child must see them all."""
    server = redis_server()
    keys = server.fill(64)
    snap("take", server.pid, "--name", "redis")
    server.kill()
    snap("restore", "redis", "--lazy")
    with server.client() as client:
        assert client("BGSAVE") == "Background saving started"
        while b"rdb_bgsave_in_progress:1" in client("INFO", "persistence"):
            pass
        assert b"rdb_last_bgsave_status:ok" in client("INFO", "persistence")
        # What the child wrote is what the parent has.
        assert client("DEBUG", "RELOAD", "NOSAVE") == "OK"
        assert client("DBSIZE") == keys
    assert server.wrong_values() == []
    os.kill(server.pid, signal.SIGTERM)
