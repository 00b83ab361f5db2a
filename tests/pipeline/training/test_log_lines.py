"""The lines of a run: what they say, their width, and that a terminal does not change them."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.conftest import Filled
from transformers import TrainerControl, TrainerState, TrainingArguments

from adpa import distill
from adpa.pipeline.training.log_lines import LogLines, _duration, _number
from adpa.pipeline.training.objectives import objective_terms


def train(filled: Filled, output: Path, objective: Any = "dckd", **options: Any) -> None:
    brief: dict[str, Any] = {"batch_size": 2, "max_steps": 4, "logging_steps": 2, "learning_rate": 1e-3}
    distill(objective, str(filled.models.student), filled.cache, output, **brief | options)


def test_a_log_and_an_evaluation_are_a_line_each(
    few_words: Filled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(few_words, tmp_path / "out", validation="0.3", eval_steps=3, micro_batch_size=1)
    printed = capsys.readouterr()
    assert printed.out == ""
    masked = [re.sub(r"\d+\.\d{3}|\d\.\de-\d\d|(?<=  )[\d,]{3,}|\d:\d\d", "*", line) for line in own_lines(printed.err)]
    assert [re.sub(" +", " ", line) for line in masked] == [
        "5 examples to train on, 3 held out",
        " nll kl kl",
        "step loss chosen chosen rejected rate tokens/s left",
        " 2/4 * * * * * * *",
        " 3/4 * * * * * * *",
        " 3/4 * * * * held out",
        " 4/4 * * * * * * *",
        " 4/4 * * * * held out, lowest so far",
    ]


def own_lines(text: str) -> list[str]:
    """The lines of a run, without the bars of other packages."""
    return [line for line in text.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]


@pytest.mark.slow
def test_the_lines_are_the_same_in_a_terminal_and_after_resuming(
    few_words: Filled, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def numbers(text: str) -> list[str]:
        """Without speed and time."""
        return [line[:38] for line in own_lines(text) if re.match(r" *\d/4 ", line)]

    train(few_words, tmp_path / "out", save_steps=2)
    plain = numbers(capsys.readouterr().err)
    assert len(plain) == 2
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train(few_words, tmp_path / "terminal", save_steps=2)
    assert numbers(capsys.readouterr().err) == plain
    (tmp_path / "out" / "checkpoint-4").rename(tmp_path / "gone")
    train(few_words, tmp_path / "out", save_steps=2, resume_from_checkpoint="last")
    assert numbers(capsys.readouterr().err) == plain[1:]


@pytest.mark.parametrize("objective", ["sft", "kd", "dckd", "adpa"])
def test_the_lines_of_every_objective_fit_80_columns(
    objective: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a long run, with large numbers, every term and a slow machine."""
    terms = objective_terms(objective, None, None if objective == "sft" else 0.3, 0.5)
    keys = [f"{term}/{name}" for name, each in terms.items() for term, weight in each._asdict().items() if weight]
    lines, arguments = (
        LogLines(keys, "1,960,000 examples to train on, 40,000 held out"),
        TrainingArguments(str(tmp_path)),
    )
    state, control = TrainerState(global_step=98_000, max_steps=99_999), TrainerControl()
    lines.on_step_begin(arguments, state, control)
    state.global_step += 1
    numbers = dict.fromkeys(("loss", *keys), -123.456)
    lines.on_log(arguments, state, control, logs={**numbers, "learning_rate": 1.234e-05, "tokens_per_second": 123456.7})
    lines.on_log(arguments, state, control, logs={f"eval_{key}": number for key, number in numbers.items()})
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 5
    assert max(map(len, printed)) <= 80
    assert printed[3].split()[:2] == ["98001/99999", "-123.456"]


def test_logs_that_are_not_of_training_print_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, state, control = TrainingArguments(str(tmp_path)), TrainerState(max_steps=4), TrainerControl()
    lines = LogLines(["nll/chosen"], "")
    lines.on_log(arguments, state, control, logs={"student/entropy": 1.0})
    lines.on_log(arguments, state, control, logs={"train_runtime": 3.0, "train_loss": 1.0})
    state.is_world_process_zero = False
    lines.on_log(arguments, state, control, logs={"eval_loss": 1.0, "eval_nll/chosen": 1.0})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (61, "1:01"), (3599, "59:59"), (3600, "1:00:00"), (359_999, "99:59:59"),
    (360_000, "4 days")],
)  # fmt: skip
def test_the_time_that_is_left(seconds: int, text: str) -> None:
    assert _duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(1.23456, "1.235"), (-0.00012, "0.000"), (123456.0, "1.23e+05")])
def test_numbers_have_three_digits_behind_the_point(value: float, text: str) -> None:
    assert _number(value) == text
