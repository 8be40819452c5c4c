"""The page server of a lazy restore, as processes: `python -m snapshot.pageserver`.

Three processes that share one descriptor table (CLONE_FILES), in a session of their own:

  guardian   waits. When the server ends before all pages are in, it makes itself new (exec) and
             starts another one, which replays the journal and goes on.
  server     lazy.Server, and nothing else. When the guardian ends, it makes another one, and
             another keeper when that ends.
  keeper     waits (keeper.py). When both others have ended, it becomes the guardian.

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
from contextlib import suppress
from typing import Any, NoReturn

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
    """`--start SOCKET STORE IMAGE SPACE`; `--resume JOURNAL TURN KEEPER` after one was lost."""
    if arguments[0] == "--start" and os.fork():
        os._exit(0)  # nobody's child: a program that restores need not wait for it
    from . import keeper
    from .journal import Journal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if arguments[0] == "--start":
        control, store, image, space = arguments[1:]
        journal = Journal.create()
        fields = {"store": store, "image": image, "space": int(space), "control": int(control)}
        journal.set_plan(fields)
    else:
        journal = Journal(int(arguments[1]))
        os.set_inheritable(journal.fd, False)
        if journal.turn != int(arguments[2]):  # the keeper has taken over meanwhile
            os._exit(0)
        # Descriptors of this table, whatever somebody of the former one has noted meanwhile.
        journal.server = journal.guardian = -1
        journal.keeper = int(arguments[3])
    plan = Plan(journal.plan)
    try:
        keeper.start(journal, os.getpid())  # first: it holds all from before the server begins
        guard(journal, start_server(journal))
    except BaseException as error:
        give_up(journal, plan, f"the page server cannot be started: {error!r}")


def start_server(journal: Any) -> int:
    """-> pid of the server; in the server itself this does not return."""
    from .kernel.spawn import twin

    turn = journal.turn
    pid = twin()
    if pid == 0:
        own = os.pidfd_open(os.getpid())
        if journal.turn == turn:
            journal.server = own
        if journal.turn != turn:  # our guardian was killed, and the keeper has taken over
            os._exit(1)
        serve(journal)
    return pid


def guard(journal: Any, server: int) -> NoReturn:
    """Waits for the end of the server, and acts on it."""
    from .journal import DONE, FAILED, STARTING

    name(b"snap-guardian")
    pidfd = os.pidfd_open(server)
    while True:
        with suppress(InterruptedError):
            select.select([pidfd], [], [])
            break
    with suppress(ChildProcessError):  # not our child, if the server made us
        os.waitpid(server, 0)
    os.close(pidfd)
    plan = Plan(journal.plan)
    if journal.state in (DONE, FAILED, STARTING):
        os._exit(0 if journal.state == DONE else 1)
    if not needed(journal, plan):
        os._exit(0)
    if journal.futile >= ATTEMPTS:
        give_up(journal, plan, f"{journal.futile} page servers in a row ended at once")
    say(plan, f"the page server {server} ended before all pages were in; starting another one")
    resume(journal, plan)


def resume(journal: Any, plan: Plan) -> NoReturn:
    """This process becomes a fresh guardian with the descriptors that matter."""
    from . import keeper

    journal.server = journal.guardian = -1
    if not alive(journal.keeper):  # nobody else holds what must not be closed, and exec takes long
        journal.keeper = -1
        keeper.start(journal, os.getpid())
    kept = journal.keeper
    wanted = [journal.fd, plan.control, plan.uffd, plan.pidfd, plan.lease, kept]
    wanted += journal.forked()
    for fd in wanted:
        with suppress(OSError):
            os.set_inheritable(fd, True)
    command = [sys.executable, "-m", "snapshot.pageserver", "--resume"]
    command += [str(journal.fd), str(journal.turn), str(kept)]
    try:
        os.execv(sys.executable, command)
    except OSError as error:
        give_up(journal, plan, f"{sys.executable}: {error.strerror}")


def serve(journal: Any) -> NoReturn:
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
            service = Service(journal, plan)
            tell(plan, "opened")
            if not service.receive():
                os._exit(1)  # `snap restore` gave up before the process ran
            tell(plan, "ready", server=os.getpid())
        else:
            journal.note_start()
            service = Service(journal, plan)
            service.take_over()
        service.run()
        journal.state = DONE
        tell(plan, "complete", faults=service.faults, pages=journal.filled)
        status = 0
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


def needed(journal: Any, plan: Plan) -> bool:
    """Whether anybody may still miss a page: the process, or a child that may have outlived it."""
    return alive(plan.pidfd) or bool(journal.forked())


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
