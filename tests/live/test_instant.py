"""T0 in one call: the same as step by step, and step by step whenever anything is not ordinary."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import snapshot
from snapshot import instant
from snapshot.ahead import Ahead
from snapshot.image import Image
from snapshot.kernel import procfs
from snapshot.kernel.arch_x86_64 import NR, Registers
from snapshot.kernel.ptrace import LateError

from .freezing import Victim, wait_until

pytestmark = pytest.mark.live

# Threads in calls that go on as restart_syscall after a stop, or begin anew; nothing that has to be
# asked of a descriptor. The leader looks every millisecond for what it is to do: `error`.
SLEEPERS = r"""
#include <poll.h>
#include <semaphore.h>
enum { HOURS = 4 };
static sigset_t usr;
static void *in_nanosleep(void *arg)
{
    struct timespec time = {HOURS * 3600, 0};
    nanosleep(&time, NULL);
    page->returned++;
    return arg;
}
static void *in_poll(void *arg)
{
    poll(NULL, 0, HOURS * 3600 * 1000);
    page->returned++;
    return arg;
}
static void *in_futex(void *arg)
{
    sem_t never;
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += HOURS * 3600;
    sem_init(&never, 0, 0);
    sem_timedwait(&never, &until);
    page->returned++;
    return arg;
}
static void *in_sigwait(void *arg)
{
    sigwaitinfo((sigset_t *)arg, NULL);
    page->returned++;
    return arg;
}
static pthread_t waiting;
static void obey(int64_t what)
{
    int ends[2];
    const int how = MAP_PRIVATE | MAP_ANONYMOUS;
    if (what == 'm' && mmap(0, 4096, PROT_READ, how, -1, 0) == MAP_FAILED) page->bad++;
    if (what == 's' && prctl(PR_SET_CHILD_SUBREAPER, 1)) page->bad++;
    if (what == 'd' && (pipe(ends) || write(ends[1], "left", 4) != 4)) page->bad++;
    if (what == 't' && pthread_kill(waiting, SIGRTMIN)) page->bad++;
    if (what == 'c') { pthread_t more; pthread_create(&more, NULL, in_poll, NULL); }
    if (what == 'v' && vfork() == 0) {
        page->count++;
        while (page->error == 'v') usleep(1000);
        _exit(0);
    }
    if (what != 'v') page->count++;
}
int main(int argc, char **argv)
{
    (void)argc;
    open_page(argv);
    close(0);
    dup2(1, 2);
    sigemptyset(&usr), sigaddset(&usr, SIGUSR2);
    pthread_sigmask(SIG_BLOCK, &usr, NULL);
    sigset_t late;
    sigemptyset(&late), sigaddset(&late, SIGRTMIN), sigaddset(&late, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &late, NULL);
    void *(*const calls[])(void *) = {in_nanosleep, in_poll, in_futex, in_sigwait};
    for (int i = 0; i < 4; i++) pthread_create(&waiting, NULL, calls[i], &usr);
    for (page->ready = 1;; usleep(1000)) {
        int64_t what = page->error;
        if (what == 0) continue;
        obey(what);
        while (page->error == what) usleep(1000);
    }
}
"""
CALLS = (NR.clock_nanosleep, NR.poll, NR.futex, NR.rt_sigtimedwait)


@pytest.fixture
def victim() -> Iterator[Victim]:
    with Victim(SLEEPERS) as victim:
        _, *others = procfs.threads(victim.pid)
        for tid, number in zip(others, CALLS, strict=True):
            wait_until(lambda: victim.system_call(tid) == number, "it waits")  # noqa: B023
        yield victim
        assert victim.get("returned") == 0, "a call has returned"
        assert victim.get("bad") == 0


def taken(victim: Victim, store: Path, name: str, **more: object) -> Image:
    """Where writers wait for nobody."""
    return snapshot.take(victim.pid, store=store, name=name, writers="pass", **more)  # type: ignore[arg-type]


def at_once(image: Image) -> bool:
    return "letting go" in image.manifest.stats.stages_us


def obey(victim: Victim, what: str) -> None:
    count = victim.get("count")
    victim.put("error", ord(what))
    wait_until(lambda: victim.get("count") > count, f"it has done {what}")


def just_before(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """What the target does, once, between the last look at it and the stop."""
    last_rounds, acts = Ahead.last_rounds, [act]

    def acting(self: Ahead, report: Callable[[], None]) -> None:
        last_rounds(self, report)
        while acts:
            acts.pop()()

    monkeypatch.setattr(Ahead, "last_rounds", acting)


def numbers(image: Image) -> list[int]:
    """Of the system calls that all threads but the leader are in, or will make."""
    found = []
    for thread in image.process().threads[1:]:
        registers = Registers.unpack(thread.registers)
        found.append(registers.orig_rax if registers.orig_rax >> 63 == 0 else registers.rax)
    return found


def test_as_step_by_step(victim: Victim, tmp_path: Path) -> None:
    """Of all that is not memory; also of threads that an earlier stop has sent to
    restart_syscall."""
    with taken(victim, tmp_path, "first") as first:
        assert at_once(first)
        assert numbers(first) == list(CALLS)
    hooks = {"frozen": lambda _: None}  # somebody is to be asked meanwhile
    with (
        taken(victim, tmp_path, "once") as once,
        taken(victim, tmp_path, "steps", hooks=hooks) as steps,
    ):
        assert at_once(once)
        assert not at_once(steps)
        assert numbers(once) == numbers(steps) == list(CALLS)
        one, other = once.process(), steps.process()
        assert one.threads[1:] == other.threads[1:]
        assert one.mappings == other.mappings
        for name in ("files", "descriptors", "pending", "state", "layout", "exe", "cwd", "umask"):
            assert getattr(one, name) == getattr(other, name), name
        assert once.manifest.stats.longest_stop_us < once.manifest.stats.pause_us


def test_of_a_stopped_process(victim: Victim, tmp_path: Path) -> None:
    victim.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: procfs.stat(victim.pid).state == "T", "it is stopped")
    with taken(victim, tmp_path, "image") as image:
        assert image.process().stopped
        assert at_once(image)
    assert procfs.stat(victim.pid).state == "T"
    victim.process.send_signal(signal.SIGCONT)
    obey(victim, "m")


@pytest.mark.parametrize(
    ("what", "why", "again"),
    [
        ("m", "mapped or unmapped", True),
        ("c", "mapped or unmapped", True),  # a thread, and its stack
        ("s", "changed since it was asked", False),
        ("d", "descriptors have to be asked", False),
        ("t", "threads are not alike", False),
        ("u", "a signal waits", False),
    ],
)
def test_what_is_not_ordinary(
    victim: Victim,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    what: str,
    why: str,
    again: bool,
) -> None:
    """It is found in the stop, which is no T0 then; the next one has it in its image."""
    if what == "u":
        just_before(monkeypatch, lambda: os.kill(victim.pid, signal.SIGUSR1))
    else:
        just_before(monkeypatch, lambda: obey(victim, what))
    with caplog.at_level("INFO", "snap"), taken(victim, tmp_path, "image") as image:
        assert [one for one in caplog.messages if "in one call" in one and why in one]
        assert at_once(image) == again
        one = image.process()
        mapped = [(line.start, line.end) for line in procfs.maps(victim.pid)]
        ours = [(line.start, line.end) for line in one.mappings]
        assert set(ours) <= set(mapped)
        assert len(one.threads) == 5 + (what == "c")
        assert [bool(thread.pending) for thread in one.threads] == [
            what == "t" and i == 4 for i in range(len(one.threads))
        ]
        assert bool(one.pending) == (what == "u")
        assert any(file.kind == "pipes" for file in one.files) == (what == "d")


def test_one_that_is_late(
    victim: Victim,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It waits in vfork, and is let go when it comes back."""
    just_before(monkeypatch, lambda: obey(victim, "v"))
    monkeypatch.setattr(instant, "STOP_TIMEOUT", 0.05)
    let_go = LateError.let_go
    waited: list[list[int]] = []

    def releasing(self: LateError, timeout: float) -> bool:
        waited.append(list(self.tids))
        victim.put("error", 0)
        return let_go(self, timeout)

    monkeypatch.setattr(LateError, "let_go", releasing)
    with caplog.at_level("INFO", "snap"), taken(victim, tmp_path, "image") as image:
        assert [one for one in caplog.messages if "did not stop in time" in one]
        assert not at_once(image)
        assert waited == [[victim.pid]]
        assert len(image.process().threads) == 5
