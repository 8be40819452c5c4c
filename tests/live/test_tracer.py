"""The thread that makes the second stop: the caller's hooks do not run in it, and an exception that
interrupts the caller finds the target let go."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

import snapshot
from snapshot.errors import HookError
from snapshot.freeze import RESTARTED, freeze
from snapshot.kernel.exits import Exits
from snapshot.tracer import Tracer
from tests.conftest import Spawn
from tests.harness.processes import wait_until
from tests.harness.victims import Victim

pytestmark = pytest.mark.live

STAGES = ("before-freeze", "frozen", "resumed", "committed")


def tracers(pid: int) -> set[int]:
    """Of all its threads; 0: none."""
    found = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status")]
    return {int(status.split("TracerPid:")[1].split()[0]) for status in found}


@pytest.fixture
def victim(spawn: Spawn) -> Victim:
    return spawn("writer", mib=32)


def test_hooks_run_in_the_calling_thread(victim: Victim, store: Path) -> None:
    seen: list[threading.Thread] = []
    hooks = {stage: lambda _: seen.append(threading.current_thread()) for stage in STAGES}
    snapshot.take(victim.pid, name="image", store=store, hooks=hooks, now=True).close()
    assert seen == [threading.current_thread()] * len(STAGES)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_a_hook_that_raises(victim: Victim, store: Path, error: type[BaseException]) -> None:
    def hook(_: object) -> None:
        raise error

    expected = HookError if error is ValueError else error
    with pytest.raises(expected):
        snapshot.take(victim.pid, name="image", store=store, hooks={"frozen": hook}, now=True)
    assert tracers(victim.pid) == {0}
    victim.goes_on()
    snapshot.take(victim.pid, name="image", store=store).close()


def test_an_interruption_waits_until_the_target_runs_on(victim: Victim) -> None:
    """A signal comes while the tracer has the target stopped: its exception does not leave `run`
    before that is over."""
    with Exits(victim.pid, 10, RESTARTED) as exits, Tracer(exits, victim.pid) as tracer:
        inside, go_on = threading.Event(), threading.Event()
        seen: list[bool] = []

        def stop() -> None:
            with freeze(victim.pid):
                inside.set()
                seen.append(go_on.wait(20))

        def interrupt() -> None:
            inside.wait(20)
            os.kill(os.getpid(), signal.SIGINT)
            # It has come when the handler has run, in the main thread.
            seen.append(handled.wait(20))
            go_on.set()

        handled = threading.Event()

        def handler(number: int, frame: object) -> None:
            handled.set()
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, handler)
        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                tracer.run(stop)
        finally:
            signal.signal(signal.SIGINT, before)
            thread.join()
        assert seen == [True, True]
        assert tracers(victim.pid) == {0}


def test_stays_with_one_thread_and_lets_go_at_the_end(spawn: Spawn) -> None:
    """Of a process with several not the leader, and nobody when the tracer is closed."""
    victim = spawn("threads16")
    with Exits(victim.pid, 10, RESTARTED) as exits, Tracer(exits, victim.pid) as tracer:

        def stop() -> None:
            with freeze(victim.pid) as frozen:
                frozen.stay()

        tracer.run(stop)
        leader = Path(f"/proc/{victim.pid}/status").read_text()
        assert "TracerPid:\t0\n" in leader
        assert len(tracers(victim.pid)) == 2
        victim.goes_on()
        assert len(tracers(victim.pid)) == 2
        wait_until(lambda: tracer.let_go(0.1), "the end of the tracer")
        assert tracers(victim.pid) == {0}
    victim.goes_on()
