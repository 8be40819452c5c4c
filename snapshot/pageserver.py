"""The page server of a lazy restore, as processes: `python -m snapshot.pageserver`.

Three processes that share one descriptor table (CLONE_FILES), in a session of their own:

  guardian   waits. When the server ends before all pages are in, it makes itself new (exec) and
             starts another one, which replays the journal and goes on. When the keeper ends, it
             starts another.
  keeper     waits (keeper.py). When the guardian ends, it becomes the guardian.
  server     lazy.Server, and nothing else. When both others have ended, it makes another keeper.

Because the table is shared, the userfaultfd of a child that the restored process forks is the
guardian's from the instant the kernel makes it: no moment exists in which the end of one process
or two would close it. Beside that the restored process holds a duplicate of its own: when all three
are killed at once it waits for ever (and can be killed) rather than read zeros.

Only what is needed to end the restored process is imported at first; see `main`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

AGAIN = 1.0
"""Seconds between two tries to make a keeper, when no process can be made."""
PATIENCE = 10.0
"""Seconds in which no process can be made before the restored one is ended, if nobody serves it."""
ATTEMPTS = 5
"""Servers in a row that may end without having put a single page in place."""
LAST_WORDS = 4096


class Plan:
    """What both processes know, kept in the journal: descriptors are those of the shared table."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.store: str = fields["store"]
        self.image: str = fields["image"]
        self.space: int = fields["space"]
        self.control: int = fields["control"]  # to `snap restore`, as long as that lives
        self.uffd: int = fields.get("uffd", -1)
        self.pidfd: int = fields.get("pidfd", -1)
        self.lease: int = fields.get("lease", -1)  # of the image, while there is no server too
        self.pid: int = fields.get("pid", 0)
        self.duplicate: int = fields.get("duplicate", -1)  # its number in the restored process
        self.working_set: bool = fields.get("working_set", True)  # to be used, and noted
        self.running: bool = fields.get("running", False)  # `snap restore` has let it go
        self.ranges: list[tuple[int, int]] = [tuple(each) for each in fields.get("ranges", [])]

    def fields(self) -> dict[str, Any]:
        return dict(self.__dict__)


def say(plan: Plan | None, message: str) -> None:
    """A line of the log (stderr)."""
    who = f"{plan.pid}: {plan.image}: " if plan else ""
    with suppress(OSError):
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(2, f"{stamp} {os.getpid()} {who}{message}\n".encode())


def tell(plan: Plan, event: str, **more: Any) -> None:
    """A message to `snap restore`, if it is still there."""
    with suppress(OSError):
        data = json.dumps({"event": event, **more}).encode()
        control = socket.socket(fileno=os.dup(plan.control))
        with control:
            control.send(data, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)


def main(arguments: list[str]) -> NoReturn:
    """`--start SOCKET STORE IMAGE SPACE`; `--resume JOURNAL` after a server was lost."""
    from .journal import Journal

    if arguments[0] == "--start":
        control, store, image, space = arguments[1:]
        start(int(control), store, image, int(space))
    journal = Journal(int(arguments[1]))
    os.set_inheritable(journal.fd, False)
    lead(journal, journal.keeper)  # its number is the same in this table


def start(
    control: int, store: str, image: str, space: int, opened: Any | None = None
) -> NoReturn:
    """The guardian of a new page server, in a process that nobody has to wait for: this one ends.
    `opened`: the image, when the parent of this process had it open (image.Image)."""
    if os.fork():
        os._exit(0)
    from .journal import Journal

    journal = Journal.create()
    journal.set_plan({"store": store, "image": image, "space": space, "control": control})
    journal.lead = os.getpid()
    lead(journal, -1, opened)


def lead(journal: Any, before: int, opened: Any | None = None) -> NoReturn:
    """The guardian, from its beginning; `before` is the keeper of its predecessor."""
    from . import faults, keeper

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    plan = Plan(journal.plan)
    try:
        generation = journal.new_generation()
        keeper.start(journal, generation, PATIENCE)  # it holds all from before the server begins
        faults.point("keeper-made")
        journal.generation = generation
        faults.point("generation-set")
        keeper.end(before)
        faults.point("keepers-replaced")
        start_server(journal, opened)
    except BaseException as error:
        give_up(journal, plan, f"the page server cannot be started: {error!r}")
    guard(journal)


def start_server(journal: Any, opened: Any | None) -> None:
    """A server, on record when this returns, in which it does not return."""
    from . import keeper

    guardian = os.getpid()

    def run(on_record: Callable[[], None]) -> NoReturn:
        journal.server = os.pidfd_open(os.getpid())
        # Killed meanwhile? Then another guardian is there, which sees us from now on or has not.
        if not journal.claim(guardian, guardian):
            os._exit(1)
        on_record()
        serve(journal, opened)

    keeper.start_twin(run, PATIENCE)


def succeed(journal: Any, generation: int) -> NoReturn:
    """A keeper has taken the lead."""
    from . import faults, keeper
    from .errors import KernelError

    plan = Plan(journal.plan)
    if not alive(journal.server) and not _to_be_done(journal, plan):
        os._exit(0)
    faults.point("led")
    say(plan, f"the guardian ended; {os.getpid()} takes its place")
    journal.keeper = -1  # it was this process; `guard` sees to it if this fails
    with suppress(KernelError):
        keeper.start(journal, generation)
    faults.point("followed")
    guard(journal)


def _to_be_done(journal: Any, plan: Plan) -> bool:
    """Whether a server is missing: the process, or a child that may have outlived it, may still
    wait for a page."""
    from .journal import RUNNING

    return journal.state == RUNNING and (alive(plan.pidfd) or bool(journal.forked()))


def guard(journal: Any) -> NoReturn:
    """The guardian: waits for the end of the server or of the keeper, and acts on it."""
    from .journal import DONE

    name(b"snap-guardian")
    while True:
        await_any(journal.server, journal.keeper)
        reap()
        if not alive(journal.server):
            break
        if not alive(journal.keeper):
            say(Plan(journal.plan), "the keeper ended; another one takes its place")
            _start_keeper(journal)
    plan = Plan(journal.plan)
    if not _to_be_done(journal, plan):
        os._exit(0 if journal.state == DONE else 1)
    if journal.futile >= ATTEMPTS:
        give_up(journal, plan, f"{journal.futile} page servers in a row ended at once")
    say(plan, "the page server ended before all pages were in; starting another one")
    resume(journal, plan)


def _start_keeper(journal: Any) -> None:
    """As soon as a process can be made; until the server ends."""
    from . import keeper
    from .errors import KernelError

    try:
        keeper.start(journal, journal.generation)
    except KernelError as error:
        say(Plan(journal.plan), f"no keeper yet: {error.message}")
        await_any(journal.server, seconds=AGAIN)


def resume(journal: Any, plan: Plan) -> NoReturn:
    """This process becomes a fresh guardian with the descriptors that matter."""
    journal.server = -1
    if not alive(journal.keeper):  # nobody else holds what must not be closed, and exec takes long
        _start_keeper(journal)
    wanted = [journal.fd, plan.control, plan.uffd, plan.pidfd, plan.lease, journal.keeper]
    wanted += journal.forked()
    for fd in wanted:
        with suppress(OSError):
            os.set_inheritable(fd, True)
    command = [sys.executable, "-m", "snapshot.pageserver", "--resume", str(journal.fd)]
    try:
        os.execv(sys.executable, command)
    except OSError as error:
        give_up(journal, plan, f"{sys.executable}: {error.strerror}")


def serve(journal: Any, opened: Any | None) -> NoReturn:
    """The server process, from beginning to end."""
    from .journal import DONE, RUNNING

    name(b"snap-pages")
    status = 1
    plan = Plan(journal.plan)
    try:
        with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("-900")
        from .service import Service

        if journal.state != RUNNING:
            service = Service(journal, plan, opened)
            tell(plan, "opened")
            service.locate()
            if not service.receive():
                os._exit(1)  # `snap restore` gave up before the process ran
            tell(plan, "ready", server=os.getpid())
        else:
            journal.note_start()
            service = Service(journal, plan)
            service.locate()
            service.take_over()
        service.run()
        journal.state = DONE
        tell(plan, "complete", faults=service.faults, pages=journal.filled)
        status = 0
        service.close()
    except BaseException as error:
        message = getattr(error, "message", None) or repr(error)
        if os.environ.get("SNAP_DEBUG"):
            import traceback

            traceback.print_exc()
        if journal.state == RUNNING and not _may_be_tried_again(error):
            give_up(journal, plan, message)
        if journal.state != RUNNING:
            tell(plan, "failed", message=message)
        else:
            say(plan, f"the page server ends: {message}")
    os._exit(status)


def _may_be_tried_again(error: BaseException) -> bool:
    """Bytes that cannot be trusted do not get better, and a lost event is lost."""
    from .errors import DamagedError
    from .journal import JournalFull

    return not isinstance(error, DamagedError | JournalFull)


def give_up(journal: Any, plan: Plan, reason: str) -> NoReturn:
    """Ends the restored process and all it has forked: their missing pages will never come."""
    from .journal import FAILED

    if plan.pidfd >= 0:
        victims = _forked(plan)
        if alive(plan.pidfd):
            say(plan, f"killed process {plan.pid}: {reason}")
            with suppress(OSError):
                signal.pidfd_send_signal(plan.pidfd, signal.SIGKILL)
        for pid in victims:
            say(plan, f"killed its child {pid}: {reason}")
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    else:
        say(plan, reason)
    journal.state = FAILED  # not before: who is killed meanwhile is replaced, and they are killed
    tell(plan, "failed", message=reason[:LAST_WORDS])
    os._exit(1)


def alive(pidfd: int) -> bool:
    if pidfd < 0:
        return False
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return not poll.poll(0)


def await_any(*fds: int, seconds: float | None = None) -> bool:
    """Until one of them is readable: a process has ended; at once when one is none (-1). False:
    not within `seconds`."""
    poll = select.poll()
    for fd in fds:
        if fd < 0:
            return True
        poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


def reap() -> None:
    """Processes that we have made and that have ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _forked(plan: Plan) -> set[int]:
    """Processes that the restored one has forked: those below it, and those that have outlived it
    and still hold the duplicate."""
    from .kernel.uffd import Uffd

    found = set(_descendants(plan.pid))
    uffd = Uffd(plan.uffd)
    for entry in os.listdir("/proc"):
        with suppress(OSError, ValueError):
            if int(entry) in found or int(entry) == plan.pid:
                continue
            link = os.readlink(f"/proc/{entry}/fd/{plan.duplicate}")
            if "userfaultfd" in link and uffd.held_by(int(entry), plan.duplicate):
                found.add(int(entry))
    return found - {os.getpid()}


def _descendants(pid: int) -> list[int]:
    """Processes forked by `pid` and theirs, as far as /proc still tells."""
    if not pid:
        return []
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        with suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{int(name)}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
            if fields[0] != b"Z":
                children.setdefault(int(fields[1]), []).append(int(name))
    found: list[int] = []
    todo = [pid]
    while todo:
        new = children.get(todo.pop(), [])
        found += new
        todo += new
    return found


def name(comm: bytes) -> None:
    with suppress(OSError), open("/proc/self/comm", "wb") as file:
        file.write(comm)


if __name__ == "__main__":
    from snapshot import pageserver  # the module that others import, not a second one

    pageserver.main(sys.argv[1:])
