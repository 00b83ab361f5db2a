"""The options of evaluation on held-out examples, checked. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adpa.errors import OptionError
from adpa.pipeline.option_checks import Range, check_not_empty

SHARE = Range(0, 1, above=True, below=True, fix="give a share of the examples, such as 0.02")
MICRO_BATCHES = 4  # in a batch: without a backward pass no activation stays in memory
KEPT = 1  # checkpoints beside the newest one, if the user did not ask for any: the best
# Fields of TrainingArguments that --set may change, where examples are held out.
OWN_FIELDS = ("eval_on_start", "per_device_eval_batch_size")


@dataclass(frozen=True)
class ValidationSettings:
    """When a run evaluates on held-out examples, and what follows.

    Attributes:
        share: the share of the examples that is held out.
        data: other data in the cache, in place of a share.
        eval_steps: steps between two evaluations; None for the end of each epoch.
        patience: evaluations without a lower loss after which training stops.
        keep_best: whether the student with the lowest loss is kept, in place of the last one.
    """

    share: float | None
    data: str | None
    eval_steps: int | None
    patience: int | None
    keep_best: bool

    @property
    def strategy(self) -> str:
        """When to evaluate, as Trainer calls it."""
        return "steps" if self.eval_steps else "epoch"

    @property
    def text(self) -> str:
        """The value of ``--validation``."""
        return f"{self.share:g}" if self.data is None else self.data

    @property
    def record(self) -> dict[str, Any]:
        """The settings in adpa.json; the ids of a second data set's responses stand beside them."""
        return {
            "share": self.share,
            "eval_steps": self.eval_steps,
            "early_stopping_patience": self.patience,
            "load_best_model_at_end": self.keep_best,
        }


def validation_settings(
    validation: str | float | None, eval_steps: int | None, patience: int | None, keep_best: bool
) -> ValidationSettings | None:
    """The settings of a run's options; None without ``--validation``. ``check_ranges`` has checked the other numbers.

    Raises:
        OptionError: a share out of its range, or an option without ``--validation``.
    """
    if validation is None:
        given = {"--eval-steps": eval_steps, "--early-stopping-patience": patience}
        words = [f"{name} {value}" for name, value in given.items() if value is not None]
        words += ["--load-best-model-at-end"] * keep_best
        if words:
            raise OptionError(
                f"{words[0]} without --validation, which holds out the examples to evaluate on",
                "add --validation 0.02, or leave it out",
            )
        return None
    text = str(validation)
    check_not_empty({"--validation": text})
    share = _read_share(text)
    return ValidationSettings(share, None if share is not None else text.strip(), eval_steps, patience, keep_best)


def _read_share(text: str) -> float | None:
    try:
        share = float(text)
    except ValueError:
        return None
    SHARE.check("--validation", share)
    return share


def validation_arguments(
    settings: ValidationSettings | None, micro_batch_size: int, save_steps: int, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Trainer's arguments for the settings, with those for the checkpoints that they need.

    Args:
        settings: the settings; None if nothing is held out.
        micro_batch_size: examples of a micro-batch in training.
        save_steps: ``--save-steps``.
        overrides: the fields of ``--set``.

    Raises:
        OptionError: ``--save-steps`` or ``--set`` contradict the settings.
    """
    chosen = overrides.get("save_strategy")
    if settings is None:
        fields = [f"{name}={overrides[name]}" for name in OWN_FIELDS if name in overrides]
        fields += ["save_strategy=best"] * (chosen == "best")
        if fields:
            raise OptionError(f"--set {fields[0]} without --validation", "add --validation 0.02, or leave it out")
        return {}
    arguments = {
        "eval_strategy": settings.strategy,
        "eval_steps": settings.eval_steps,
        "per_device_eval_batch_size": MICRO_BATCHES * micro_batch_size,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "load_best_model_at_end": settings.keep_best,
    }
    return arguments | (_saving(settings, save_steps, chosen) if settings.keep_best else {})


def _saving(settings: ValidationSettings, save_steps: int, chosen: str | None) -> dict[str, Any]:
    """The arguments that save a checkpoint at each evaluation: the best student is one of them."""
    best = "--load-best-model-at-end saves a checkpoint at each evaluation"
    if chosen not in (None, "best", settings.strategy):
        raise OptionError(f"--set save_strategy={chosen}: {best}", "leave it out")
    if save_steps and settings.eval_steps is None:
        raise OptionError(
            f"--save-steps {save_steps}: {best}, at the end of each epoch without --eval-steps",
            f"add --eval-steps {save_steps}, or leave --save-steps out",
        )
    if save_steps and save_steps != settings.eval_steps:
        raise OptionError(
            f"--save-steps {save_steps} and --eval-steps {settings.eval_steps}: {best}",
            "give both the same number, or leave --save-steps out",
        )
    arguments: dict[str, Any] = {"save_strategy": settings.strategy}
    if settings.eval_steps:
        arguments["save_steps"] = settings.eval_steps
    return arguments | ({} if save_steps else {"save_total_limit": KEPT})
