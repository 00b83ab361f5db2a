"""The range of every number of a training run. On the command line: ``tests/pipeline/test_mistakes.py``."""

from math import inf, nan
from typing import Any

import pytest

from adpa.errors import OptionError
from adpa.pipeline.option_checks import Range
from adpa.pipeline.training.ranges import RANGES, check_ranges

REFUSED = [
    ({"logging_steps": -1}, "--logging-steps -1; expected at least 1"),
    ({"logging_steps": 0}, "--logging-steps 0; expected at least 1"),
    ({"save_steps": -1}, "--save-steps -1; expected at least 0"),
    ({"seed": -1}, "--seed -1; expected at least 0"),
    ({"seed": 2**32}, "--seed 4294967296; expected at most 4294967295"),
    ({"warmup_steps": -1}, "--warmup-steps -1; expected at least 0"),
    ({"warmup_steps": inf}, "--warmup-steps inf; expected a finite number"),
    ({"warmup_steps": 2.5}, "--warmup-steps 2.5; expected a whole number, or a share of all steps below 1"),
    ({"kl_weight": -1}, "--kl-weight -1; expected 0 or more"),
    ({"kl_weight": nan}, "--kl-weight nan; expected 0 or more"),
    ({"kl_weight": inf}, "--kl-weight inf; expected a finite number"),
    ({"advantage_weight": inf}, "--advantage-weight inf; expected a finite number"),
    ({"plausibility": nan}, "--plausibility nan; expected at least 0 and less than 1"),
    ({"learning_rate": 0}, "--learning-rate 0; expected more than 0"),
    ({"learning_rate": nan}, "--learning-rate nan; expected more than 0"),
    ({"learning_rate": inf}, "--learning-rate inf; expected a finite number"),
    ({"num_train_epochs": 0}, "--num-train-epochs 0; expected more than 0"),
    ({"num_train_epochs": nan}, "--num-train-epochs nan; expected more than 0"),
    ({"max_steps": 0}, "--max-steps 0; expected at least 1; leave it out for no limit"),
    ({"max_steps": -2}, "--max-steps -2; expected at least 1; leave it out for no limit"),
    ({"max_steps": 9999999999}, "--max-steps 9999999999; expected at most 2147483647; leave it out for no limit"),
    ({"batch_size": 0}, "--batch-size 0; expected at least 1"),
    ({"micro_batch_size": -4}, "--micro-batch-size -4; expected at least 1"),
    ({"weight_decay": -0.1}, "--weight-decay -0.1; expected 0 or more"),
    ({"max_grad_norm": inf}, "--max-grad-norm inf; expected a finite number"),
    ({"lora_rank": 0}, "--lora-rank 0; expected at least 1"),
    ({"lora_rank": -8}, "--lora-rank -8; expected at least 1"),
]


@pytest.mark.parametrize(("value", "message"), REFUSED)
def test_a_number_without_a_meaning_is_refused(value: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        check_ranges(value)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "value", [{"seed": 2**32 - 1}, {"max_steps": -1}, {"warmup_steps": 0.3}, {"warmup_steps": 7}, {"kl_weight": None}]
)
def test_the_ends_of_a_range_are_in_it(value: dict[str, Any]) -> None:
    check_ranges(value)


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("value", [nan, -inf, "many", True])
def test_no_option_takes_what_is_no_number(name: str, value: Any) -> None:
    option = f"--{name.replace('_', '-')} "
    with pytest.raises(OptionError, match=f"^{option}"):
        check_ranges({name: value})


@pytest.mark.parametrize(
    ("bounds", "value", "expected"),
    [
        (Range(above=True), 0, "more than 0"),
        (Range(0, 1), 1.5, "at least 0 and at most 1"),
        (Range(0, 2e-5, below=True), 1, "at least 0 and less than 2e-05"),
        (Range(1, whole=True), 1.5, "a whole number"),
    ],
)
def test_a_range_says_what_it_expects(bounds: Range, value: float, expected: str) -> None:
    with pytest.raises(OptionError) as caught:
        bounds.check("x", value)
    assert str(caught.value) == f"x {value:g}; expected {expected}"
