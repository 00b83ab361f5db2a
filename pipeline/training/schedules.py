"""The schedules of the learning rate and their arguments. Imports no torch."""

from collections.abc import Mapping
from typing import Any, Literal

from adpa.errors import OptionError, did_you_mean
from adpa.pipeline.option_checks import COUNT, MORE_THAN_0, Range, check_choices

SchedulerName = Literal[
    "linear", "cosine", "cosine_with_min_lr", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"
]
SMALLEST = "cosine_with_min_lr"
END = {"polynomial": 1e-7}  # transformers' default of lr_end

# The arguments that each schedule takes from ``--set lr_scheduler_kwargs``.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "constant": (),
    "constant_with_warmup": (),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
}
NO_WARMUP = ("constant",)


def check_schedule(name: str, arguments: Mapping[str, Any] | None, learning_rate: float) -> None:
    """Checks a schedule and the arguments that ``--set lr_scheduler_kwargs`` has for it.

    Raises:
        OptionError: an unknown schedule, or arguments that are unknown, missing or out of range.
    """
    check_choices({"--lr-scheduler-type": (name, SchedulerName)})
    given, where = arguments or {}, "--set lr_scheduler_kwargs"
    known = ARGUMENTS[name]
    for argument in given:
        if argument not in known:
            takes = ", ".join(known) or "no arguments"
            raise OptionError(
                f"{where}: {argument!r} with --lr-scheduler-type {name}, which takes {takes}",
                did_you_mean(str(argument), known) or "leave it out",
            )
    if name == SMALLEST and given.keys() >= {"min_lr", "min_lr_rate"}:
        raise OptionError(f"--lr-scheduler-type {name} with both min_lr and min_lr_rate", "name one of them")
    if name == SMALLEST and not given.keys() & {"min_lr", "min_lr_rate"}:
        raise OptionError(
            f"--lr-scheduler-type {name} with no smallest rate",
            f"add {where}={{min_lr_rate: 0.1}}, a share of --learning-rate, or {{min_lr: 1e-6}}",
        )
    ranges = {
        "num_cycles": MORE_THAN_0,
        "min_lr": Range(0, learning_rate),
        "min_lr_rate": Range(0, 1),
        "lr_end": Range(0, learning_rate, below=True),
        "power": MORE_THAN_0,
        "timescale": COUNT,
    }
    for argument, value in given.items():
        ranges[argument].check(f"{where}: {argument}", value)
    if name in END and "lr_end" not in given and learning_rate <= END[name]:
        raise OptionError(
            f"--lr-scheduler-type {name} ends at {END[name]:g}, and --learning-rate {learning_rate:g} is not above it",
            f"add {where}={{lr_end: 0}}",
        )
