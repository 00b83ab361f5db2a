"""The summary of a run tells what a stopped run had done from what other runs left."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.conftest import Row
from tests.pipeline.conftest import Disturb, Filled

from adpa import collect_garbage, merge_cache, pack_cache, precompute
from adpa.data.cache.format import prepare_cache
from adpa.pipeline.precompute import PrecomputeReport
from adpa.pipeline.terminal.precompute import show_precompute

PAIRS = 6  # with two responses each, in a batch of their own


class Runs:
    """Runs of ``precompute`` on the first rows of some pairs, into one cache."""

    def __init__(self, folder: Path, filled: Filled, rows: list[Row]) -> None:
        self.cache, self._folder, self._models, self._rows = folder / "cache", folder, filled.models, rows

    def __call__(self, pairs: int = PAIRS, **options: Any) -> PrecomputeReport:
        data = self._folder / f"{pairs}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in self._rows[:pairs]))
        common: dict[str, Any] = {
            "teacher": str(self._models.teacher),
            "reference": str(self._models.reference),
            "data": str(data),
            "cache": self.cache,
            "top_k": 5,
            "max_new_tokens": 6,
            "batch_tokens": 1,
        }
        return precompute(**common | options)

    def stopped(self, pairs: int = PAIRS, **options: Any) -> None:
        """A run that a disturbance ends."""
        with pytest.raises(KeyboardInterrupt):
            self(pairs, **options)

    def student(self) -> str:
        return str(self._models.student)


@pytest.fixture
def runs(tmp_path: Path, few_words: Filled, preference_rows: list[Row]) -> Runs:
    return Runs(tmp_path, few_words, preference_rows)


def counts(report: PrecomputeReport) -> dict[str, int]:
    """The counts of sequences and samples that are not 0."""
    names = ("scored", "reused", "resumed", "resumed_halves", "sampled", "resumed_samples")
    return {name: getattr(report, name) for name in names if getattr(report, name)}


def test_of_a_run_that_was_stopped_at_the_teacher_the_halves_are_resumed(runs: Runs, disturb: Disturb) -> None:
    disturb("teacher", after=4)
    runs.stopped()
    predicted = runs(dry_run=True)
    assert counts(predicted) == {"scored": 12, "resumed_halves": 4}
    assert counts(runs()) == {"scored": 12, "resumed_halves": 4}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["reference", "teacher"])
@pytest.mark.parametrize("after", [1, 7, 11])
def test_of_a_run_that_was_stopped_at_its_last_model_the_sequences_are_resumed(
    model: str, after: int, runs: Runs, disturb: Disturb
) -> None:
    options: dict[str, Any] = {} if model == "reference" else {"reference": None}
    disturb(model, after)
    runs.stopped(**options)
    halves = {"resumed_halves": 12 - after} if model == "reference" else {}
    expected = {"scored": 12 - after, "reused": after, "resumed": after} | halves
    assert counts(runs(**options, dry_run=True)) == expected
    assert counts(runs(**options)) == expected


@pytest.mark.slow
def test_a_run_that_was_stopped_twice_resumes_what_both_had_done(runs: Runs, disturb: Disturb) -> None:
    disturb("reference", after=3)
    runs.stopped()
    disturb("reference", after=2)
    runs.stopped()
    assert counts(runs()) == {"scored": 7, "reused": 5, "resumed": 5, "resumed_halves": 7}


def test_what_finished_runs_left_is_reused_and_not_resumed(runs: Runs) -> None:
    assert counts(runs(4)) == {"scored": 8}
    assert counts(runs(4)) == {"reused": 8}
    assert counts(runs(6)) == {"scored": 4, "reused": 8}
    assert counts(runs(5)) == {"reused": 10}


def test_data_that_grew_after_a_stopped_run_resume_it(runs: Runs, disturb: Disturb) -> None:
    disturb("reference", after=5)
    runs.stopped(4)
    assert counts(runs(6)) == {"scored": 7, "reused": 5, "resumed": 5, "resumed_halves": 3}


@pytest.mark.slow
def test_where_grown_data_were_stopped_only_their_own_rows_are_resumed(runs: Runs, disturb: Disturb) -> None:
    runs(4)
    disturb("reference", after=1)
    runs.stopped(6)
    assert counts(runs(6)) == {"scored": 3, "reused": 9, "resumed": 1, "resumed_halves": 3}


def test_responses_of_another_name_are_another_runs(runs: Runs, tmp_path: Path) -> None:
    runs(responses="chosen")
    moved = tmp_path / "moved.jsonl"
    moved.write_text((tmp_path / f"{PAIRS}.jsonl").read_text())
    assert counts(runs(data=str(moved))) == {"scored": 6, "reused": 6}


@pytest.mark.slow
def test_sets_that_another_teacher_scored_are_not_resumed(runs: Runs, disturb: Disturb) -> None:
    runs()
    runs(4, reference=None)
    assert counts(runs(reference=None)) == {"scored": 4, "reused": 8}
    disturb("teacher", after=2)
    runs.stopped(reference=None, top_k=4)
    assert counts(runs(reference=None, top_k=4)) == {"scored": 10, "reused": 2, "resumed": 2}


@pytest.mark.slow
def test_samples_of_a_stopped_run_are_resumed_until_their_set_is_made(runs: Runs, disturb: Disturb) -> None:
    options: dict[str, Any] = {"student": runs.student(), "samples_per_prompt": 2}
    runs(4, **options)
    disturb("student", after=1)
    runs.stopped(**options)
    predicted = counts(runs(**options, dry_run=True))
    assert (predicted["sampled"], predicted["resumed_samples"]) == (3, 1)
    disturb("reference", after=2)
    runs.stopped(**options)
    report = runs(**options)
    assert (report.sampled, report.resumed_samples, report.resumed) == (0, 0, 2)
    assert report.resumed_halves == report.scored
    assert counts(runs(**options)) == {"reused": report.scored + report.reused}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["gc", "pack", "merge"])
def test_commands_on_the_cache_change_no_count(command: str, runs: Runs, disturb: Disturb, tmp_path: Path) -> None:
    runs(3)
    disturb("reference", after=2)
    runs.stopped()
    if command == "gc":
        collect_garbage(runs.cache, yes=True)
    elif command == "pack":
        pack_cache(runs.cache)
    else:
        other, runs.cache = runs.cache, tmp_path / "merged"
        prepare_cache(runs.cache)
        merge_cache(runs.cache, other)
    halves = {} if command == "merge" else {"resumed_halves": 4}  # merge leaves pending rows out
    assert counts(runs()) == {"scored": 4, "reused": 8, "resumed": 2} | halves


@pytest.mark.slow
def test_a_part_resumes_its_own_rows(runs: Runs, disturb: Disturb) -> None:
    disturb("reference", after=2)
    runs.stopped(part="1/2")
    assert counts(runs(part="2/2")) == {"scored": 6}
    assert counts(runs(part="1/2")) == {"scored": 4, "reused": 2, "resumed": 2, "resumed_halves": 4}
    assert counts(runs(part="1/2")) == {"reused": 6}


@pytest.mark.slow
def test_parts_resume_their_samples(runs: Runs, disturb: Disturb) -> None:
    options: dict[str, Any] = {"student": runs.student(), "part": "1/2"}
    disturb("student", after=1)
    runs.stopped(**options)
    report = runs(**options)
    assert (report.sampled, report.resumed_samples, report.awaited) == (2, 1, 3)
    assert counts(runs(**options)) == {"reused": report.scored}


def test_the_terminal_shows_what_was_resumed_if_anything_was(runs: Runs, disturb: Disturb) -> None:
    def shown(report: PrecomputeReport) -> str:
        console = Console(width=80)
        with console.capture() as captured:
            console.print(show_precompute(report))
        return captured.get()

    disturb("reference", after=5)
    runs.stopped()
    text = shown(runs())
    assert re.search(r"│ resumed +│ 5 ", text)
    assert re.search(r"│ resumed halves +│ 7 ", text)
    assert "resumed samples" not in text
    assert "resumed" not in shown(runs())
