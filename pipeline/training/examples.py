"""Divides the examples of a run: those that it is trained on, and those that are held out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from adpa.data.batches import TrainingExamples
from adpa.data.cache.responses import ResponseName
from adpa.data.cache.selection import Need, Selection, TrainingSet, missing_signals
from adpa.data.held_out import held_out, place
from adpa.errors import OptionError
from adpa.pipeline.training.validation_settings import ValidationSettings

SIGNALS = Need(signals=True, advantages=False)


@dataclass(frozen=True)
class Examples:
    """The examples of a run.

    Attributes:
        trained: those that it is trained on.
        held_out: those that it is evaluated on; None without ``--validation``.
        warnings: what is wrong with the held-out ones.
    """

    trained: TrainingExamples
    held_out: TrainingExamples | None = None
    warnings: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """How many there are; empty without held-out ones."""
        if self.held_out is None:
            return ""
        return f"{len(self.trained):,} examples to train on, {len(self.held_out):,} held out"


def divide_examples(
    needs: Mapping[ResponseName, Need],
    training: Selection,
    second: Selection | None,
    settings: ValidationSettings | None,
) -> Examples:
    """Divides the examples.

    Args:
        needs: the signals that the run needs of each response set.
        training: the response sets that are trained on.
        second: those of a second data set, which are evaluated on, if there is one.
        settings: the options; None without ``--validation``.

    Raises:
        OptionError: no example is held out, or none is left to train on, or every prompt of the second data set is
            trained on.
    """
    examples = TrainingExamples(training.training_sets(needs))
    if settings is None:
        return Examples(examples)
    if second is not None:
        held = TrainingExamples(_evaluated_sets(needs, second))
        return Examples(examples, held, _overlap(settings, examples, held))
    assert settings.share is not None
    chosen = held_out(examples.prompts(), settings.share)
    if all(chosen) or not any(chosen):
        raise _one_sided(settings, examples)
    numbers = range(len(chosen))
    return Examples(
        examples.subset([number for number in numbers if not chosen[number]]),
        TrainingExamples(_evaluated_sets(needs, training)).subset([number for number in numbers if chosen[number]]),
    )


def _evaluated_sets(needs: Mapping[ResponseName, Need], selection: Selection) -> list[TrainingSet]:
    """The sets with all signals that there are: the KL is measured even where it is no term of the loss."""
    scoring, signals = selection.scoring, selection.signals
    return [
        TrainingSet(
            selection.sets[name],
            None
            if scoring is None or signals is None or missing_signals(selection.sets, scoring, signals, {name: SIGNALS})
            else signals,
        )
        for name in needs
    ]


def _one_sided(settings: ValidationSettings, examples: TrainingExamples) -> OptionError:
    """The error of a share that leaves one side empty, with the nearest share that does not."""
    share, places = settings.text, sorted({place(prompt) for prompt in examples.prompts()})
    if len(places) == 1:
        return OptionError(
            f"--validation {share}: the {len(examples):,} examples have one prompt, which is either trained on or held "
            "out",
            "name other data in the cache",
        )
    if places[0] >= settings.share:  # type: ignore[operator]  # there is a share
        nearest = math.floor(places[0] * 1000 + 1) / 1000
        return OptionError(
            f"--validation {share} holds out none of the {len(examples):,} examples: the digest of a prompt decides",
            f"give {nearest:g} or more, or name other data in the cache",
        )
    nearest = math.floor(places[-1] * 1000) / 1000
    return OptionError(
        f"--validation {share} holds out all {len(examples):,} examples: the digest of a prompt decides",
        f"give {nearest:g} or less, or name other data in the cache",
    )


def _overlap(settings: ValidationSettings, examples: TrainingExamples, held: TrainingExamples) -> list[str]:
    trained = set(examples.prompts())
    both = sum(prompt in trained for prompt in held.prompts())
    if both == len(held):
        raise OptionError(
            f"--validation {settings.text}: all its {both:,} prompts are trained on, too",
            "name data with other prompts, or give a share such as 0.02",
        )
    if not both:
        return []
    return [
        f"--validation {settings.text}: {both:,} of its {len(held):,} prompts are trained on, too; its loss says less "
        "about new prompts"
    ]
