"""The results of the GPU benchmark: every figure beside its prediction, as JSON and as a table in Markdown."""

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.gpu.part import Failure, Figure, Report, Skipped
from benchmarks.gpu.predictions import PREDICTIONS, Prediction

State = Literal["not run", "running", "done", "failed", "cut off"]


@dataclass
class PartResult:
    """The results of a part."""

    title: str
    state: State = "not run"
    seconds: float = 0.0
    figures: list[Figure] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def add(self, report: Report) -> None:
        """Adds the report of a measure."""
        if isinstance(report, Figure):
            self.figures.append(report)
        elif isinstance(report, Skipped):
            self.skipped.append(report)
        else:
            self.failures.append(report)

    def figure(self, name: str) -> Figure | None:
        """A figure by its name."""
        return next((figure for figure in self.figures if figure.name == name), None)


@dataclass
class Results:
    """The results of a run.

    Attributes:
        machine: see ``benchmarks.gpu.measures.machine``.
        minutes: the time limit of the run.
        parts: the parts by their letters.
    """

    machine: dict[str, Any]
    minutes: float
    parts: dict[str, PartResult]

    @property
    def name(self) -> str:
        """Name of the output files: the device, in letters that every file system allows."""
        return "gpu-" + re.sub("[^a-z0-9]+", "-", str(self.machine["device"] or "dry run").lower()).strip("-")

    def compare(self, prediction: Prediction) -> dict[str, Any]:
        """A prediction with the measured value and their ratio, None if it was not measured."""
        figure = self.parts[prediction.part].figure(prediction.figure)
        ratio = None if figure is None else prediction.ratio(figure.value)
        return asdict(prediction) | {"measured": figure and figure.value, "ratio": ratio}

    def rates(self) -> dict[str, float]:
        """The measured values of the rates that ``benchmarks.costs`` assumes, by the names of its assumptions."""

        def value(part: str, name: str) -> float | None:
            figure = self.parts[part].figure(name)
            return None if figure is None else figure.value

        def share(one: float | None, other: float | None) -> float | None:
            return None if one is None or other is None else one / other

        bfloat16 = value("c", "bfloat16 product")
        rates = {
            "peak_flops": share(bfloat16, 1e-12),
            "scoring_share": share(value("d", "1.5B: decoder, FLOP/s"), bfloat16),
            "head_share": share(value("d", "1.5B: head, FLOP/s"), bfloat16),
            "training_share": share(value("e", "training, FLOP/s"), bfloat16),
            "memory": self.machine["memory"],
            "memory_rate": share(value("c", "copy"), 1e-9),
            "load_rate": share(value("d", "1.5B: loading"), 1e-9),
        }
        return {name: float(f"{rate:.4g}") for name, rate in rates.items() if rate is not None}

    def costs_command(self) -> str:
        """The command ``benchmarks.costs`` with the measured rates instead of the assumed ones."""
        options = (f"--{name.replace('_', '-')} {rate:g}" for name, rate in self.rates().items())
        return " ".join(["python -m benchmarks.costs", *options])

    def as_json(self) -> dict[str, Any]:
        """All results as JSON."""
        return {
            "machine": self.machine,
            "minutes": self.minutes,
            "parts": {
                letter: asdict(part) | {"figures": {figure.name: asdict(figure) for figure in part.figures}}
                for letter, part in self.parts.items()
            },
            "predictions": list(map(self.compare, PREDICTIONS)),
            "rates": self.rates(),
            "costs": self.costs_command(),
        }

    def table(self) -> str:
        """Every figure, and every prediction without a figure, as Markdown."""
        versions = ", ".join(f"{name} {version}" for name, version in self.machine["versions"].items())
        driver = f", driver {self.machine['driver']}" if self.machine["driver"] else ""
        lines = [
            f"# Measured on {self.machine['device'] or 'a CPU: a dry run, whose numbers mean nothing'}",
            "",
            f"`make bench-gpu`: {versions}{driver}. [gpu.md](gpu.md) explains the parts and the predictions.",
            "Ratio: measured / predicted. If the prediction is a range, its nearer end counts.",
            "",
            "| part | figure | predicted | measured | ratio | predicted by | note |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for letter, part in self.parts.items():
            predicted = {one.figure: one for one in PREDICTIONS if one.part == letter}
            lines += [row(letter, figure, predicted.pop(figure.name, None)) for figure in part.figures]
            lines += [row(letter, None, prediction) for prediction in predicted.values()]
        lines += ["", "| part | | state | seconds | |", "| --- | --- | --- | --- | --- |"]
        for letter, part in self.parts.items():
            notes = [f"{one.name}: {one.error}" for one in part.failures]
            notes += [f"{one.name}: skipped, {one.reason}" for one in part.skipped]
            lines.append(f"| {letter} | {part.title} | {part.state} | {part.seconds:.0f} | {cell('; '.join(notes))} |")
        return "\n".join([*lines, "", "Costs by these rates:", "", "```", self.costs_command(), "```", ""])

    def write(self, output: Path) -> None:
        """Writes the JSON file and the table. Each file appears whole or not at all."""
        output.mkdir(parents=True, exist_ok=True)
        for path, text in (
            (output / f"{self.name}.json", json.dumps(self.as_json(), indent=1) + "\n"),
            (output / f"{self.name}.md", self.table()),
        ):
            unfinished = path.with_name(f".{path.name}.unfinished")
            unfinished.write_text(text)
            os.replace(unfinished, path)


def row(letter: str, figure: Figure | None, prediction: Prediction | None) -> str:
    """A line of the table: a figure, or a prediction without a figure."""
    assert figure is not None or prediction is not None
    name = figure.name if figure else prediction.figure if prediction else ""
    ratio = prediction.ratio(figure.value) if figure and prediction else None
    cells = [
        letter,
        name,
        prediction.text if prediction else "",
        measured(figure) if figure else "not measured",
        "" if ratio is None else number(ratio),
        prediction.source if prediction else "",
        figure.note if figure else "",
    ]
    return f"| {' | '.join(map(cell, cells))} |"


def measured(figure: Figure) -> str:
    """A figure's value with its unit, and the smallest and the largest of several values."""
    value = f"{number(figure.value)} {figure.unit}".strip()
    if figure.low is None or figure.high is None:
        return value
    return f"{value} ({number(figure.low)} to {number(figure.high)})"


def number(value: float) -> str:
    """Three digits, or all digits with thousands separators."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cell(text: str) -> str:
    """A text as a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")
