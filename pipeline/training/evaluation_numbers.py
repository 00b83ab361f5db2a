"""The numbers of a report of ``evaluate``, in words: for model cards and tables of runs. Imports no torch."""

from collections.abc import Mapping
from typing import Any

MODELS = ("student", "baseline")
INTERVAL = {"mean", "low", "high"}


def comparison(report: Mapping[str, Any]) -> dict[str, str]:
    """What compares student and baseline: each mean with its interval, by name."""
    intervals = {name: value for name, value in report.items() if _is_interval(value)}
    return {name: f"{each['mean']:.3g} [{each['low']:.3g}, {each['high']:.3g}]" for name, each in intervals.items()}


def measures(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """What each model's answers are like: the number of the student and that of the baseline, by name."""
    student, baseline = (report.get(model) or {} for model in MODELS)
    named = {name: (value, baseline.get(name)) for name, value in student.items()}
    return {
        name: ["" if value is None else f"{value:.4g}" for value in values]
        for name, values in named.items()
        if isinstance(values[0], int | float)
    }


def _is_interval(value: object) -> bool:
    return isinstance(value, dict) and value.keys() >= INTERVAL
