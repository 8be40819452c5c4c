"""README's table of what can be restored is true as far as tests say so: every claim names one.

A new claim without a test, and a test that was renamed or removed, fail here.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REGIONS = "unit/test_regions.py::test_what_cannot_be_handled_is_named"
STATE = "live/test_state_resources.py::test_rebuilt_state"
SIXTEEN = "live/test_programs.py::test_sixteen_threads"
KINDS = "live/test_programs.py::test_memory_of_every_kind"
LISTED = "live/test_descriptors.py::test_everything_that_cannot_be_handled_is_listed_at_once"

CLAIMS = {
    "private and shared anonymous memory": KINDS,
    "heap": KINDS,
    "stacks": KINDS,
    "memfd": "live/test_descriptors.py::test_memfds_and_unnamed_tmpfs_files",
    "tmpfs": "live/test_rebuild.py::test_shared_memory_is_shared_again",
    "file mappings (private with their changes)": (
        "live/test_rebuild.py::test_mappings_and_memory_are_those_of_the_image"
    ),
    "PROT_NONE": "live/test_rebuild.py::test_mappings_and_memory_are_those_of_the_image",
    "brk": KINDS,
    "huge pages of 2 MiB (anonymous and memfd)": (
        "live/test_hugepages.py::test_huge_pages_come_back"
    ),
    "huge pages of 1 GiB": "unit/test_regions.py::test_pages_of_1_gib_are_refused_by_name",
    "files of hugetlbfs": REGIONS,
    "device memory": REGIONS,
    "System V shared memory": REGIONS,
    "regions of another userfaultfd": REGIONS,
    "any number: registers": "live/test_freeze.py::test_200_threads",
    "SSE/AVX state": SIXTEEN,
    "TLS": SIXTEEN,
    "signal masks": SIXTEEN,
    "alternate stacks": STATE,
    "robust futexes": STATE,
    "rseq": "kernel/test_remote.py::test_the_rseq_critical_section_is_put_back",
    "names": STATE,
    "pending signals": "live/test_state_resources.py::test_many_pending_signals",
    "interrupted system calls": "live/test_rebuild.py::test_the_kernel_restarts_these_by_itself",
    "shadow stacks": "live/test_state_resources.py::test_preflight",
    "pid and tids": "live/test_rebuild.py::test_proc_shows_the_same",
    "arguments and environment": "live/test_rebuild.py::test_proc_shows_the_same",
    "credentials": "live/test_state_resources.py::test_rebuilt_credentials",
    "limits": STATE,
    "scheduling": STATE,
    "signal handlers": STATE,
    "timers": STATE,
    "umask": STATE,
    "working directory": "live/test_state_resources.py::test_working_directory_that_is_gone",
    "children (each process is taken by itself)": (
        "live/test_lazy.py::test_a_child_outlives_the_parent_with_pages_missing"
    ),
    "other user namespaces": "live/test_state_resources.py::test_preflight",
    "regular files (offset, flags, locks)": (
        "live/test_descriptors.py::test_files_flags_offsets_and_sharing"
    ),
    "directories": "live/test_descriptors.py::test_directories_places_and_devices",
    "/dev/null and its like": "live/test_descriptors.py::test_directories_places_and_devices",
    "pipes with what is in them": "live/test_descriptors.py::test_pipes_keep_what_is_in_them",
    "eventfd": "live/test_descriptors.py::test_eventfds",
    "epoll": "live/test_descriptors.py::test_epoll_registrations",
    "timerfd": "live/test_descriptors.py::test_timerfds",
    "signalfd": "live/test_descriptors.py::test_signalfds",
    "inotify watches": "live/test_descriptors.py::test_inotify_watches_keep_their_numbers",
    "io_uring": LISTED,
    "fanotify": LISTED,
    "pidfd": LISTED,
    "perf events": LISTED,
    "other devices": LISTED,
    "listening and unconnected TCP": "live/test_sockets.py::test_listening_tcp",
    "UDP and unix sockets with their options": "live/test_sockets.py::test_udp",
    "connections come back ended": "live/test_sockets.py::test_a_connection_comes_back_ended",
    "and are listed": "live/test_sockets.py::test_a_connection_comes_back_ended",
    "those of `snap restore`": (
        "live/test_descriptors.py::test_standard_streams_that_lead_outside_are_those_of_the_restore"
    ),
    "when they led to a terminal or to another process": (
        "live/test_descriptors.py::test_a_shared_terminal_becomes_three_streams"
    ),
}


def claims() -> list[str]:
    text = (ROOT / "README.md").read_text()
    table = text.split("## What can be restored today")[1].split("\n\n")[1]
    rows = [row.split("|")[2:4] for row in table.splitlines()[2:]]
    cells = [cell.strip() for row in rows for cell in row if cell.strip()]
    return [claim for cell in cells for claim in re.split(r", (?![^(]*\))", cell)]


@cache
def names_in(path: str) -> set[str]:
    return set(re.findall(r"^def (test_\w+)", (ROOT / "tests" / path).read_text(), re.MULTILINE))


def test_every_claim_has_a_test_and_every_test_a_claim() -> None:
    found = claims()
    assert len(found) > 40
    assert sorted(set(found)) == sorted(CLAIMS)


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_test_of_a_claim_is_there(claim: str) -> None:
    path, name = CLAIMS[claim].split("::")
    assert name in names_in(path), f"{claim}: {CLAIMS[claim]} does not exist"
