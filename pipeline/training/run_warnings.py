"""Warnings of a run before its first step: options that do little or nothing with this data. Imports no torch."""

import math
from collections.abc import Mapping
from typing import Any

from adpa.data.cache.responses import ResponseName
from adpa.pipeline.training.objectives import TermWeights
from adpa.pipeline.training.ranges import NO_LIMIT
from adpa.pipeline.training.schedules import NO_WARMUP


def number_of_steps(examples: int, batch_size: int, num_train_epochs: float, max_steps: int) -> int:
    """The optimizer steps of a run; the last step of an epoch takes the rest of its examples."""
    return max_steps if max_steps > 0 else math.ceil(num_train_epochs * math.ceil(examples / batch_size))


def number_of_warmup_steps(steps: int, warmup_steps: float) -> int:
    """The steps of warm-up among all steps; below 1, ``warmup_steps`` is a share of them."""
    return int(warmup_steps) if warmup_steps >= 1 else math.ceil(steps * warmup_steps)


def length_warnings(examples: int, chosen: Mapping[str, Any], usual: Mapping[str, Any]) -> list[str]:
    """Warnings of options that do not fit the length of the run.

    Args:
        examples: number of examples.
        chosen: the options of ``distill``.
        usual: their defaults; a default raises no warning.
    """
    warnings = []
    batch_size, max_steps, epochs = (chosen[name] for name in ("batch_size", "max_steps", "num_train_epochs"))
    steps = number_of_steps(examples, batch_size, epochs, max_steps)
    run = f"the run has {_count(steps, 'step')}"
    if batch_size > examples:
        warnings.append(
            f"--batch-size {batch_size}: more than the {_count(examples, 'example')}; every step takes all of them, "
            f"and {run}"
        )
    if max_steps != NO_LIMIT and epochs != usual["num_train_epochs"]:
        warnings.append(f"--num-train-epochs {epochs:g} has no effect beside --max-steps {max_steps}")
    warmup_steps, schedule = chosen["warmup_steps"], chosen["lr_scheduler_type"]
    if schedule in NO_WARMUP:
        if warmup_steps not in (0, usual["warmup_steps"]):
            warnings.append(
                f"--warmup-steps {warmup_steps:g} has no effect with --lr-scheduler-type {schedule}; "
                "constant_with_warmup has a warm-up"
            )
    elif (warmup := number_of_warmup_steps(steps, warmup_steps)) >= steps:
        highest = chosen["learning_rate"] * (steps - 1) / warmup
        nothing = "the learning rate is 0 and nothing is learnt; lower --batch-size, or pass --warmup-steps 0"
        reached = f"the learning rate reaches {highest:.2g} at most" if highest else nothing
        warnings.append(
            f"--warmup-steps {warmup_steps:g}: the warm-up takes {_count(warmup, 'step')}, and {run}: {reached}"
        )
    evaluated_before = chosen["eval_steps"] and chosen["eval_steps"] < steps  # each evaluation has a log
    if usual["logging_steps"] != chosen["logging_steps"] > steps and not evaluated_before:
        warnings.append(f"--logging-steps {chosen['logging_steps']}: {run}; only the last one is logged")
    if chosen["validation"] is not None:
        evaluations = math.ceil(steps / (chosen["eval_steps"] or math.ceil(examples / batch_size)))
        warnings += _evaluation_warnings(steps, evaluations, chosen)
    if chosen["save_steps"] > steps:
        warnings.append(
            f"--save-steps {chosen['save_steps']}: {run}; the only checkpoint is that of the last one, and a run that "
            "stops before it begins anew"
        )
    return warnings


def _evaluation_warnings(steps: int, evaluations: int, chosen: Mapping[str, Any]) -> list[str]:
    warnings = []
    eval_steps, patience = chosen["eval_steps"], chosen["early_stopping_patience"]
    if eval_steps and eval_steps > steps:
        warnings.append(f"--eval-steps {eval_steps}: the run has {_count(steps, 'step')}; only the last is evaluated")
    if patience and patience >= evaluations - 1:
        warnings.append(
            f"--early-stopping-patience {patience} has no effect: the run has {_count(evaluations, 'evaluation')}, and "
            f"can stop at evaluation {patience + 1:,} at the earliest"
        )
    return warnings


def unused_warnings(
    terms: Mapping[ResponseName, TermWeights], chosen: Mapping[str, Any], usual: Mapping[str, Any]
) -> list[str]:
    """The options of the loss that have no effect on these terms."""
    warnings = []
    if chosen["objective"] != "sft" and not any(each.kl or each.advantage for each in terms.values()):
        warnings.append(
            f"the weights of {chosen['objective']}'s terms are 0: the run is sft, and learns nothing from the teacher"
        )
    if not any(each.advantage for each in terms.values()):
        for name in ("advantage_weight", "plausibility"):
            if chosen[name] not in (0, usual[name]):
                option = f"--{name.replace('_', '-')} {chosen[name]:g}"
                warnings.append(f"{option} has no effect: the loss has no advantage term")
    return warnings


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"
