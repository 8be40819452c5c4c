"""A thread of ours in a target that runs on: who is stopped, what is seen of it, what is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import snapshot
from snapshot import examine, faults
from snapshot.ahead import Ahead
from snapshot.kernel import procfs
from snapshot.kernel.arch_x86_64 import NR
from snapshot.stats import Progress
from snapshot.wrprotect import WriteProtection
from tests.conftest import ROOT
from tests.harness.cgroups import cgroup

from .freezing import Victim, proc_state, wait_until
from .visits import visit_of, visited

pytestmark = pytest.mark.live

POINTS = 64
"""More than a visit passes."""

BUSY = r"""
enum { PAGE = 4096, FEW = 16, MANY = 256 };
static void failed(void) { __atomic_fetch_add((int64_t *)&page->bad, 1, __ATOMIC_RELAXED); }
static int open_count(void)
{
    int count = 0;
    for (int fd = 0; fd < 64; fd++) count += fcntl(fd, F_GETFD) >= 0;
    return count;
}
/* Calls that a stop makes return EINTR, and that begin anew unless somebody sees to it. */
static void *wait_for_ever(void *arg)
{
    for (;;) if (sigwaitinfo((sigset_t *)arg, NULL) < 0) page->returned++, failed();
}
/* A mapping that grows and shrinks, which it cannot when it has been split. */
static void *remap(void *arg)
{
    for (; arg; page->count++) {
        char *at = mmap(0, FEW * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED) { failed(); continue; }
        at[0] = 42, at[(FEW - 1) * PAGE] = 43;
        for (int pages = FEW; pages < MANY; pages *= 2) {
            char *to = mremap(at, pages * PAGE, 2 * pages * PAGE, MREMAP_MAYMOVE);
            if (to == MAP_FAILED) { failed(); break; }
            at = to;
            if (at[0] != 42 || at[(FEW - 1) * PAGE] != 43) failed();
        }
        munmap(at, MANY * PAGE);
    }
    return arg;
}
/* Memory that is kept, more of it now and then. */
static void *grow(void *arg)
{
    for (; arg; page->count++, usleep(40000))
        if (mmap(0, FEW * PAGE, page->count % 2 ? PROT_READ : PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED) failed();
    return arg;
}
static void *have_children(void *arg)
{
    int before = open_count();
    for (; arg; page->result++) {
        pid_t child = fork();
        if (child < 0) failed();
        if (child == 0) _exit(open_count() != before);
        int status;
        if (waitpid(child, &status, 0) != child || status) failed();
    }
    return arg;
}
int main(int argc, char **argv)
{
    pthread_t thread;
    sigset_t set;
    open_page(argv);
    sigemptyset(&set), sigaddset(&set, SIGUSR2);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    for (int i = 0; i < 2; i++) pthread_create(&thread, NULL, wait_for_ever, &set);
    if (argc > 2 && strchr(argv[2], 'm')) pthread_create(&thread, NULL, remap, argv);
    if (argc > 2 && strchr(argv[2], 'g')) pthread_create(&thread, NULL, grow, argv);
    if (argc > 2 && strchr(argv[2], 'f')) pthread_create(&thread, NULL, have_children, argv);
    for (page->ready = 1;; page->tid++) if (argc > 2 && strchr(argv[2], 's')) pause();
}
"""
ALONE = r"""
int main(int argc, char **argv)
{
    open_page(argv);
    page->ready = argc;
    for (;;) pause();
}
"""
DYING = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from snapshot.kernel.arch_x86_64 import NR
from snapshot.kernel.remote import Call, Remote
from tests.live.visits import visited
pid, Remote.die_at = int(sys.argv[1]), int(sys.argv[2])
with visited(pid) as (host, guest):
    with guest.remote.making(Call(NR.eventfd2, (0, 0))) as made:
        assert made >= 0
"""


def states(pid: int) -> dict[int, tuple[str, int]]:
    """Of each thread, by tid: how it is, and who traces it."""
    found = {}
    for tid in procfs.threads(pid):
        status = procfs.status(pid, tid)
        found[tid] = status.state, status.tracer
    return found


def settled(victim: Victim) -> dict[str, object]:
    """`proc_state` when its first two threads wait for their signal."""
    waiting = procfs.threads(victim.pid)[1:3]
    for tid in waiting:
        wait_until(lambda: victim.system_call(tid) == NR.rt_sigtimedwait, "a thread waits")  # noqa: B023
    return proc_state(victim.pid)


def test_only_the_guest_stands_still() -> None:
    with Victim(BUSY) as victim:
        before = settled(victim)
        with visited(victim.pid) as (host, guest):
            (ours,) = guest.threads
            assert len(host.threads) == 1
            assert host.stopped_us > 0
            found = states(victim.pid)
            assert found.pop(ours.tid) == ("t", os.getpid())
            assert {tracer for _, tracer in found.values()} == {0}
            turn = victim.get("tid")
            wait_until(lambda: victim.get("tid") > turn, "it runs meanwhile")
        assert settled(victim) == before
        assert victim.get("bad") == 0


def test_descriptors_of_its_own() -> None:
    with Victim(BUSY) as victim:
        theirs = os.listdir(f"/proc/{victim.pid}/fd")
        with visited(victim.pid) as (_, guest):
            tid = guest.threads[0].tid
            assert os.listdir(f"/proc/{victim.pid}/task/{tid}/fd") == []
            made = guest.remote.call(NR.eventfd2, 0, 0)
            assert os.listdir(f"/proc/{victim.pid}/task/{tid}/fd") == [str(made)]
            assert os.listdir(f"/proc/{victim.pid}/fd") == theirs
        assert os.listdir(f"/proc/{victim.pid}/fd") == theirs


def test_one_thread_alone_is_not_visited() -> None:
    with Victim(ALONE) as victim, visit_of(victim.pid) as visit:
        assert (visit.host, visit.guest) == (None, None)


def test_no_signal_to_tell_by() -> None:
    """All are blocked in the thread that is stopped, but not in ours."""
    blocked = "import os, signal; signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\n"
    script = blocked + "import threading; threading.Thread(target=signal.pause).start()\n"
    script += "print('on', flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"on\n"
            wait_until(lambda: len(procfs.threads(process.pid)) == 2, "its thread")
            before = proc_state(process.pid)
            with visited(process.pid) as (host, guest):
                assert host.threads
                assert guest.remote.call(NR.getpid) == process.pid
            assert proc_state(process.pid) == before
        finally:
            process.kill()


def test_no_room_for_a_thread(tmp_path: Path) -> None:
    """A thread was stopped in vain, and all are stopped in its place."""
    with Victim(BUSY) as victim:
        before, threads = settled(victim), len(procfs.threads(victim.pid))
        with cgroup("pids", "pids.max", threads) as members:
            members.write_text(str(victim.pid))
            with visit_of(victim.pid) as visit:
                assert visit.host is not None
                assert visit.guest is None
            assert settled(victim) == before
            with snapshot.take(victim.pid, store=tmp_path) as image:
                assert image.manifest.stats.threads == threads
        assert settled(victim) == before
        assert victim.get("bad") == 0


def test_a_process_that_is_stopped_stays_so() -> None:
    with Victim(BUSY) as victim:
        before = settled(victim)
        os.kill(victim.pid, signal.SIGSTOP)

        def stopped() -> bool:
            return {state for state, _ in states(victim.pid).values()} == {"T"}

        wait_until(stopped, "all are stopped")
        with visited(victim.pid) as (_, guest):
            assert guest.remote.call(NR.getpid) == victim.pid
        wait_until(stopped, "they are again")
        turn = victim.get("tid")
        os.kill(victim.pid, signal.SIGCONT)
        wait_until(lambda: victim.get("tid") > turn, "it runs on")
        assert settled(victim) == before  # (SIGCONT itself has interrupted what they wait in)


def test_in_a_pid_namespace_of_its_own(tmp_path: Path) -> None:
    """The number that clone returns there is another one here."""
    script = "import os, threading, signal; threading.Thread(target=signal.pause).start()\n"
    script += f"os.mkdir({str(tmp_path / 'on')!r}); signal.pause()"
    command = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", script]
    with subprocess.Popen(command) as outer:
        try:
            wait_until((tmp_path / "on").exists, "it runs")
            children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
            pid = int(children[0])
            before = proc_state(pid)
            with visited(pid) as (_, guest):
                (ours,) = guest.threads
                assert ours.tid in procfs.threads(pid)
                assert guest.remote.call(NR.gettid) not in (ours.tid, 1)
            assert proc_state(pid) == before
        finally:
            outer.kill()


@pytest.mark.parametrize("how", ["-", "s"])
def test_death_at_every_point(how: str) -> None:
    """Of the tracer: our thread ends, its host goes home, and what was made is gone."""
    with Victim(BUSY, how) as victim:
        before, threads = settled(victim), procfs.threads(victim.pid)
        for point in range(1, POINTS):
            command = [sys.executable, "-c", DYING, str(victim.pid), str(point)]
            ended = subprocess.run(command, check=False).returncode
            assert ended in (0, -signal.SIGKILL), point
            wait_until(lambda: procfs.threads(victim.pid) == threads, f"our thread ends ({point})")
            wait_until(lambda: proc_state(victim.pid) == before, f"all as before ({point})")
            assert victim.alive, point
            if ended == 0:
                break
        assert ended == 0, "POINTS is too small"
        assert point > 30
        assert victim.get("bad") == 0


@contextmanager
def outcomes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each process could be planned while it ran."""
    found: list[bool] = []
    plan = Ahead.plan_running

    def noted(self: Ahead, protection: WriteProtection) -> bool:
        found.append(plan(self, protection))
        return found[-1]

    with monkeypatch.context() as patched:
        patched.setattr(Ahead, "plan_running", noted)
        yield found


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("what", "takes"), [("s", 3), ("m", 12), ("f", 12), ("mf", 12)])
def test_taken(what: str, takes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a process that only sleeps, remaps memory, or has children, all the time: nobody sees
    it."""
    with Victim(BUSY, what) as victim, outcomes(monkeypatch) as planned:
        for number in range(takes):
            snapshot.take(victim.pid, store=tmp_path, name=f"i{number}").close()
            assert victim.get("bad") == 0, number
        assert len(planned) >= takes
        assert all(planned) or what != "s"


def test_what_is_mapped_during_a_take_is_not_examined_in_the_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To examine all takes milliseconds for each GiB: it is done before, mostly."""
    seen: list[str] = []
    examined = examine.examine

    def noted(*args: Any) -> examine.Examination:
        seen.append("examined")
        return examined(*args)

    monkeypatch.setattr(faults, "point", seen.append)
    monkeypatch.setattr(examine, "examine", noted)
    before = in_pause = 0
    with Victim(BUSY, "sg") as victim:
        for number in range(8):
            seen.clear()
            count = victim.get("count")

            def more(_: Progress, count: int = count) -> None:
                wait_until(lambda: victim.get("count") > count + 1, "it has mapped more")

            store = tmp_path / str(number)
            with snapshot.take(victim.pid, store=store, writers="pass", progress=more) as image:
                assert image.manifest.stats.writers == "pass"
            begin, pause = seen.index("first-resumed"), seen.index("second-stop")
            before += "examined" in seen[begin:pause]
            in_pause += "examined" in seen[pause : seen.index("held")]
        assert victim.get("bad") == 0
    assert before > 4
    assert in_pause < before
