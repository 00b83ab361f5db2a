"""Taking measures: failures, time limits, turns."""

import time
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import pytest
from benchmarks.gpu import measures as gpu_measures
from benchmarks.gpu.measures import figure_of, in_turns, provide_version, take
from benchmarks.gpu.part import Failure, Figure, Measure, Report, Setting, Skipped


def setting(seconds: float) -> Setting:
    return Setting("cpu", Path(), None, time.monotonic() + seconds)


def broken() -> Iterator[Figure]:
    yield Figure("first", 1.0)
    raise ValueError("the second\n  is missing")


def taken(measures: list[Measure], seconds: float = 100.0) -> list[Report]:
    reports: list[Report] = []
    take(measures, setting(seconds), reports.append)
    return reports


def test_what_fails_is_told_in_one_line_and_the_rest_goes_on() -> None:
    measures = [Measure("broken", 1, broken), Measure("whole", 1, lambda: [Figure("third", 3.0)])]
    assert taken(measures) == [
        Figure("first", 1.0),
        Failure("broken", "ValueError: the second is missing"),
        Figure("third", 3.0),
    ]


def test_what_does_not_fit_into_the_time_is_skipped() -> None:
    measures = [Measure("long", 60, broken), Measure("short", 5, lambda: [Figure("short", 1.0)])]
    assert taken(measures, 30.0) == [
        Skipped("long", "it may take 60 s, 30 s are left"),
        Figure("short", 1.0),
    ]


def test_what_cannot_be_measured_here_is_skipped() -> None:
    assert taken([Measure("vLLM", 1, broken, "vLLM is not installed")]) == [Skipped("vLLM", "vLLM is not installed")]


def test_figures_are_sent_as_they_come() -> None:
    sent: list[Report] = []

    def measure() -> Iterator[Figure]:
        yield Figure("first", 1.0)
        assert sent == [Figure("first", 1.0)]
        yield Figure("second", 2.0)

    take([Measure("both", 1, measure)], setting(100.0), sent.append)
    assert [report.name for report in sent] == ["first", "second"]


def test_ways_take_turns_after_a_round_that_does_not_count() -> None:
    order: list[str] = []
    times = in_turns({"one": lambda: order.append("one"), "other": lambda: order.append("other")}, 2, "cpu")
    assert order == ["one", "other"] * 3
    assert {name: len(seconds) for name, seconds in times.items()} == {"one": 2, "other": 2}


def test_of_several_values_the_median_and_the_ends_are_kept() -> None:
    assert figure_of("speed", [5.0, 1.0, 2.0], "GB/s") == Figure("speed", 2.0, "GB/s", 1.0, 5.0)
    assert figure_of("speed", [5.0]) == Figure("speed", 5.0)


def test_sources_that_are_not_installed_have_a_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_measures, "installed_version", lambda package: None)
    monkeypatch.setattr("sys.path", [])
    provide_version(tmp_path)
    (found,) = distributions(path=[str(tmp_path)])
    assert (found.name, found.version) == ("adpa", "0.1.0")
