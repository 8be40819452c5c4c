"""A thread that cannot stop: the others are let go, it is let go when it can be, then once more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshot import freeze as freezing
from snapshot.freeze import freeze
from snapshot.kernel.ptrace import LateError

from .freezing import Victim, wait_until

pytestmark = pytest.mark.live

# The leader waits in vfork until stdin has a byte; another thread counts.
VFORK = r"""
static void *counting(void *arg)
{
    for (;;) page->count++, usleep(500);
    return arg;
}
int main(int argc, char **argv)
{
    (void)argc;
    open_page(argv);
    pthread_t thread;
    pthread_create(&thread, 0, counting, 0);
    char byte;
    if (vfork() == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        page->ready = 1;
        if (read(0, &byte, 1) >= 0) _exit(0);
    }
    page->returned = 1;
    for (;;) pause();
}
"""


@pytest.fixture
def victim() -> Iterator[Victim]:
    with Victim(VFORK) as victim:
        yield victim


def goes_on(victim: Victim) -> None:
    count = victim.get("count")
    wait_until(lambda: victim.get("count") > count + 3, "the other thread goes on")


def tracers(pid: int) -> set[str]:
    found = set()
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        found.add(status.read_text().split("TracerPid:\t")[1].split("\n")[0])
    return found


def test_the_second_try_succeeds(victim: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []

    def let_go(late: LateError, timeout: float) -> bool:
        goes_on(victim)
        victim.wake()
        waited.append(late.message)
        return original(late, timeout)

    original = LateError.let_go
    monkeypatch.setattr(LateError, "let_go", let_go)
    with freeze(victim.pid, timeout=0.05) as frozen:
        assert len(frozen.threads) == 2
    assert len(waited) == 1
    assert f"{victim.pid} (" in waited[0]
    assert "state D" in waited[0]
    wait_until(lambda: victim.get("returned"), "it came back from vfork")
    goes_on(victim)
    assert tracers(victim.pid) == {"0"}


def test_one_that_never_stops(victim: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freezing, "LATE_SECONDS", 0.05)
    with pytest.raises(LateError) as raised, freeze(victim.pid, timeout=0.05):
        pytest.fail("it cannot have stopped")
    goes_on(victim)
    victim.wake()
    assert raised.value.let_go(5.0)
    wait_until(lambda: victim.get("returned"), "it came back from vfork")
    assert tracers(victim.pid) == {"0"}
    with freeze(victim.pid) as frozen:
        assert len(frozen.threads) == 2
