"""The options of held-out examples: what they make of Trainer's arguments, and what is refused before torch."""

from pathlib import Path
from typing import Any

import pytest
from tests.commands import refusals

from adpa.errors import OptionError
from adpa.pipeline.training.validation_settings import validation_arguments, validation_settings

DISTILL = "distill --objective dckd --student S --cache C --output O"
SHARE = "expected more than 0 and less than 1; give a share of the examples, such as 0.02"
LEAVE_OUT = "without --validation, which holds out the examples to evaluate on; add --validation 0.02, or leave it out"
BEST = "--load-best-model-at-end saves a checkpoint at each evaluation"
REFUSED = {
    "--validation 0": f"--validation 0; {SHARE}",
    "--validation 1": f"--validation 1; {SHARE}",
    "--validation 1.5": f"--validation 1.5; {SHARE}",
    "--validation 50": f"--validation 50; {SHARE}",
    "--validation -0.1": f"--validation -0.1; {SHARE}",
    "--validation nan": f"--validation nan; {SHARE}",
    "--validation inf": f"--validation inf; {SHARE}",
    "--validation=": "--validation '': an empty value; write one, or leave the option out",
    "--eval-steps 5": f"--eval-steps 5 {LEAVE_OUT}",
    "--early-stopping-patience 2": f"--early-stopping-patience 2 {LEAVE_OUT}",
    "--load-best-model-at-end": f"--load-best-model-at-end {LEAVE_OUT}",
    "--validation 0.1 --eval-steps 0": "--eval-steps 0; expected at least 1",
    "--validation 0.1 --eval-steps 1.5": "--eval-steps 1.5; expected a whole number",
    "--validation 0.1 --early-stopping-patience 0": "--early-stopping-patience 0; expected at least 1",
    "--validation 0.1 --load-best-model-at-end --save-steps 4": f"--save-steps 4: {BEST}, at the end of each epoch "
    "without --eval-steps; add --eval-steps 4, or leave --save-steps out",
    "--validation 0.1 --load-best-model-at-end --save-steps 4 --eval-steps 2": f"--save-steps 4 and --eval-steps 2: "
    f"{BEST}; give both the same number, or leave --save-steps out",
    "--validation 0.1 --load-best-model-at-end --set save_strategy=no": f"--set save_strategy=no: {BEST}; leave it out",
    "--validation 0.1 --load-best-model-at-end --eval-steps 2 --set save_strategy=epoch": f"--set save_strategy=epoch: "
    f"{BEST}; leave it out",
    "--set save_strategy=best": "--set save_strategy=best without --validation; add --validation 0.02, or leave it out",
    "--set eval_on_start=true": "--set eval_on_start=True without --validation; add --validation 0.02, or leave it out",
    "--validation 0.1 --set eval_strategy=steps": "--set eval_strategy=steps: --validation and --eval-steps say when "
    "to evaluate, and losses are computed as in training; leave it out",
    "--validation 0.1 --set metric_for_best_model=loss": "--set metric_for_best_model=loss: the best student is the "
    "one with the lowest loss on held-out examples; leave it out",
    "--validation 0.1 --set load_best_model_at_end=true": "--set load_best_model_at_end=true: --load-best-model-at-end "
    "says it; leave it out",
    "--validation 0.1 --set per_device_eval_batch_size=0": "--set per_device_eval_batch_size=0; expected at least 1",
}


def test_options_that_contradict_are_one_line_before_torch_is_imported(tmp_path: Path) -> None:
    said = refusals([f"{DISTILL} {words}" for words in REFUSED], tmp_path)
    assert said == [f"adpa: {line}\n" for line in REFUSED.values()]


def arguments(save_steps: int = 0, overrides: dict[str, Any] = {}, **options: Any) -> dict[str, Any]:  # noqa: B006
    given: dict[str, Any] = {"eval_steps": None, "patience": None, "keep_best": False, **options}
    return validation_arguments(validation_settings("0.1", **given), 2, save_steps, overrides)


def test_examples_are_evaluated_after_each_epoch_or_so_many_steps() -> None:
    assert arguments()["eval_strategy"] == "epoch"
    made = arguments(eval_steps=5)
    assert (made["eval_strategy"], made["eval_steps"], made["per_device_eval_batch_size"]) == ("steps", 5, 8)
    assert "save_strategy" not in made


def test_the_best_student_needs_a_checkpoint_at_each_evaluation() -> None:
    saving = ("save_strategy", "save_steps", "save_total_limit")
    made = arguments(keep_best=True, eval_steps=5)
    assert [made.get(name) for name in saving] == ["steps", 5, 1]
    made = arguments(keep_best=True)
    assert [made.get(name) for name in saving] == ["epoch", None, 1]
    made = arguments(keep_best=True, eval_steps=5, save_steps=5)
    assert [made.get(name) for name in saving] == ["steps", 5, None]
    made = arguments(keep_best=True, overrides={"save_strategy": "best"})
    assert made["load_best_model_at_end"]


@pytest.mark.parametrize("value", ["0.02", 0.02, "2e-2", " 0.02 "])
def test_a_number_is_a_share(value: Any) -> None:
    settings = validation_settings(value, None, None, False)
    assert settings is not None
    assert (settings.share, settings.data) == (0.02, None)


@pytest.mark.parametrize("value", ["test.jsonl", "org/name", "chosen-12ab,rejected-34cd", "2%"])
def test_anything_else_names_data(value: str) -> None:
    settings = validation_settings(value, None, None, False)
    assert settings is not None
    assert (settings.share, settings.data) == (None, value)


@pytest.mark.parametrize("value", [float("nan"), 0.0, 1.0, -1])
def test_the_same_shares_are_refused_in_python(value: Any) -> None:
    with pytest.raises(OptionError, match="--validation"):
        validation_settings(value, None, None, False)
