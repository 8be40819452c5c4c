"""Memory that is used before somebody waits for it."""

from __future__ import annotations

import mmap
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from snapshot.kernel import procfs
from snapshot.kernel.warm import warm_others, warm_ours
from tests.harness import processes

PAGE = 4096
PAGES = 4096
SPINNERS = 8


@pytest.fixture
def scattered() -> Iterator[mmap.mmap]:
    """Every second page of it is there."""
    memory = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    for at in range(0, PAGES * PAGE, 2 * PAGE):
        memory[at] = 1
    yield memory
    memory.close()


def needs_scan() -> None:
    if not warm_ours():
        pytest.skip("this kernel has no PAGEMAP_SCAN (before 6.7)")


def test_all_of_ours_is_read(scattered: mmap.mmap) -> None:
    needs_scan()
    before = warm_ours()
    more = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    more.write(b"x" * len(more))
    assert warm_ours() >= before + PAGES - 64
    more.close()


def test_of_another_what_is_its_own(scattered: mmap.mmap) -> None:
    """Here of this very process; a range in which nothing is mapped is passed over."""
    needs_scan()
    pid = os.getpid()
    lines = [one for one in procfs.maps(pid) if one.size == PAGES * PAGE and not one.name]
    program = next(one for one in procfs.maps(pid) if one.name)
    pagemap = procfs.open_file(pid, "pagemap")
    try:
        gone = (PAGE, 2 * PAGE)
        ranges = [gone, *((one.start, one.end) for one in lines)]
        assert warm_others(pid, pagemap, ranges) >= PAGES // 2
        assert warm_others(pid, pagemap, [gone, (program.start, program.end)]) == 0
    finally:
        os.close(pagemap)


@contextmanager
def crowded() -> Iterator[None]:
    """This thread has one processor, with many others that never wait; in the scheduler's group of
    this session, as a program is that does not make one of its own."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    command = [sys.executable, "-S", "-c", "print(flush=True)\nwhile True: pass"]
    spinners = []
    try:
        for _ in range(SPINNERS):
            spinners.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        os.sched_setaffinity(0, allowed)
        for one in spinners:
            assert one.stdout is not None
            one.stdout.read(1)
        os.sched_setaffinity(0, {min(allowed)})
        yield
    finally:
        os.sched_setaffinity(0, allowed)
        processes.kill_all([one.pid for one in spinners])
        for one in spinners:
            with one:
                pass


def test_who_gives_way_does_not_do_so_for_ever(scattered: mmap.mmap) -> None:
    """A turn of others takes 3 ms of each: where there are many, all reading took a minute."""
    needs_scan()
    with crowded():
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
        assert warm_ours() >= PAGES // 2
        turns = resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw - before
    assert turns < PAGES // 2 // 16
