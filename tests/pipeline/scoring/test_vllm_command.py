"""``adpa precompute --engine vllm`` as users run it: its cache agrees with transformers', also after failures."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from tests.conftest import MakeModel, Models, Row, heed_signals

from adpa import distill, evaluate, precompute
from adpa.data.cache.responses import read_response_sets
from adpa.data.cache.shards import list_shards, read_shard
from adpa.data.cache.signal_rows import SignalRow
from adpa.data.cache.signals import Scoring, read_scorings, read_signals
from adpa.errors import OptionError
from adpa.pipeline.models.checkpoint import Checkpoint
from adpa.pipeline.scoring.vllm_engine import VllmEngine

pytestmark = pytest.mark.vllm

QUICK = ["enforce_eager=true", "kv_cache_memory_bytes=67108864"]
TOP_K = 10


@pytest.fixture(scope="module")
def wide_models(make_model: MakeModel) -> Models:
    """Tiny models with the head width that vLLM's attention on CPUs needs."""
    teacher, reference, student = (make_model(seed, width=128, initializer_range=0.1) for seed in (70, 71, 72))
    return Models(teacher, reference, student, student)


def write_pairs(rows: list[Row], path: Path, repetitions: int = 1) -> Path:
    def asking(row: Row, number: int) -> Row:
        return {**row, "prompt": [{"role": "user", "content": f"{row['prompt'][0]['content']} {number}"}]}

    path.write_text("".join(json.dumps(asking(row, number)) + "\n" for row in rows for number in range(repetitions)))
    return path


def test_an_evaluation_starts_an_engine_once_for_each_use_of_a_model(
    wide_models: Models,
    make_model: MakeModel,
    preference_rows: list[Row],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A student has one to sample, in both ways, and one to score."""
    started: list[tuple[str, str]] = []

    def note(use: str) -> None:
        start = getattr(VllmEngine, f"open_{use}")

        def noted(engine: VllmEngine, checkpoint: Checkpoint, *rest: Any) -> Any:
            started.append((checkpoint.name, use))
            return start(engine, checkpoint, *rest)

        monkeypatch.setattr(VllmEngine, f"open_{use}", noted)

    note("sampler")
    note("scorer")
    models = [str(each) for each in (wide_models.student, make_model(73, width=128, initializer_range=0.1))]
    student, baseline, teacher, reference = *models, str(wide_models.teacher), str(wide_models.reference)
    common: dict[str, Any] = {"teacher": teacher, "reference": reference, "max_new_tokens": 4, "cache": tmp_path}
    data = str(write_pairs(preference_rows[:4], tmp_path / "prefs.jsonl"))
    by_vllm = evaluate(student, baseline, data=data, **common, engine="vllm", engine_arg=QUICK)
    uses = [(student, "sampler"), (student, "scorer"), (baseline, "sampler"), (baseline, "scorer")]
    assert started == [*uses, (teacher, "scorer"), (reference, "scorer")]
    by_hf = evaluate(student, baseline, data=data, **common, engine="hf")
    assert by_vllm.greedy is not None
    assert by_hf.greedy is not None
    assert by_vllm.greedy.difference.mean == pytest.approx(by_hf.greedy.difference.mean, abs=1e-3)
    assert by_vllm.student_perplexity == pytest.approx(by_hf.student_perplexity, rel=1e-4)
    assert by_vllm.baseline_perplexity == pytest.approx(by_hf.baseline_perplexity, rel=1e-4)
    assert by_vllm.reward_margin == pytest.approx(by_hf.reward_margin, abs=1e-3)


def test_the_cache_of_vllm_is_that_of_transformers_and_a_student_learns_from_it(
    wide_models: Models, preference_rows: list[Row], tmp_path: Path
) -> None:
    data, cache = write_pairs(preference_rows[:8], tmp_path / "prefs.jsonl"), tmp_path / "cache"
    common: dict[str, Any] = {
        "teacher": str(wide_models.teacher),
        "reference": str(wide_models.reference),
        "data": str(data),
        "cache": cache,
        "top_k": TOP_K,
    }
    vllm: dict[str, Any] = {"engine": "vllm", "engine_arg": QUICK}
    by_hf = precompute(**common, engine="hf")
    by_vllm = precompute(**common, **vllm)
    assert by_vllm.engine == "vllm hidden-states"
    assert "hidden states" in by_vllm.engine_reason
    assert by_vllm.responses == by_hf.responses, "the sequences do not depend on the engine"
    assert by_vllm.scoring != by_hf.scoring

    scorings = {scoring.engine: scoring for scoring in read_scorings(cache)}
    assert scorings.keys() == {"hf", "vllm hidden-states"}
    for row, expected in zip(*(rows_of(cache, scorings[name]) for name in ("vllm hidden-states", "hf")), strict=True):
        assert row.key == expected.key
        np.testing.assert_array_equal(np.sort(row.topk_ids, axis=1), np.sort(expected.topk_ids, axis=1))
        for column in ("token_logprobs", "token_advantages", "tail_logprob"):
            np.testing.assert_allclose(getattr(row, column), getattr(expected, column), atol=2e-5)
        for column in ("topk_logprobs", "topk_advantages"):
            given, wanted = (np.sort(getattr(one, column).astype(np.float32), axis=1) for one in (row, expected))
            np.testing.assert_allclose(given, wanted, atol=8e-3)  # a half step of float16 at 8, twice

    sampled = precompute(**common, **vllm, student=str(wide_models.student), samples_per_prompt=2, max_new_tokens=6)
    assert (sampled.sampled, sampled.scoring) == (16, by_vllm.scoring)
    again = precompute(**common, **vllm, student=str(wide_models.student), samples_per_prompt=2, max_new_tokens=6)
    assert (again.sampled, again.scored, again.responses) == (0, 0, sampled.responses)
    report = distill(
        "adpa", str(wide_models.student), cache, tmp_path / "run", scoring=by_vllm.scoring, max_steps=2, batch_size=4
    )
    assert np.isfinite(report.last_loss)


def rows_of(cache: Path, scoring: Scoring) -> list[SignalRow]:
    signals = read_signals(cache, scoring)
    numbers = signals.locate(pa.array(sorted(signals.keys()), pa.binary(16)))
    return [signals.row(int(number)) for number in numbers]


def test_sequences_longer_than_the_engines_limit_are_counted_and_refused(
    wide_models: Models, preference_rows: list[Row], tmp_path: Path
) -> None:
    data = write_pairs(preference_rows[:8], tmp_path / "prefs.jsonl")
    with pytest.raises(OptionError, match=r"--max-model-len: 1?\d of 16 sequences have more than 48 tokens, up to \d+"):
        precompute(str(wide_models.teacher), str(data), tmp_path / "cache", engine="vllm", max_model_len=48)


# --- processes -------------------------------------------------------------------------------------------------------


class Running:
    """The command, running in its own process group."""

    def __init__(self, models: Models, data: Path, cache: Path, processes: bool, *more: object) -> None:
        options = {
            "--teacher": models.teacher,
            "--reference": models.reference,
            "--data": data,
            "--cache": cache,
            "--engine": "vllm",
            "--top-k": TOP_K,
            "--batch-tokens": 2000,
            "--dtype": "bfloat16",
        }
        command = [sys.executable, "-m", "adpa", "precompute"]
        command += [str(part) for pair in options.items() for part in pair]
        command += [part for argument in QUICK for part in ("--engine-arg", argument)]
        command += map(str, more)
        self.cache = cache
        self.output = cache.with_name("output.txt")
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(processes))}
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                command,
                stdout=file,
                stderr=file,
                env=environment,
                start_new_session=True,
                preexec_fn=heed_signals,
            )

    def wait_for_files(self, count: int, pattern: str = "scorings/*/pending/*.arrow") -> None:
        """Waits for ``count`` files, by default the teacher's."""
        while len(list(self.cache.glob(pattern))) < count:
            assert self.process.poll() is None, self.output.read_text()
            time.sleep(0.05)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture
def pairs(preference_rows: list[Row], tmp_path: Path) -> Path:
    """800 sequences, about 40 in a batch."""
    return write_pairs(preference_rows, tmp_path / "prefs.jsonl", repetitions=20)


@pytest.fixture
def started(wide_models: Models, pairs: Path, tmp_path: Path) -> Iterator[Any]:
    """Starts the command. All its processes end with the test."""
    runs: list[Running] = []

    def start(*more: object, processes: bool = False) -> Running:
        runs.append(Running(wide_models, pairs, tmp_path / "cache", processes, *more))
        return runs[-1]

    yield start
    for run in runs:
        if run.process.poll() is None:
            os.killpg(run.process.pid, signal.SIGKILL)


def finish_and_check(models: Models, data: Path, cache: Path) -> None:
    """Checks that a plain rerun completes the cache without duplicate rows."""
    kept = len(list(cache.glob("scorings/*/pending/*.arrow")))
    assert kept > 0
    report = precompute(
        str(models.teacher),
        str(data),
        cache,
        reference=str(models.reference),
        engine="vllm",
        engine_arg=QUICK,
        top_k=TOP_K,
        dtype="bfloat16",
    )
    assert report.scored == 800
    (scoring,) = read_scorings(cache)
    wanted = {sequence.key for found in read_response_sets(cache) for sequence in found.sequences()}
    tables = [read_shard(path) for path in list_shards(scoring.folder(cache), "signals")]
    counts = Counter(key for table in tables for key in table["key"].to_pylist())
    assert counts.keys() == wanted
    assert set(counts.values()) == {1}


@pytest.mark.timeout(600)
def test_a_killed_run_goes_on(wide_models: Models, pairs: Path, started: Any) -> None:
    run = started()
    run.wait_for_files(2)
    run.process.kill()
    run.process.wait()
    finish_and_check(wide_models, pairs, run.cache)


@pytest.mark.timeout(600)
def test_sampling_that_was_killed_goes_on(wide_models: Models, pairs: Path, started: Any) -> None:
    run = started("--student", wide_models.student, "--max-new-tokens", 8)
    run.wait_for_files(2, "samples/*/*.arrow")
    run.process.kill()
    run.process.wait()
    kept = sum(len(read_shard(path)) for path in run.cache.glob("samples/*/*.arrow"))
    report = precompute(
        str(wide_models.teacher),
        str(pairs),
        run.cache,
        reference=str(wide_models.reference),
        student=str(wide_models.student),
        max_new_tokens=8,
        engine="vllm",
        engine_arg=QUICK,
        top_k=TOP_K,
        dtype="bfloat16",
    )
    assert 0 < kept < 400
    assert report.sampled == 400 - kept


@pytest.mark.timeout(600)
def test_an_engine_that_dies_keeps_what_was_scored(wide_models: Models, pairs: Path, started: Any) -> None:
    run = started(processes=True)
    run.wait_for_files(2)
    for child in run.children():
        if "EngineCore" in child.name():
            child.kill()
    assert run.process.wait(120) == 1
    last = [line for line in run.output.read_text().splitlines() if line.startswith("adpa: ")]
    assert len(last) == 1
    assert "finished batches are kept; run the same command again" in last[0]
    finish_and_check(wide_models, pairs, run.cache)


STOPS = {"ctrl-c": (signal.SIGINT, 130), "a scheduler": (signal.SIGTERM, 143)}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("moment", ["while vLLM starts", "while it scores"])
def test_a_stop_leaves_no_process_behind(stop: str, moment: str, started: Any) -> None:
    run = started(processes=True)
    if moment == "while it scores":
        run.wait_for_files(1)
    else:
        while not any("EngineCore" in child.name() for child in run.children()):
            assert run.process.poll() is None, run.output.read_text()
            time.sleep(0.05)
    children = run.children()
    number, exit_code = STOPS[stop]
    if number == signal.SIGINT:  # a terminal signals the whole group, a scheduler only the process it started
        os.killpg(run.process.pid, number)
    else:
        run.process.send_signal(number)
    # A terminal stops vLLM's processes too, and their end may be noticed first: a failed engine, exit code 1.
    assert run.process.wait(60) in ({exit_code, 1} if number == signal.SIGINT else {exit_code}), run.output.read_text()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
