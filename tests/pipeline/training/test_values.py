"""The numbers of a run, and that a wrong one is refused in one line before torch is imported."""

from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
from tests.commands import refusals

from adpa.errors import OptionError
from adpa.pipeline.option_checks import Range
from adpa.pipeline.training.values import RANGES, check_values

DISTILL = "distill --objective dckd --student S --cache C --output O"
REFUSED = {
    "--logging-steps -1": "--logging-steps -1; expected at least 1",
    "--logging-steps 0": "--logging-steps 0; expected at least 1",
    "--save-steps -1": "--save-steps -1; expected at least 0",
    "--seed -1": "--seed -1; expected at least 0",
    "--seed 4294967296": "--seed 4294967296; expected at most 4294967295",
    "--warmup-steps -1": "--warmup-steps -1; expected at least 0",
    "--warmup-steps inf": "--warmup-steps inf; expected a finite number",
    "--warmup-steps 2.5": "--warmup-steps 2.5; expected a whole number, or a share of all steps below 1",
    "--kl-weight -1": "--kl-weight -1; expected 0 or more",
    "--kl-weight nan": "--kl-weight nan; expected 0 or more",
    "--kl-weight inf": "--kl-weight inf; expected a finite number",
    "--advantage-weight inf": "--advantage-weight inf; expected a finite number",
    "--plausibility nan": "--plausibility nan; expected at least 0 and less than 1",
    "--learning-rate 0": "--learning-rate 0; expected more than 0",
    "--learning-rate nan": "--learning-rate nan; expected more than 0",
    "--learning-rate inf": "--learning-rate inf; expected a finite number",
    "--num-train-epochs 0": "--num-train-epochs 0; expected more than 0",
    "--num-train-epochs nan": "--num-train-epochs nan; expected more than 0",
    "--max-steps 0": "--max-steps 0; expected at least 1; leave it out for no limit",
    "--max-steps -2": "--max-steps -2; expected at least 1; leave it out for no limit",
    "--max-steps 9999999999": "--max-steps 9999999999; expected at most 2147483647; leave it out for no limit",
    "--batch-size 0": "--batch-size 0; expected at least 1",
    "--micro-batch-size -4": "--micro-batch-size -4; expected at least 1",
    "--weight-decay -0.1": "--weight-decay -0.1; expected 0 or more",
    "--max-grad-norm inf": "--max-grad-norm inf; expected a finite number",
    "--lora-rank 0": "--lora-rank 0; expected at least 1",
    "--lora-rank -8": "--lora-rank -8; expected at least 1",
    "--lora-target q_proj": "--lora-target without --lora-rank; add a rank, such as --lora-rank 16",
    "--dtype float16": "--dtype float16 loses small gradients in the loss head; use --bf16, or --dtype float32",
    "--device gpu": "--device gpu; expected auto, cpu or cuda; choose a GPU by CUDA_VISIBLE_DEVICES",
}
LAB = {
    "lab --output O --workers 0": "--workers 0; expected at least 1",
    "lab --output O --seed -1": "--seed: [-1]; expected a list of numbers of at least 0 and at most 4294967295",
    "lab --output O --seed 3 --seed 3": "--seed: seed 3 occurs twice; name every seed once",
    "lab --output .": "--output .: not empty, and no study; name another directory",
}


def test_a_number_without_a_meaning_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    commands = [f"{DISTILL} {words}" for words in REFUSED]
    lines = [f"adpa: {line}\n" for line in (*REFUSED.values(), *LAB.values())]
    assert refusals([*commands, *LAB], tmp_path) == lines


@pytest.mark.parametrize(
    "value", [{"seed": 2**32 - 1}, {"max_steps": -1}, {"warmup_steps": 0.3}, {"warmup_steps": 7}, {"kl_weight": None}]
)
def test_the_ends_of_a_range_are_in_it(value: dict[str, Any]) -> None:
    check_values(value)


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("value", [nan, -inf, "many", True])
def test_no_option_takes_what_is_no_number(name: str, value: Any) -> None:
    option = f"--{name.replace('_', '-')} "
    with pytest.raises(OptionError, match=f"^{option}"):
        check_values({name: value})


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
