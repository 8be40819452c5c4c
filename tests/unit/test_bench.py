"""The pure parts of the bench: what many measurements come to, and where a report goes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import cases, compare, report
from bench.client import MACHINE, Log, Request, Watched
from bench.figures import Part, Rows, Table, distribution, number, percentile, ratio, spread
from bench.pages import Gap
from bench.session import Bench, Choice, in_turn, session
from snapshot.ranges import Ranges

MS = 1_000_000


def test_a_percentile_is_a_value_that_was_measured() -> None:
    values = list(range(1, 1001))
    assert percentile(values, 0.5) == 500
    assert percentile(values, 0.999) == 999
    assert percentile([7], 0.01) == percentile([7], 1.0) == 7


def test_a_distribution_of_nothing_has_no_maximum() -> None:
    assert distribution([], "us") == {"count": 0}
    found = distribution([3000, 1000, 2000], "us", 1e-3)
    assert found == {"p50_us": 2, "p99_us": 3, "p999_us": 3, "max_us": 3, "count": 3}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01234, "0.0123"), (1.5, "1.50"), (45.67, "45.7"), (1234.5, "1,234"), (None, "-")],
)
def test_three_digits_count(value: float | None, text: str) -> None:
    assert number(value) == text


def test_what_cannot_be_divided_has_no_ratio() -> None:
    assert ratio(2, 6) == 3
    assert ratio(0, 6) is ratio(None, 6) is ratio(2, None) is None
    assert spread([1, 2, 9]) == "2.00 (9.00)"
    assert spread([]) == "-"


def test_rows_are_found_by_what_they_depend_on() -> None:
    rows = Rows([{"way": "a", "n": 1}, {"way": "b", "n": 2}, {"way": "a", "n": 5}, {"way": "c"}])
    assert rows.where(way="a").median("n") == 3
    assert rows.distinct("way", "n") == [("a", 1), ("b", 2), ("a", 5)]
    assert rows.where(way="c").median("n") is None


def test_each_way_has_its_turn_first() -> None:
    assert list(in_turn(2, ["a", "b"])) == [(0, "a"), (0, "b"), (1, "b"), (1, "a")]


def test_late_requests_that_overlap_are_one_stall() -> None:
    def request(due: float, latency: float, sent: float = 0.0) -> Request:
        return Request(int(due * MS), int((due + sent) * MS), int((due + latency) * MS))

    requests = [request(0, 0.1), request(1, 9), request(2, 8), request(5, 0.2)]
    looks = [(0, 0, 0, 0), (10 * MS, 1 * MS, 6 * MS, 0), (30 * MS, 2 * MS, 6 * MS, 0)]
    log = Log([*requests, request(20, 3, sent=2.5)], [Watched(*look) for look in looks])
    first, second = log.stalls(0, 100 * MS)
    assert (first.begin, first.end, first.requests) == (1 * MS, 10 * MS, 2)
    assert first.cause == "no CPU"
    assert second.cause == "client"
    assert log.stalls(0, 1 * MS) == []
    # In the middle of a stall too: from 2 to 8, for which two requests waited to be sent.
    late = [request(1, 8, sent=0.1), request(2, 7, sent=6), request(3, 6, sent=5)]
    (stall,) = Log(late, []).stalls(0, 100 * MS)
    assert (stall.client, stall.cause) == (int(6.1 * MS), "client")
    silent = [(4 * MS, 50 * MS), (0, 3 * MS), (1 * MS, 2 * MS)]  # of two processors
    (stall,) = Log(late, [], Ranges(silent)).stalls(0, 100 * MS)
    assert (stall.silent, stall.cause) == (7 * MS, MACHINE)
    (stall,) = Log(late, [], Ranges(silent[1:])).stalls(0, 100 * MS)
    assert (stall.silent, stall.cause) == (2 * MS, "client")


def test_a_thread_that_was_stopped_and_preempted_was_stopped() -> None:
    assert Gap(0, 5, waited=1, preempted=1).cause == "stopped"
    assert Gap(0, 5, waited=0, preempted=2).cause == "preempted"
    assert Gap(0, 5, waited=0, preempted=0).cause == "machine"


def test_a_report_leaves_the_prose_alone() -> None:
    before = f"# Title\n\nprose\n{report.begin('pause')}\nold\n{report.END}\nmore prose\n"
    once = report.replaced(before, "pause", "new \\1 | text\n")
    assert once == before.replace("old", "new \\1 | text")
    assert report.replaced(once, "pause", "new \\1 | text") == once


def test_a_case_without_markers_goes_to_the_end() -> None:
    text = report.replaced("# Title\n", "pause", "a")
    assert text == f"# Title\n\n{report.begin('pause')}\na\n{report.END}\n"
    assert report.replaced(report.replaced(text, "take", "b"), "pause", "c").count("bench end") == 2


def test_a_table_is_aligned() -> None:
    lines = Table("t", ("a", "long"), [("1", "2"), ("333", "4")]).markdown().splitlines()
    assert lines[2:] == ["| a   | long |", "|-----|------|", "| 1   | 2    |", "| 333 | 4    |"]


def test_two_checkouts_are_compared_case_by_case() -> None:
    rows = Rows(
        {"case": "pause", "way": way, "mib": 64, "load": 1.0, "round": turn, "pause_us": us + turn}
        for way, us in (("snap", 100), ("snap@old", 200), ("fork", 5))
        for turn in range(3)
    )
    (line,) = compare.table(rows, "snap@old").rows
    assert line == ["pause mib=64", "pause_us", "201", "101", "0.502"]


class Broken:
    """A case that measures once, and then fails."""

    def run(self, bench: Bench) -> None:
        bench.emit("broken", "snap", mib=64)
        raise OSError("no such thing")

    def report(self, rows: Rows) -> Sequence[Part]:
        return [f"{len(rows)} measured."]


def bench_of(choice: Choice) -> Bench:
    return Bench(Path(), {}, io.StringIO(), choice.quick, only_mib=choice.mib,
                 only_rounds=choice.rounds)  # fmt: skip


def test_a_case_that_fails_is_named_and_leaves_the_others_running(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(cases.CASES, "broken", Broken())
    with session(io.StringIO(), {}, Choice(), lambda text: None) as bench:
        command.run_case(bench, "broken")
        bench.emit("other", "snap")
    assert report.failures(bench.rows) == ["broken"]
    parts = report.parts("broken", bench.rows.where(case="broken"))
    assert parts == ["1 measured.", "This case failed: OSError: no such thing"]


def test_sizes_and_rounds_are_those_of_the_case_unless_asked_for() -> None:
    usual, quick = bench_of(Choice()), bench_of(Choice(quick=True))
    chosen = bench_of(Choice(mib=(256,), rounds=7))
    assert [one.sizes([1024], [64]) for one in (usual, quick, chosen)] == [[1024], [64], (256,)]
    assert [one.rounds({64: 5, 1024: 3}, 256) for one in (usual, quick, chosen)] == [3, 1, 7]
    assert usual.rounds({64: 5}, 8192) == 1
    assert [one.rounds(11, quick=2) for one in (usual, quick, chosen)] == [11, 2, 7]
