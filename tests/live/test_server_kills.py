"""The page server killed at any instant, alone or with its guardian: never a wrong page.

Here a dozen kills; `make stress` makes hundreds (tests/stress/test_page_server.py)."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from snapshot import service
from snapshot.image import Image
from snapshot.restore import restore
from tests.harness.cgroups import cgroup
from tests.harness.processes import command_line, descendants, threads, wait_until
from tests.harness.seeds import seeded
from tests.live.server_kills import COMMANDS, kill_some, living
from tests.live.servers import await_end, servers
from tests.live.test_lazy import Lazy, lazily, missing, place, program

__all__ = ["lazily", "place", "program"]  # fixtures
pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: sudo pytest tests/live"),
]


def life(place: tuple[Path, Image], command: str, kills: int, random_name: str) -> dict[str, int]:
    """One restore, one command, some kills; the program must find nothing wrong. With "all" it
    checks all of its memory over and over."""
    directory, image = place
    random = seeded(random_name, None if "SNAP_STRESS" in os.environ else 4)
    for name in ("do", "done"):
        (directory / name).unlink(missing_ok=True)
    # The server is forked from here, or started anew.
    lazy = Lazy(directory, restore(image, lazy=True, alone=random.random() < 0.5))
    try:
        done = directory / "done"

        def complete() -> bool:
            return not missing(lazy.pid)

        # Before the command too: "all" has all pages in before long.
        found = kill_some(random, lazy.pid, random.randrange(1, kills + 1), done.exists, complete)
        lazy.command(command)
        found += kill_some(random, lazy.pid, kills - sum(found.values()), done.exists, complete)
        while command == "all" and sum(found.values()) < kills:
            assert lazy.answer(60) == "ok"
            lazy.command("all")
            found += kill_some(random, lazy.pid, kills - sum(found.values()), done.exists, complete)
            if complete():
                break  # all pages are in
        said = lazy.answer(60)
        if command == "orphan":  # two answers, the second may have come in the place of the first
            said = said if said == "orphan ok" else lazy.answer(60)
        assert said == ("orphan ok" if command == "orphan" else "ok")
        return found
    except TimeoutError as error:  # a thread that nobody serves
        log = (directory / "store" / "pageserver.log").read_text().splitlines()
        mine = [line for line in log if f" {lazy.pid}: " in line]
        held = [f"{pid} {command_line(pid)}" for pid in descendants(os.getpid())]
        raise AssertionError("\n".join([str(error), threads(lazy.pid), *held, *mine])) from None
    finally:
        lazy.end()
        await_end()


@pytest.mark.parametrize("command", ["all", "fork", "orphan", "move", "dontneed"])
def test_kills_at_random_instants(
    place: tuple[Path, Image], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    assert command in COMMANDS
    monkeypatch.setenv(service.PAUSE, "10")
    found = life(place, command, 3, f"kills of a page server, {command}")
    print(found)
    assert sum(found.values()) >= 1


@pytest.mark.parametrize("lazily", [100], indirect=True)
def test_when_no_process_can_be_made_the_server_goes_on_alone(lazily: Lazy) -> None:
    log = lazily.directory / "store" / "pageserver.log"

    def tried(times: int) -> bool:
        return log.read_text().count(f" {lazily.pid}: copy-{lazily.pid}: no keeper yet") >= times

    server = living("snap-pages")
    with cgroup("pids", "pids.max", 0) as members:
        for pid in servers():
            members.write_text(str(pid))
        for other in [*living("snap-guardian"), *living("snap-keeper")]:
            os.kill(other, signal.SIGKILL)
        wait_until(lambda: tried(2), "the server being alone")
        assert living("snap-pages") == server
    wait_until(lambda: bool(living("snap-keeper")), "a keeper, now that one can be made")
    os.kill(server[0], signal.SIGKILL)
    lazily.command("all")
    assert lazily.answer(60) == "ok"
