"""A visit of a process (snapshot/visit.py) that has to come about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from snapshot.freeze import Frozen
from snapshot.kernel import procfs
from snapshot.kernel.ptrace import Tracee
from snapshot.kernel.remote import SCRATCH_SIZE
from snapshot.kernel.room import find_room
from snapshot.maps import gap, parse_maps
from snapshot.visit import Visit, visiting


def scratch_of(pid: int) -> int:
    """Where nothing is mapped."""
    lines = parse_maps(procfs.read(pid, "maps"))
    return gap([(line.start, line.end) for line in lines], SCRATCH_SIZE)


@contextmanager
def visit_of(pid: int) -> Iterator[Visit]:
    with visiting(pid, find_room(Tracee(pid, 0)), scratch_of(pid)) as visit:
        yield visit


@contextmanager
def visited(pid: int) -> Iterator[tuple[Frozen, Frozen]]:
    with visit_of(pid) as visit:
        assert visit.host is not None
        assert visit.guest is not None
        yield visit.host, visit.guest
