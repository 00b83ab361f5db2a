"""``--set``: every field of TrainingArguments, with values of its type, or one line."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tests.commands import refusals
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy
from transformers.training_args import OptimizerNames

from adpa.errors import OptionError
from adpa.pipeline.training.overrides import FIELD_RANGES, OWN_ARGUMENTS, choices, field_types, read_overrides

DISTILL = "distill --objective dckd --student S --cache C --output O"
FIELDS = "transformers.TrainingArguments"
REFUSED = {
    "--set adam_bta1=0.8": f"--set adam_bta1=0.8: {FIELDS} has no field 'adam_bta1'; did you mean adam_beta1?",
    "--set neftune_alpha=5": f"--set neftune_alpha=5: {FIELDS} has no field 'neftune_alpha'; "
    "did you mean neftune_noise_alpha?",
    "--set nonsense=1": f"--set nonsense=1: {FIELDS} has no field 'nonsense'; name one of its fields",
    "--set micro_batch=3": f"--set micro_batch=3: {FIELDS} has no field 'micro_batch'; "
    "did you mean --micro-batch-size?",
    "--set warmup_ratio=0.1": f"--set warmup_ratio=0.1: {FIELDS} has no field 'warmup_ratio'; "
    "did you mean --warmup-steps?",
    "--set batch_size=3": "--set batch_size=3: --batch-size says it; leave it out",
    "--set learning_rate=1": "--set learning_rate=1: --learning-rate says it; leave it out",
    "--set eval_steps=5": "--set eval_steps=5: --eval-steps says it; leave it out",
    "--set adam_beta1": f"--set adam_beta1; expected key=value with a field of {FIELDS}",
    "--set adam_beta1=": f"--set adam_beta1=; expected key=value with a field of {FIELDS}",
    "--set =0.9": f"--set =0.9; expected key=value with a field of {FIELDS}",
    "--set adam_beta1=0.8 --set adam_beta1=0.9": "--set adam_beta1=0.9: adam_beta1 is there twice; set it once",
    "--set adam_beta1=abc": "--set adam_beta1=abc; expected a number",
    "--set adam_beta1=7": "--set adam_beta1=7; expected at least 0 and less than 1",
    "--set adam_epsilon=nan": "--set adam_epsilon=nan; expected more than 0",
    "--set save_total_limit=-1": "--set save_total_limit=-1; expected at least 1",
    "--set save_total_limit=1.5": "--set save_total_limit=1.5; expected a whole number",
    "--set dataloader_num_workers=two": "--set dataloader_num_workers=two; expected a whole number",
    "--set full_determinism=maybe": "--set full_determinism=maybe; expected true or false",
    "--set run_name=[1]": "--set run_name=[1]; expected text",
    "--set logging_strategy=epcoh": "--set logging_strategy=epcoh: no such value; did you mean epoch?",
    "--set logging_strategy=x": "--set logging_strategy=x: no such value; expected one of no, steps, epoch",
    "--set fsdp_config=/no/file": "--set fsdp_config=/no/file: cannot be read: No such file or directory; "
    "name a JSON file",
    "--set fsdp_config=notes.txt": "--set fsdp_config=notes.txt: no JSON: Expecting value: line 1 column 1 (char 0); "
    "name a JSON file",
    "--set fsdp_config=list.json": "--set fsdp_config=list.json: its JSON is no object; name a file with {…}",
    "--set fsdp_config=[1]": "--set fsdp_config=[1]; expected a mapping or a JSON file; write {a: b}",
}


def test_a_field_or_value_that_does_not_exist_is_one_line_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "list.json").write_text("[1]")
    said = refusals([f"{DISTILL} {words}" for words in REFUSED], tmp_path)
    assert said == [f"adpa: {line}\n" for line in REFUSED.values()]


def test_the_fields_in_the_source_are_those_of_the_class() -> None:
    assert field_types().keys() == {field.name for field in fields(TrainingArguments)}
    assert field_types().keys() >= OWN_ARGUMENTS.keys() | FIELD_RANGES.keys()


@pytest.mark.parametrize(
    ("field", "names"),
    [
        ("optim", OptimizerNames),
        ("logging_strategy", IntervalStrategy),
        ("save_strategy", SaveStrategy),
        ("hub_strategy", HubStrategy),
        ("adam_beta1", []),
    ],
)
def test_the_values_in_the_source_are_those_of_the_enumeration(field: str, names: Any) -> None:
    assert choices(field) == [name.value for name in names]


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("adam_epsilon=1e-9", 1e-9),
        ("adam_beta1 = 0", 0),
        ("save_total_limit=1e1", 10),
        ("save_total_limit=null", None),
        ("tf32=false", False),
        ("fsdp=true", True),
        ("run_name=2024", "2024"),
        ("run_name=no", "no"),
        ("logging_strategy=no", "no"),
        ("optim=SGD", "sgd"),
        ("optim_args=momentum=0.9", "momentum=0.9"),
        ("label_names=[a, b]", ["a", "b"]),
        ("lr_scheduler_kwargs={min_lr: 1e-6}", {"min_lr": 1e-6}),
    ],
)
def test_a_value_has_the_type_of_its_field(override: str, value: Any) -> None:
    (read,) = read_overrides([override], []).values()
    assert read == value
    assert type(read) is type(value)


def test_a_value_that_is_no_yaml_is_refused() -> None:
    with pytest.raises(
        OptionError, match=r"^--set adam_beta1=\{a: \]: no YAML: expected the node content, .*close its"
    ):
        read_overrides(["adam_beta1={a: ]"], [])
