"""The student is watched without being touched, and a run that collapses says so once."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import Models, Row
from tests.pipeline.conftest import Filled, dense_logprobs
from torch import Tensor

from adpa import distill, precompute
from adpa.data.batches import collate
from adpa.data.cache.responses import read_response_sets
from adpa.data.cache.signals import read_scorings, read_signals
from adpa.kernels.student_statistics import UNLIKELY
from adpa.pipeline.distill import DistillReport
from adpa.pipeline.training.collapse import Watch, collapse

BRIEF: dict[str, Any] = {"batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1}
KEYS = {"student/entropy", "student/mass_on_topk", "student/implausible_mass"}


def watched(record: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name.startswith("student/")}


@pytest.mark.parametrize(
    ("objective", "keys"), [("sft", set()), ("dckd", KEYS), ("adpa", KEYS | {"student/advantage"})]
)
def test_every_log_has_the_statistics_of_the_scored_responses(
    objective: Any, keys: set[str], filled: Filled, tmp_path: Path
) -> None:
    distill(objective, str(filled.models.student), filled.cache, tmp_path, **BRIEF)
    record = json.loads((tmp_path / "adpa.json").read_text())
    assert record["warnings"] == []
    assert [watched(log).keys() for log in (record["student_before"], *record["losses"])] == [keys] * 3


def test_the_first_statistics_are_those_of_the_student_before_training(filled: Filled, tmp_path: Path) -> None:
    """Against dense log-probabilities of the student, over all of its sampled responses."""
    student = filled.models.student
    distill("adpa", str(student), filled.cache, tmp_path, micro_batch_size=1, **BRIEF)
    (scoring,) = read_scorings(filled.cache)
    signals = read_signals(filled.cache, scoring)
    (sampled,) = (responses for responses in read_response_sets(filled.cache) if responses.info.name == "sampled")
    rows = []
    for sequence, number in zip(sampled.sequences(), signals.locate(sampled.table["key"]), strict=True):
        logq_TV = torch.from_numpy(dense_logprobs(student, sequence)).double()
        row = signals.row(int(number))
        assert row.topk_advantages is not None
        q_TK = logq_TV.gather(1, torch.from_numpy(row.topk_ids.astype("int64"))).exp()
        likely_TK = torch.from_numpy(row.topk_logprobs.astype("float64")) >= math.log(UNLIKELY)
        entropy_T, gain_TK = -(logq_TV.exp() * logq_TV).sum(1), torch.from_numpy(row.topk_advantages.astype("float64"))
        rows.append([entropy_T, q_TK.sum(1), 1 - (q_TK * likely_TK).sum(1), (q_TK * gain_TK).sum(1)])
    expected = [torch.cat(column).mean().item() for column in zip(*rows, strict=True)]
    first = watched(json.loads((tmp_path / "adpa.json").read_text())["student_before"])
    assert list(first.values()) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_watching_changes_no_bit_of_the_training(
    filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, whose random numbers watching must not draw."""
    student = tmp_path / "student"
    student.mkdir()
    for file in filled.models.student.iterdir():
        (student / file.name).write_bytes(file.read_bytes())
    config = json.loads((student / "config.json").read_text()) | {"attention_dropout": 0.5}
    (student / "config.json").write_text(json.dumps(config))

    def train(output: Path) -> dict[str, Tensor]:
        distill("adpa", str(student), filled.cache, output, on="chosen", **BRIEF)
        return load_file(output / "model.safetensors")

    seen = train(tmp_path / "watched")
    monkeypatch.setattr(Watch, "measure", lambda *_: {})
    unseen = train(tmp_path / "alone")
    assert all(torch.equal(seen[name], unseen[name]) for name in unseen)


@pytest.fixture(scope="module")
def own_teacher(models: Models, preference_rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose teacher is the student itself, so that the student has mass on likely tokens."""
    folder = tmp_path_factory.mktemp("own-teacher")
    data = folder / "prefs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in preference_rows[:2]))
    student, other = str(models.student), str(models.other_student)
    precompute(student, str(data), folder / "cache", reference=other, responses="chosen", top_k=10)
    return folder / "cache"


Train = Callable[..., DistillReport]


@pytest.fixture
def train(own_teacher: Path, models: Models, tmp_path: Path) -> Train:
    def run(**options: Any) -> DistillReport:
        return distill(
            "adpa",
            str(models.student),
            own_teacher,
            tmp_path / "out",
            on="chosen",
            batch_size=2,
            learning_rate=1e-2,
            warmup_steps=0,
            logging_steps=1,
            max_steps=7,
            **options,
        )

    return run


def praise_the_unlikely(examples: Any, **options: Any) -> dict[str, Tensor]:
    batch = collate(examples, **options)
    unlikely_NK = batch["teacher_logprobs"] < math.log(UNLIKELY)
    return batch | {"advantages": torch.where(unlikely_NK, 5.0, -5.0)}


def test_a_run_that_collapses_warns_once(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("adpa.pipeline.training.run.collate", praise_the_unlikely)
    with caplog.at_level(logging.WARNING, "adpa"):
        report = train(advantage_weight=50.0, plausibility=0.0)
    (warning,) = report.warnings
    assert [record.getMessage() for record in caplog.records if record.name.startswith("adpa")] == [warning]
    assert json.loads((tmp_path / "out" / "adpa.json").read_text())["warnings"] == [warning]
    assert warning.endswith("start anew with --plausibility 0.05 or a smaller --advantage-weight")


def test_a_healthy_run_warns_of_nothing(train: Train) -> None:
    assert train(advantage_weight=0.5, plausibility=0.05).warnings == []


def entries(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    return [
        {"student/implausible_mass": mass, "student/advantage": advantage, "step": 10 * number}
        for number, (mass, advantage) in enumerate(pairs)
    ]


@pytest.mark.parametrize(
    ("log", "step"),
    [
        (entries((0.15, 0), (0.3, 0.1), (0.3, 0.1), (0.3, 0.1), (0.4, 0.2)), 30),
        (entries((0.15, 0), (0.2, 0.1), (0.26, 0.1), (0.27, 0.1), (0.28, 0.2)), 40),
        (entries((0.15, 0), (0.3, 0.1), (0.3, 0.1), (0.2, 0.1), (0.3, 0.2), (0.3, 0.2)), None),
        (entries((0.15, 0), *[(0.3, -0.1)] * 9), None),
        (entries((0.15, 0), *[(0.24, 0.5)] * 9), None),
        ([{"step": 10, "loss": 1.0}], None),
    ],
    ids=["at once", "slowly", "it did not last", "without a rise of the advantage", "a small rise", "nothing to watch"],
)
def test_a_collapse_is_a_rise_of_both_that_lasts(log: list[dict[str, float]], step: int | None) -> None:
    warning = collapse(log, plausibility=0.0)
    assert (warning is None) if step is None else (warning is not None and warning.startswith(f"step {step}: "))


def test_who_has_the_guard_is_told_of_the_weight_alone() -> None:
    warning = collapse(entries((0.1, 0), *[(0.5, 1)] * 3), plausibility=0.05)
    assert warning is not None
    assert warning.endswith("start anew with a smaller --advantage-weight")
