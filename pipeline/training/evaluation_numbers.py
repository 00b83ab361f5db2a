"""The numbers of a report of ``evaluate`` as text: for the terminal, model cards and tables of runs. No torch."""

from collections.abc import Mapping
from typing import Any

MODELS = ("student", "baseline")
INTERVAL = {"mean", "low", "high"}


def comparison(report: Mapping[str, Any]) -> dict[str, str]:
    """What compares student and baseline: each mean with its interval, by name; greedy answers after sampled ones."""
    parts = _by_answers(report).items()
    intervals = {way + name: value for way, part in parts for name, value in part.items() if _is_interval(value)}
    return {name: interval_text(each["mean"], each["low"], each["high"]) for name, each in intervals.items()}


def measures(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """What the models are like: the number of the student and that of the baseline, by name.

    First those of their answers, then those on the responses of the data, if it has any.
    """
    named: dict[str, tuple[Any, Any]] = {}
    for way, part in _by_answers(report).items():
        student, baseline = (part.get(model) or {} for model in MODELS)
        named |= {way + name: (value, baseline.get(name)) for name, value in student.items()}
    named["perplexity_of_the_chosen"] = (report.get("student_perplexity"), report.get("baseline_perplexity"))
    named |= {name: (report.get(name), None) for name in ("reward_accuracy", "reward_margin")}
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


def _by_answers(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The report itself, and its part on greedy answers where the others are sampled, by what stands before a name."""
    greedy = report.get("greedy") if report.get("temperature") else None
    return {"": report} | ({"greedy_": greedy} if greedy else {})


def _is_interval(value: object) -> bool:
    return isinstance(value, dict) and value.keys() >= INTERVAL
