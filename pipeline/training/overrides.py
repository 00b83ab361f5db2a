"""``--set key=value``: fields of transformers.TrainingArguments, checked against its source. Imports no torch."""

import ast
import json
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from adpa.errors import OptionError, did_you_mean
from adpa.pipeline.option_checks import AT_LEAST_0, COUNT, COUNT_OR_0, MORE_THAN_0, SHARE_BELOW_1
from adpa.pipeline.training.validation_settings import OWN_FIELDS
from adpa.yaml_options import as_number

_BATCHES = "--batch-size sets the examples of a step, and --micro-batch-size says how many fit in memory at a time"
_EVALUATION = "--validation and --eval-steps say when to evaluate, and losses are computed as in training"
_BEST = "the best student is the one with the lowest loss on held-out examples"
_ORDER = "every example is in one step of an epoch, in an order that --seed fixes"
# Fields of TrainingArguments that adpa sets itself, so that a step does not depend on micro-batches and ranks.
OWN_ARGUMENTS = {
    "output_dir": "--output says where",
    "use_cpu": "--device says where",
    "fp16": "float16 loses small gradients in the loss head",
    "save_only_model": "a run could not resume from such a checkpoint",
    "remove_unused_columns": "a batch has columns that no model's forward names",
    "logging_nan_inf_filter": "it would hide a loss that is not finite",
    "disable_tqdm": "a terminal shows a progress bar",
    "average_tokens_across_devices": "losses are means over the tokens of all ranks",
    "per_device_train_batch_size": _BATCHES,
    "gradient_accumulation_steps": _BATCHES,
    "auto_find_batch_size": _BATCHES,
    "train_sampling_strategy": _ORDER,
    "dataloader_drop_last": _ORDER,
    "data_seed": _ORDER,
    "accelerator_config": _ORDER,
    "ignore_data_skip": _ORDER,
    "parallelism_config": "fsdp or deepspeed shards a student over ranks",
    "label_smoothing_factor": "losses are adpa's own",
    "eval_strategy": _EVALUATION,
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "resume_from_checkpoint": "--resume-from-checkpoint says it",
}
# The ranges of fields that are numbers; the others are 0 or more.
FIELD_RANGES = {
    "adam_beta1": SHARE_BELOW_1,
    "adam_beta2": SHARE_BELOW_1,
    "adam_epsilon": MORE_THAN_0,
    "neftune_noise_alpha": MORE_THAN_0,
    "save_total_limit": COUNT,
    "per_device_eval_batch_size": COUNT,
    "torch_empty_cache_steps": COUNT,
    "dataloader_num_workers": COUNT_OR_0,
    "dataloader_prefetch_factor": COUNT,
    "ddp_bucket_cap_mb": COUNT,
    "ddp_timeout": COUNT,
}
FILES = ("deepspeed", "fsdp_config")  # a mapping, or the JSON file that has it
MAPPINGS = (*FILES, "lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "liger_kernel_config")


def read_overrides(overrides: Sequence[str], options: Collection[str]) -> dict[str, Any]:
    """The values of ``--set key=value``, by key.

    Args:
        overrides: key=value of each.
        options: the options of ``distill``, which set fields themselves.

    Raises:
        OptionError: no such field, adpa sets it itself, it is there twice, or its value is of another kind.
    """
    values: dict[str, Any] = {}
    own = {name: _EVALUATION for name in field_types() if "eval" in name and name not in OWN_FIELDS}
    own |= {name: f"{_option(name)} says it" for name in options} | OWN_ARGUMENTS
    for override in overrides:
        key, equals, text = (part.strip() for part in override.partition("="))
        if not (key and equals and text):
            raise OptionError(
                f"--set {override or repr(override)}; expected key=value with a field of transformers.TrainingArguments"
            )
        if key in own:
            raise OptionError(f"--set {override}: {own[key]}", "leave it out")
        if key not in field_types():
            nearest = did_you_mean(key, field_types() - own.keys())
            if not nearest and (near := get_close_matches(key, options, n=1, cutoff=0.65)):
                nearest = f"did you mean {_option(near[0])}?"
            raise OptionError(
                f"--set {override}: transformers.TrainingArguments has no field {key!r}",
                nearest or "name one of its fields",
            )
        if key in values:
            raise OptionError(f"--set {override}: {key} is there twice", "set it once")
        values[key] = _read(override, key, text)
    return values


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@cache
def field_types() -> dict[str, str]:
    """The fields of TrainingArguments with their types, from its source: importing it takes seconds."""
    body = _classes("training_args")["TrainingArguments"].body
    return {ast.unparse(node.target): ast.unparse(node.annotation) for node in body if isinstance(node, ast.AnnAssign)}


def choices(field: str) -> list[str]:
    """The values of a field whose type is an enumeration; empty for any other field."""
    name = field_types()[field].partition(" ")[0]
    classes = _classes("training_args") | _classes("trainer_utils")
    body = classes[name].body if name in classes else []
    return [ast.literal_eval(node.value) for node in body if isinstance(node, ast.Assign)]


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).with_name(f"{module}.py").read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _read(override: str, key: str, text: str) -> Any:
    """The value of a field, of its own type."""
    where, types = f"--set {key}={text}", field_types()[key].split(" | ")
    if known := choices(key):
        return _choose(key, text, known)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "cannot be read"
        raise OptionError(f"--set {override}: no YAML: {problem}", "quote the value, or close its brackets") from error
    value = _with_numbers(value)
    if key == "deepspeed" and find_spec("deepspeed") is None:
        raise OptionError("--set deepspeed without DeepSpeed", "pip install deepspeed")
    if value is None and "None" in types:
        return None
    if key in MAPPINGS:
        return _read_mapping(where, key, value)
    if isinstance(value, bool) and ("bool" in types or key == "fsdp"):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and {"int", "float"} & {*types}:
        whole = "float" not in types
        number = int(value) if whole and value == value // 1 else value
        if whole and not isinstance(number, int):
            raise OptionError(f"{where}; expected a whole number")
        FIELD_RANGES.get(key, AT_LEAST_0).check(f"--set {key}=", number)
        return number
    if isinstance(value, list) and any(each.startswith("list") for each in types):
        return value
    if "str" in types and not isinstance(value, list | dict):
        return value if isinstance(value, str) else text
    raise OptionError(f"{where}; expected {_expected(types)}")


def _choose(key: str, text: str, known: Sequence[str]) -> str:
    name = text.strip("'\"").lower()
    if name not in known:
        nearest = did_you_mean(name, known)
        listed = "" if nearest else f"; expected one of {', '.join(known)}"
        raise OptionError(f"--set {key}={text}: no such value{listed}", nearest)
    return name


def _with_numbers(value: Any) -> Any:
    """A value of YAML in which 1e-6 is a number, in mappings too."""
    if isinstance(value, dict):
        return {name: _with_numbers(each) for name, each in value.items()}
    return as_number(value)


def _read_mapping(where: str, key: str, value: Any) -> Any:
    if isinstance(value, str) and key in FILES:
        try:
            found = json.loads(Path(value).expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            problem = error.strerror or type(error).__name__
            raise OptionError(f"{where}: cannot be read: {problem}", "name a JSON file") from error
        except ValueError as error:
            raise OptionError(f"{where}: no JSON: {error}", "name a JSON file") from error
        if isinstance(found, dict):
            return str(Path(value).expanduser())
        raise OptionError(f"{where}: its JSON is no object", "name a file with {…}")
    if not isinstance(value, dict):
        raise OptionError(f"{where}; expected a mapping" + (" or a JSON file" if key in FILES else ""), "write {a: b}")
    return value


def _expected(types: Sequence[str]) -> str:
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    named = [words[each] for each in types if each in words]
    named += ["a list"] * any(each.startswith("list") for each in types)
    return " or ".join(dict.fromkeys(named)) or "null"
