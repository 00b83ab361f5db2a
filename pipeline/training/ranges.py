"""The numbers of a training run, each with its range. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from adpa.errors import OptionError
from adpa.pipeline.option_checks import (
    AT_LEAST_0,
    COUNT,
    COUNT_OR_0,
    LARGEST_COUNT,
    MORE_THAN_0,
    SEED,
    SHARE_BELOW_1,
    Range,
)

NO_LIMIT = -1

RANGES = {
    "kl_weight": AT_LEAST_0,
    "advantage_weight": AT_LEAST_0,
    "plausibility": SHARE_BELOW_1,
    "lora_rank": COUNT,
    "lora_alpha": Range(0, LARGEST_COUNT, above=True),
    "lora_dropout": SHARE_BELOW_1,
    "learning_rate": MORE_THAN_0,
    "num_train_epochs": Range(0, LARGEST_COUNT, above=True),
    "max_steps": Range(1, LARGEST_COUNT, whole=True, fix="leave it out for no limit"),
    "batch_size": COUNT,
    "micro_batch_size": COUNT,
    "warmup_steps": Range(0, LARGEST_COUNT),
    "weight_decay": AT_LEAST_0,
    "max_grad_norm": AT_LEAST_0,
    "seed": SEED,
    "logging_steps": COUNT,
    "save_steps": COUNT_OR_0,
}


def check_ranges(values: Mapping[str, Any]) -> None:
    """Checks the numbers among the options of ``distill``; None, and what is no number, is left to others.

    Raises:
        OptionError: a number is outside of its range.
    """
    for name, value in values.items():
        if name in RANGES and value is not None and not (name == "max_steps" and value == NO_LIMIT):
            RANGES[name].check(f"--{name.replace('_', '-')}", value)
    warmup_steps = values.get("warmup_steps", 0)
    if warmup_steps >= 1 and warmup_steps != int(warmup_steps):
        raise OptionError(f"--warmup-steps {warmup_steps:g}; expected a whole number, or a share of all steps below 1")
