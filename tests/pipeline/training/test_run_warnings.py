"""What is said of a run before its first step, and gone on with."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.conftest import Filled

from adpa import distill
from adpa.pipeline.training.objectives import TermWeights
from adpa.pipeline.training.run_warnings import length_warnings, unused_warnings

USUAL: dict[str, Any] = {
    "batch_size": 32,
    "max_steps": -1,
    "num_train_epochs": 1.0,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "logging_steps": 10,
    "save_steps": 0,
    "validation": None,
    "eval_steps": None,
    "early_stopping_patience": None,
    "advantage_weight": 0.5,
    "plausibility": 0.05,
}
ONE_STEP = (
    "the run has 1 step: the learning rate is 0 and nothing is learnt; lower --batch-size, or pass --warmup-steps 0"
)
FULL_STEP = "--batch-size 1000: more than the 60 examples; every step takes all of them, and the run has "


@pytest.mark.parametrize(
    ("options", "warnings"),
    [
        ({}, []),
        ({"batch_size": 60, "num_train_epochs": 20}, []),
        ({"batch_size": 1000, "num_train_epochs": 30}, [f"{FULL_STEP}30 steps"]),
        (
            {"batch_size": 1000},
            [
                f"{FULL_STEP}1 step",
                f"--warmup-steps 0.1: the warm-up takes 1 step, and {ONE_STEP}",
            ],
        ),
        (
            {"warmup_steps": 50, "max_steps": 11},
            [
                "--warmup-steps 50: the warm-up takes 50 steps, and the run has 11 steps: "
                "the learning rate reaches 0.0002 at most"
            ],
        ),
        (
            {"warmup_steps": 5, "lr_scheduler_type": "constant"},
            [
                "--warmup-steps 5 has no effect with --lr-scheduler-type constant; constant_with_warmup has a warm-up",
            ],
        ),
        ({"lr_scheduler_type": "constant"}, []),
        (
            {"max_steps": 20, "num_train_epochs": 3.0},
            ["--num-train-epochs 3 has no effect beside --max-steps 20"],
        ),
        ({"logging_steps": 100}, ["--logging-steps 100: the run has 2 steps; only the last one is logged"]),
        ({"logging_steps": 100, "validation": "0.1", "eval_steps": 1}, []),  # each evaluated step is logged
        (
            {"save_steps": 500, "max_steps": 20},
            [
                "--save-steps 500: the run has 20 steps; the only checkpoint is that of the last one, and a run that "
                "stops before it begins anew"
            ],
        ),
    ],
)
def test_the_length_of_a_run_and_its_options(options: dict[str, Any], warnings: list[str]) -> None:
    assert length_warnings(60, USUAL | options, USUAL) == warnings


NLL, KL, ADVANTAGE = TermWeights(nll=1.0), TermWeights(kl=1.0), TermWeights(advantage=2.0)
ONLY_SFT = "the weights of kd's terms are 0: the run is sft, and learns nothing from the teacher"


@pytest.mark.parametrize(
    ("objective", "term", "options", "warnings"),
    [
        ("kd", TermWeights(), {}, [ONLY_SFT]),
        ("kd", KL, {}, []),
        ("adpa", ADVANTAGE, {"advantage_weight": 2.0, "plausibility": 0.2}, []),
        ("kd", KL, {"advantage_weight": 2.0}, ["--advantage-weight 2 has no effect: the loss has no advantage term"]),
        ("sft", NLL, {"plausibility": 0.2}, ["--plausibility 0.2 has no effect: the loss has no advantage term"]),
    ],
)
def test_options_of_terms_that_a_loss_does_not_have(
    objective: str, term: TermWeights, options: dict[str, Any], warnings: list[str]
) -> None:
    chosen = USUAL | options | {"objective": objective}
    assert unused_warnings({"chosen": NLL, "rejected": term}, chosen, USUAL) == warnings


def test_a_run_says_them_once_and_goes_on(few_words: Filled, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "adpa"):
        report = distill("sft", str(few_words.models.student), few_words.cache, tmp_path, batch_size=1000)
    assert report.steps == 1
    assert report.warnings == [
        "--batch-size 1000: more than the 8 examples; every step takes all of them, and the run has 1 step",
        f"--warmup-steps 0.1: the warm-up takes 1 step, and {ONE_STEP}",
    ]
    assert [record.getMessage() for record in caplog.records if record.name.startswith("adpa")] == report.warnings
    assert json.loads((tmp_path / "adpa.json").read_text())["warnings"] == report.warnings


def test_a_run_too_short_for_its_evaluations_is_told_so() -> None:
    usual = USUAL | {"batch_size": 4}

    def warnings(**chosen: Any) -> list[str]:
        return length_warnings(40, usual | {"validation": "0.1"} | chosen, usual)

    assert warnings() == warnings(eval_steps=10) == warnings(eval_steps=2, early_stopping_patience=3) == []
    assert warnings(early_stopping_patience=1, num_train_epochs=3.0) == []
    assert warnings(eval_steps=11) == ["--eval-steps 11: the run has 10 steps; only the last is evaluated"]
    none_left = "and can stop at evaluation 2 at the earliest"
    assert warnings(early_stopping_patience=1) == [
        f"--early-stopping-patience 1 has no effect: the run has 1 evaluation, {none_left}"
    ]
    assert warnings(early_stopping_patience=4, eval_steps=2) == [
        f"--early-stopping-patience 4 has no effect: the run has 5 evaluations, {none_left.replace('2', '5')}"
    ]
