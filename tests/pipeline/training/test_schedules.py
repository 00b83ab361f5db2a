"""The arguments of schedules and optimizers: known, in range and complete, or one line before any model is loaded."""

import inspect
import json
from pathlib import Path
from typing import Any, get_args

import pytest
from tests.commands import refusals
from tests.pipeline.conftest import Filled
from transformers import Trainer, TrainingArguments
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from adpa import distill
from adpa.errors import OptionError
from adpa.pipeline.training import optimizers
from adpa.pipeline.training.optimizers import check_optimizer
from adpa.pipeline.training.schedules import ARGUMENTS, SchedulerName, check_schedule

DISTILL = "distill --objective dckd --student S --cache C --output O"
IGNORED = {"constant_with_warmup"}  # transformers passes it no argument
REFUSED = {
    "--lr-scheduler-type cosine_with_min_lr": "--lr-scheduler-type cosine_with_min_lr with no smallest rate; "
    "add --set lr_scheduler_kwargs={min_lr_rate: 0.1}, a share of --learning-rate, or {min_lr: 1e-6}",
    "--set lr_scheduler_kwargs=min_lr": "--set lr_scheduler_kwargs=min_lr; expected a mapping; write {a: b}",
    "--set optim=adamw_torhc": "--set optim=adamw_torhc: no such value; did you mean adamw_torch?",
    "--set optim=sgd --set optim_args=momentun=0.9": "--set optim_args=momentun=0.9: 'momentun' with the optimizer "
    "sgd, which takes momentum, dampening, weight_decay, nesterov; did you mean momentum?",
}


def test_no_model_package_is_imported_to_refuse_them(tmp_path: Path) -> None:
    said = refusals([f"{DISTILL} {words}" for words in REFUSED], tmp_path)
    assert said == [f"adpa: {line}\n" for line in REFUSED.values()]


@pytest.mark.parametrize("name", get_args(SchedulerName))
def test_the_arguments_of_a_schedule_are_those_of_its_function(name: SchedulerName) -> None:
    functions: dict[SchedulerType, Any] = TYPE_TO_SCHEDULER_FUNCTION
    function = inspect.signature(functions[SchedulerType(name)])
    own = function.parameters.keys() - {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    assert {*ARGUMENTS[name]} == (set() if name in IGNORED else own)


@pytest.mark.parametrize(
    ("name", "arguments", "line"),
    [
        ("cosin", {}, f"--lr-scheduler-type 'cosin'; expected one of {', '.join(ARGUMENTS)}; did you mean cosine?"),
        (
            "linear",
            {"power": 2},
            "{where}: 'power' with --lr-scheduler-type linear, which takes no arguments; leave it out",
        ),
        (
            "polynomial",
            {"lr_ed": 0},
            "{where}: 'lr_ed' with --lr-scheduler-type polynomial, which takes lr_end, power; did you mean lr_end?",
        ),
        (
            "cosine_with_min_lr",
            {"min_lr": 1e-6, "min_lr_rate": 0.1},
            "--lr-scheduler-type cosine_with_min_lr with both min_lr and min_lr_rate; name one of them",
        ),
        ("cosine_with_min_lr", {"min_lr": 1}, "{where}: min_lr 1; expected at least 0 and at most 0.001"),
        ("cosine_with_min_lr", {"min_lr_rate": 2}, "{where}: min_lr_rate 2; expected at least 0 and at most 1"),
        ("polynomial", {"lr_end": 0.001}, "{where}: lr_end 0.001; expected at least 0 and less than 0.001"),
        ("polynomial", {"power": "high"}, "{where}: power 'high'; expected a number"),
        ("inverse_sqrt", {"timescale": 0}, "{where}: timescale 0; expected at least 1"),
        ("cosine", {"num_cycles": -1}, "{where}: num_cycles -1; expected more than 0"),
    ],
)
def test_arguments_of_a_schedule_are_refused(name: str, arguments: dict[str, Any], line: str) -> None:
    with pytest.raises(OptionError) as caught:
        check_schedule(name, arguments, learning_rate=1e-3)
    assert str(caught.value) == line.format(where="--set lr_scheduler_kwargs")


def test_a_rate_below_the_end_of_a_polynomial_is_refused() -> None:
    with pytest.raises(OptionError, match="ends at 1e-07, and --learning-rate 1e-08 is not above it; add --set"):
        check_schedule("polynomial", None, 1e-8)
    check_schedule("polynomial", {"lr_end": 0}, 1e-8)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("cosine_with_min_lr", "{min_lr_rate: 0.1}"),
        ("polynomial", "{lr_end: 1e-5, power: 2}"),
        ("inverse_sqrt", "{timescale: 3}"),
    ],
)
def test_a_run_has_the_schedule_that_its_arguments_say(
    name: Any, arguments: str, few_words: Filled, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"batch_size": 4, "max_steps": 4, "warmup_steps": 1, "logging_steps": 1}
    settings = [f"lr_scheduler_kwargs={arguments}"]
    student = str(few_words.models.student)
    distill(
        "sft", student, few_words.cache, tmp_path, learning_rate=1e-4, lr_scheduler_type=name, set=settings, **options
    )
    record = json.loads((tmp_path / "adpa.json").read_text())
    rates = [log["learning_rate"] for log in record["losses"]]
    expected = {
        "cosine_with_min_lr": [0, 1e-4, 7.75e-5, 3.25e-5],
        "polynomial": [0, 1e-4, 1e-5 + 9e-5 * (2 / 3) ** 2, 1e-5 + 9e-5 * (1 / 3) ** 2],
        "inverse_sqrt": [0, 1e-4, 1e-4 * (3 / 4) ** 0.5, 1e-4 * (3 / 5) ** 0.5],
    }
    assert rates == pytest.approx(expected[name], rel=1e-6)


def test_every_optimizer_is_built_in_or_has_a_package() -> None:
    packages = {name.value: next(part for part in optimizers.PACKAGES if part in name.value) for name in OptimizerNames}
    others = {name for name, part in packages.items() if part == "" and name not in optimizers.ARGUMENTS}
    bits = ("8bit", "32bit", "bnb", "ademamix")
    assert all(any(part in name for part in bits) for name in others), "the others are of bitsandbytes"
    assert optimizers.ARGUMENTS.keys() <= packages.keys()


@pytest.mark.parametrize(("name", "arguments"), optimizers.ARGUMENTS.items())
def test_an_optimizer_takes_the_arguments_that_the_table_says(name: str, arguments: tuple[str, ...]) -> None:
    def options(optim_args: str | None) -> dict[str, Any]:
        return Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(optim=name, optim_args=optim_args, use_cpu=True))[
            1
        ]

    for argument in arguments:
        value = "true" if argument in optimizers.TRUTH_VALUES else "0.125"
        assert options(f"{argument}={value}") == options(None) | {argument: True if value == "true" else 0.125}
        check_optimizer(name, f"{argument}={value}")


@pytest.mark.parametrize(
    ("name", "arguments", "line"),
    [
        (
            "adamw_torch",
            "momentum=0.9",
            "{where}momentum=0.9: 'momentum' with the optimizer adamw_torch, which takes no arguments; leave it out",
        ),
        ("sgd", "momentum", "{where}momentum: found 'momentum'; expected key=value with commas between them"),
        ("rmsprop", "alpha=0.9,", "{where}alpha=0.9,: found ''; expected key=value with commas between them"),
        ("sgd", "momentum=much", "{where}momentum=much: momentum much; expected a number"),
        ("sgd", "nesterov=maybe", "{where}nesterov=maybe: nesterov maybe; expected true or false"),
    ],
)
def test_arguments_of_an_optimizer_are_refused(name: str, arguments: str, line: str) -> None:
    with pytest.raises(OptionError) as caught:
        check_optimizer(name, arguments)
    assert str(caught.value) == line.format(where="--set optim_args=")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "galore_adamw",
            "--set optim=galore_adamw needs galore_torch, which is not installed; pip install galore-torch",
        ),
        ("lion_8bit", "--set optim=lion_8bit needs bitsandbytes, which is not installed; pip install bitsandbytes"),
        ("adamw_torch_4bit", "--set optim=adamw_torch_4bit needs torchao, which is not installed; pip install torchao"),
        ("stable_adamw", "--set optim=stable_adamw needs optimi, which is not installed; pip install torch-optimi"),
    ],
)
def test_an_optimizer_that_is_not_installed_is_named(name: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "find_spec", lambda _: None)
    with pytest.raises(OptionError) as caught:
        check_optimizer(name, None)
    assert str(caught.value) == line


def test_what_an_optimizer_itself_refuses_is_said_before_a_model_is_loaded(few_words: Filled, tmp_path: Path) -> None:
    settings = ["optim=sgd", "optim_args=nesterov=true"]
    with pytest.raises(OptionError, match=r"^--set optim=sgd: Nesterov momentum requires a momentum and zero"):
        distill("sft", str(few_words.models.student), few_words.cache, tmp_path / "out", set=settings)
