"""The numbers of a report of ``evaluate`` as text: for the terminal, model cards and tables of runs. No torch."""

from collections.abc import Mapping
from typing import Any

MODELS = ("student", "baseline")
INTERVAL = {"mean", "low", "high"}


def comparison(report: Mapping[str, Any]) -> dict[str, str]:
    """What compares student and baseline: each mean with its interval, by name."""
    intervals = {name: value for name, value in report.items() if _is_interval(value)}
    return {name: interval_text(each["mean"], each["low"], each["high"]) for name, each in intervals.items()}


def measures(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """What each model's answers are like: the number of the student and that of the baseline, by name."""
    student, baseline = (report.get(model) or {} for model in MODELS)
    named = {name: (value, baseline.get(name)) for name, value in student.items()}
    return {
        name: ["" if value is None else number_text(value) for value in values]
        for name, values in named.items()
        if isinstance(values[0], int | float)
    }


def number_text(value: float, digits: int = 4) -> str:
    """A number with so many significant digits; from 1,000 on, all digits before the point."""
    text = f"{value:.{digits}g}"
    return f"{value:,.0f}" if abs(value) >= 1000 or "e+" in text else text


def interval_text(mean: float, low: float, high: float) -> str:
    """A mean with its interval: ``0.612 [0.581, 0.642]``."""
    return f"{number_text(mean, 3)} [{number_text(low, 3)}, {number_text(high, 3)}]"


def _is_interval(value: object) -> bool:
    return isinstance(value, dict) and value.keys() >= INTERVAL
