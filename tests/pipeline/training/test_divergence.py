"""A run whose loss grows fourfold says so once; a healthy one does not."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.conftest import Filled

from adpa import distill
from adpa.pipeline.distill import DistillReport
from adpa.pipeline.training.divergence import BEFORE, divergence

SFT = {"nll/chosen": 1.0}
ADPA = {"nll/chosen": 1.0, "kl/sampled": 2.0, "advantage/sampled": 0.5}


def history(*losses: float, before: float = 1.0) -> list[dict[str, Any]]:
    logs: list[dict[str, Any]] = [
        {"loss": loss, "nll/chosen": loss, "step": 10 * number} for number, loss in enumerate(losses, 1)
    ]
    return [{"student/entropy": 1.0, "step": 0}, logs[0] | {BEFORE: before}, *logs[1:]]


@pytest.mark.parametrize(
    ("log", "step"),
    [
        (history(1, 5, 6, 7), 40),
        (history(4.5, 4.5, 4.5, 9), 30),
        (history(0.9, 5, 6, 0.8, 5, 6), None),
        (history(1, 3.9, 3.9, 3.9, 3.9), None),
        (history(3, 3, 3, 3, before=3), None),
        (history(0.2, 0.6, 0.6, 0.6, 0.6, before=0.05), None),
        (history(0.2, 1.2, 1.2, 1.2, before=0.05), 40),
        ([{"student/entropy": 1.0, "step": 0}], None),
        ([], None),
    ],
    ids=[
        "it grows",
        "at once",
        "it did not last",
        "less",
        "as before",
        "known by heart",
        "forgotten",
        "no log",
        "none",
    ],
)
def test_a_loss_that_stays_four_times_as_high_diverges(log: list[dict[str, Any]], step: int | None) -> None:
    warning = divergence(log, SFT, last_step=100)
    assert (warning is None) if step is None else (warning is not None and warning.startswith(f"step {step}: "))


@pytest.mark.parametrize(("last_step", "warns"), [(20, True), (30, False)])
def test_a_run_is_judged_by_its_last_log_too(last_step: int, warns: bool) -> None:
    assert (divergence(history(5, 6), SFT, last_step) is not None) == warns
    assert (divergence(history(1, 6), SFT, last_step) is not None) == warns
    assert divergence(history(6, 1), SFT, last_step) is None


def test_a_run_that_resumed_before_its_first_log_is_compared_with_that_log() -> None:
    log = [{"loss": loss, "nll/chosen": loss, "step": step} for step, loss in enumerate((1.0, 5.0, 5.0, 5.0), 3)]
    warning = divergence(log, SFT, 100)
    assert warning == (
        "step 6: the loss is 5, 5 times the 1 of the first step: the training diverges; start anew with a lower "
        "--learning-rate, or a lower --max-grad-norm"
    )


def test_the_advantage_term_does_not_count() -> None:
    terms = {"nll/chosen": 3.0, "kl/sampled": 1.0, "advantage/sampled": -20.0}
    log: list[dict[str, Any]] = [{"loss": -5.0, "step": step} | terms for step in (10, 20, 30)]
    warning = divergence([log[0] | {BEFORE: 1.0}, *log[1:]], ADPA, 100)
    assert warning is not None
    assert warning.startswith("step 30: the loss without its advantage term is 5, 5 times the 1 of the first step")
    assert divergence([log[0] | {BEFORE: 2.0}, *log[1:]], ADPA, 100) is None


def train(few_words: Filled, output: Path, objective: Any, **options: Any) -> DistillReport:
    own: dict[str, Any] = {"batch_size": 4, "max_steps": 12, "warmup_steps": 0, "logging_steps": 2}
    return distill(objective, str(few_words.models.student), few_words.cache, output, **own | options)


def test_the_first_log_has_the_loss_of_the_untrained_student(few_words: Filled, tmp_path: Path) -> None:
    options: dict[str, Any] = {"learning_rate": 1e-2, "kl_weight": 0.5, "max_steps": 5}
    train(few_words, tmp_path / "often", "adpa", logging_steps=1, **options)
    train(few_words, tmp_path / "rarely", "adpa", logging_steps=3, **options)
    often, rarely = (json.loads((tmp_path / name / "adpa.json").read_text())["losses"] for name in ("often", "rarely"))
    first = often[0]
    assert first[BEFORE] == pytest.approx(first["nll/chosen"] + 0.5 * first["kl/sampled"])
    assert rarely[0][BEFORE] == first[BEFORE]
    assert not any(BEFORE in log for log in (*often[1:], *rarely[1:]))


@pytest.mark.parametrize(("objective", "options"), [("sft", {}), ("dckd", {}), ("adpa", {"logging_steps": 6})])
def test_far_too_high_a_rate_warns_once(
    objective: str, options: Any, few_words: Filled, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "adpa"):
        report = train(few_words, tmp_path / "out", objective, learning_rate=3.0, **options)
    (warning,) = report.warnings
    assert "times the " in warning
    assert warning.endswith("start anew with a lower --learning-rate, or a lower --max-grad-norm")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("adpa")] == [warning]
    assert json.loads((tmp_path / "out" / "adpa.json").read_text())["warnings"] == [warning]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sft", "kd", "dckd", "adpa"])
def test_a_healthy_run_of_small_batches_warns_of_nothing(objective: str, few_words: Filled, tmp_path: Path) -> None:
    report = train(few_words, tmp_path, objective, learning_rate=3e-3, batch_size=1, logging_steps=1, max_steps=24)
    assert report.warnings == []
