"""Two processes that do the same work say so once; parts, workers and commands on the cache raise no alarm."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Row
from tests.data.makers import SAMPLING, SCORING, signal_row
from tests.pipeline.conftest import Disturb, Filled
from tests.pipeline.faults import REQUESTS, SAMPLING_BATCH, Model

from adpa import collect_garbage, pack_cache, precompute, verify_cache
from adpa.data.cache.locations import Location
from adpa.data.cache.signals import write_signals
from adpa.pipeline.precompute import PrecomputeReport
from adpa.pipeline.scoring.jobs import Job, run_here
from adpa.pipeline.scoring.other_runs import Watch, Written
from adpa.pipeline.scoring.sample import sample_responses

WARNING = (
    "another process {} at the same time, so that the work is done twice; stop one of the two, or share the work: "
    "--part 1/2 for one, --part 2/2 for the other"
)
SCORES, SAMPLES = WARNING.format("scores the same sequences"), WARNING.format("samples the same responses")


@pytest.fixture
def options(few_words: Filled, preference_rows: list[Row], tmp_path: Path) -> dict[str, Any]:
    """Six pairs; each response is a batch of its own."""
    data = tmp_path / "prefs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in preference_rows[:6]))
    return {
        "teacher": str(few_words.models.teacher),
        "reference": str(few_words.models.reference),
        "data": str(data),
        "cache": tmp_path / "cache",
        "top_k": 5,
        "max_new_tokens": 6,
        "batch_tokens": 1,
    }


@pytest.mark.parametrize("model", ["teacher", "reference", "teacher alone"])
def test_another_run_of_the_same_command_is_told_once(
    model: str, options: dict[str, Any], disturb: Disturb, caplog: pytest.LogCaptureFixture
) -> None:
    """The other one begins after three batches, and runs to its end."""
    if model == "teacher alone":
        options["reference"] = None
    others: list[PrecomputeReport] = []
    disturb(model.partition(" ")[0], after=3, do=lambda: others.append(precompute(**options)))
    report = precompute(**options)
    assert set(caplog.messages) == {f"{options['cache']}: {SCORES}"}
    assert len(caplog.messages) <= 2, "the other one may see our last write, too"
    assert others[0].scored + others[0].reused == 12
    assert report.scored + report.reused == 12


def test_another_run_that_samples_the_same_is_told_once(
    options: dict[str, Any], few_words: Filled, disturb: Disturb, caplog: pytest.LogCaptureFixture
) -> None:
    options["student"] = str(few_words.models.student)
    disturb("student", after=2, do=lambda: precompute(**options))
    report = precompute(**options)
    assert report.sampled == 6
    assert f"{options['cache']}: {SAMPLES}" in caplog.messages
    assert len(caplog.messages) <= 2


def test_what_the_other_run_had_finished_is_not_scored_by_this_one(
    options: dict[str, Any], disturb: Disturb, caplog: pytest.LogCaptureFixture
) -> None:
    """It ran from the teacher's last batch on, and so removed the pending rows that it had completed."""
    disturb("teacher", after=12 - 1, do=lambda: precompute(**options))
    report = precompute(**options)
    assert (report.scored, report.reused) == (1, 11)
    assert report.tokens > 0
    assert 1 <= len(caplog.messages) <= 2


def test_a_run_on_data_that_overlap_is_told(
    options: dict[str, Any],
    preference_rows: list[Row],
    disturb: Disturb,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in preference_rows[5:8]))
    disturb("teacher", after=0, do=lambda: precompute(**options | {"data": str(other)}))
    precompute(**options)
    assert caplog.messages == [f"{options['cache']}: {SCORES}"]


def beside(options: dict[str, Any], name: str) -> Callable[[], object]:
    """Something that may happen beside a run without doing its work."""
    cache, data = options["cache"], Path(options["data"])
    other = data.with_name("other.jsonl")
    other.write_text(data.read_text().replace(")", " 7)"))  # other prompts
    return {
        "another part": lambda: precompute(**options | {"part": "2/2"}),
        "other data": lambda: precompute(**options | {"data": str(other)}),
        "another scoring": lambda: precompute(**options | {"top_k": 4}),
        "gc": lambda: collect_garbage(cache, yes=True),
        "pack": lambda: pack_cache(cache),
        "verify": lambda: verify_cache(cache),
    }[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["another part", "other data", "another scoring", "gc", "pack", "verify"])
@pytest.mark.parametrize("model", ["teacher", "reference", "student"])
def test_what_may_run_beside_raises_no_alarm(
    name: str,
    model: str,
    options: dict[str, Any],
    few_words: Filled,
    disturb: Disturb,
    caplog: pytest.LogCaptureFixture,
) -> None:
    responses = "chosen,rejected,sampled"
    options |= {"student": str(few_words.models.student), "responses": responses}
    if name == "another scoring":
        options |= {"student": None, "responses": None}
        model = model.replace("student", "teacher")
    disturb(model, after=2, do=beside(options, name))
    precompute(**options | ({"part": "1/2"} if name == "another part" else {}))
    assert [said for said in caplog.messages if not said.startswith("teacher − reference prefers")] == []


@pytest.mark.slow
def test_two_processes_at_once_say_so(options: dict[str, Any], preference_rows: list[Row]) -> None:
    rows = [
        row | {"prompt": [{"role": "user", "content": "Hello " + " ".join(f"{number:o}")}]}
        for number in range(20)
        for row in preference_rows[:8]
    ]
    Path(options["data"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "adpa", "precompute"]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) for _ in "12"]
    said = [process.communicate(timeout=250)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert 1 <= len("".join(said).splitlines()) <= 2
    assert set("".join(said).splitlines()) == {f"adpa: warning: {options['cache']}: {SCORES}"}


def test_a_run_in_other_processes_tells_by_their_results(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def elsewhere(job: Job[Any, Any], batches: Sequence[Sequence[Any]]) -> list[Any]:
        return [replace(one, doubled=True) for one in run_here(job, batches)]

    sample_responses(tmp_path, SAMPLING, REQUESTS, Model, SAMPLING_BATCH, elsewhere)
    assert caplog.messages == [f"{tmp_path}: {SAMPLES}"]


def key(number: int) -> bytes:
    return bytes([number]) * 16


class Item:
    """A sequence to score."""

    def __init__(self, number: int) -> None:
        self.key = key(number)


def write(cache: Path, number: int, seed: int = 0) -> Written:
    path, size = write_signals(cache, SCORING, [signal_row(key(number), 2, seed)])
    return Written(path.name, [key(number)], size)


def test_a_worker_tells_by_its_results_and_keeps_silent_about_a_dead_workers_rows(tmp_path: Path) -> None:
    alarms: list[str] = []
    watch = Watch([(SCORING.folder(tmp_path), "signals")], lambda: alarms.append("alarm"))
    write(tmp_path, 1, seed=9)  # a dead worker
    first = [
        one() for one in watch.over([[Item(1)], [Item(2)]], [partial(write, tmp_path, number) for number in (1, 2)])
    ]
    assert [one.doubled for one in first] == [False, False]
    block = watch.over([[Item(3)], [Item(4)]], [partial(write, tmp_path, number) for number in (3, 4)])
    results = [next(block)()]
    write(tmp_path, 4, seed=9)  # another run
    results.append(next(block)())
    assert [one.doubled for one in results] == [False, True]
    assert len(alarms) == 2


def test_a_folder_with_many_strangers_is_listed_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch([(SCORING.folder(tmp_path), "signals")], lambda: pytest.fail("no row is ours"))
    listed: list[str] = []
    real = watch._list

    def count() -> dict[str, Location]:
        listed.append("once")
        return real()

    monkeypatch.setattr(watch, "_list", count)
    own = [[Item(number)] for number in range(100)]
    for number, one in enumerate(watch.over(own, [partial(write, tmp_path, number) for number in range(100)])):
        one()
        write(tmp_path, 100 + number)
    assert len(listed) <= 8
