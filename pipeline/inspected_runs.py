"""Runs of ``adpa distill`` as ``adpa inspect --run`` shows them: settings, losses and curves from their adpa.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adpa.errors import OptionError
from adpa.pipeline.training.run_directory import RECORD, read_record

SETTINGS = {  # of the record's "training", by the names of the options
    "learning rate": "learning_rate",
    "schedule": "lr_scheduler_type",
    "batch size": "batch_size",
    "epochs": "num_train_epochs",
    "max steps": "max_steps",
    "optimizer": "optim",
    "seed": "seed",
}


@dataclass(frozen=True)
class InspectedRun:
    """A run of ``distill``.

    Attributes:
        directory: its directory.
        objective: name of the objective.
        student: name of the student before training.
        terms: weights of the loss, by response set and term.
        settings: its training, by the names in ``SETTINGS``.
        examples: number of preference pairs; None as long as the run has not finished.
        steps: the step of the last log; 0 without a log.
        first_loss: loss at the first log; None without a log.
        last_loss: loss at the last log; None without a log.
    """

    directory: str
    objective: str
    student: str
    terms: dict[str, dict[str, float]]
    settings: dict[str, Any]
    examples: int | None
    steps: int
    first_loss: float | None
    last_loss: float | None

    def describe(self) -> str:
        """One line."""
        return f"{self.directory}: {self.objective}, {self._progress()}"

    def facts(self) -> dict[str, str]:
        """What a table says of the run."""
        terms = [
            f"{weight:g} · {term} on {responses}"
            for responses, weights in self.terms.items()
            for term, weight in weights.items()
            if weight
        ]
        facts = {"objective": self.objective, "loss": " + ".join(terms), "student": self.student}
        facts |= {
            name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in self.settings.items()
        }
        return facts | {"result": self._progress()}

    def _progress(self) -> str:
        if self.first_loss is None or self.last_loss is None:
            return "no log yet"
        steps = f"{self.steps:,} step{'' if self.steps == 1 else 's'}"
        examples = "not finished" if self.examples is None else f"{self.examples:,} examples"
        return f"{examples}, {steps}, loss {self.first_loss:.4g} to {self.last_loss:.4g}"


def read_run(directory: Path) -> dict[str, Any]:
    """The record of a run that ``--run`` names, also of one that has not finished.

    Raises:
        OptionError: the directory has no record of a run.
    """
    fix = "name the --output of an adpa distill"
    if not directory.is_dir():
        raise OptionError(f"--run {directory}: {'is a file' if directory.exists() else 'no such directory'}", fix)
    try:
        record = read_record(directory)
        whole = all(
            isinstance(log["step"], int) and isinstance(log["loss"], float | int) for log in record.get("losses", [])
        )
        whole &= isinstance(record["objective"], str) and isinstance(record["student"]["name"], str)
        whole &= isinstance(record["training"], dict) and isinstance(record["terms"], dict)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise OptionError(f"--run {directory}: found no {RECORD} of a run that can be read", fix)
    return record


def inspected_run(directory: Path, record: Mapping[str, Any]) -> InspectedRun:
    """What to show of a run."""
    logs, training = record.get("losses", []), record["training"]
    return InspectedRun(
        directory=str(directory),
        objective=record["objective"],
        student=record["student"]["name"],
        terms=record["terms"],
        settings={name: training[key] for name, key in SETTINGS.items() if training.get(key) not in (None, -1)},
        examples=record["examples"] if "steps" in record else None,
        steps=logs[-1]["step"] if logs else 0,
        first_loss=logs[0]["loss"] if logs else None,
        last_loss=logs[-1]["loss"] if logs else None,
    )
