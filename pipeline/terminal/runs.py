"""Shows the report of ``adpa runs`` in a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from adpa.data.pieces import visible
from adpa.pipeline.runs import ListedRun, RunsReport
from adpa.pipeline.training.evaluation_numbers import comparison, measures

# Settings that are told although all runs have the same.
TOLD = ("student", "objective", "on", "α", "γ", "plausibility", "LoRA", "rate", "epochs", "max steps", "batch")
# Settings of an evaluation that are told likewise.
TOLD_OF_EVALUATIONS = ("baseline", "data", "temperature", "prompts")
GAP = 2  # between two columns
NONE = "–"  # a run does not have it
UNFINISHED = "unfinished"  # instead of its steps
Row = dict[str, str]


def show_runs(report: RunsReport) -> RenderableType:
    """What all runs share in one line, then a row for each run, then its evaluations, and what is broken."""
    return _Runs(report)


@dataclass(frozen=True)
class _Runs:
    report: RunsReport

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        runs = self.report.runs
        if runs:
            names = _student_names(runs)
            settings = [{"student": names[run.path]} | {k: _text(v) for k, v in run.settings.items()} for run in runs]
            results = [_results(run) for run in runs]
            yield from _tables([run.path for run in runs], settings, results, TOLD, options.max_width)
        evaluated = [(run, each) for run in runs for each in run.evaluations]
        if evaluated:
            yield Text("Evaluations", Style(bold=True))
            settings = [_evaluation_settings(each) for _, each in evaluated]
            results = [_numbers(each["report"]) for _, each in evaluated]
            paths = [run.path for run, _ in evaluated]
            yield from _tables(paths, settings, results, TOLD_OF_EVALUATIONS, options.max_width)
        for path, problem in self.report.broken.items():
            yield Text.assemble(("broken ", Style(bold=True)), visible(f"{path}: {problem}"), overflow="fold")
        unfinished = sum(not run.finished for run in runs)
        counts = {"finished": len(runs) - unfinished, UNFINISHED: unfinished, "broken": len(self.report.broken)}
        yield Text(", ".join(f"{count:,} {name}" for name, count in counts.items() if count))


def _results(run: ListedRun) -> Row:
    numbers = {"first loss": run.first_loss, "last loss": run.last_loss, "held out": run.held_out_loss}
    told = {name: f"{value:.4g}" for name, value in numbers.items() if value is not None}
    steps = f"{run.steps:,}" if run.steps is not None else UNFINISHED
    time = {} if run.seconds is None else {"time": _duration(run.seconds)}
    warned = {"warnings": str(len(run.warnings))} if run.warnings else {}
    return {"steps": steps} | told | time | warned


def _evaluation_settings(evaluation: Mapping[str, Any]) -> Row:
    settings = evaluation["settings"] | {"prompts": evaluation["report"].get("prompts")}
    return {name: _text(value) for name, value in settings.items() if value is not None}


def _numbers(report: Mapping[str, Any]) -> Row:
    """The student's numbers; of greedy answers beside sampled ones the win rate alone, as the card has the others."""
    numbers = comparison(report) | {name: texts[0] for name, texts in measures(report).items()}
    return {
        name.replace("_", " "): text
        for name, text in numbers.items()
        if name == "greedy_win_rate" or not name.startswith("greedy_")
    }


def _student_names(runs: Sequence[ListedRun]) -> dict[str, str]:
    """The student of each run, by its path: the last part of its name where that tells which one it is."""
    whole = {run.path: str(run.student["name"]) for run in runs}
    short = {run.path: whole[run.path] if run.student["revision"] else Path(whole[run.path]).name for run in runs}
    students = {run.student["digest"] for run in runs}
    return short if len({short[run.path] for run in runs}) == len(students) else whole


def _tables(
    paths: Sequence[str], settings: Sequence[Row], results: Sequence[Row], told: Sequence[str], width: int
) -> Iterator[RenderableType]:
    """A line with the settings that all rows share, then tables with all other columns, as many as fit into each.

    A setting that is not in ``told`` becomes a column only if two rows have different values of it.
    """
    names = list(dict.fromkeys(name for row in settings for name in row))
    names.sort(key=lambda name: told.index(name) if name in told else len(told))
    values = {name: {row.get(name, NONE) for row in settings} for name in names}
    shared = {name: values[name].copy().pop() for name in names if len(values[name]) == 1}
    if same := [f"{name} {shared[name]}" for name in told if name in shared]:
        yield Text(visible(f"all: {', '.join(same)}" if len(paths) > 1 else ", ".join(same)), overflow="fold")
        yield ""
    columns = [name for name in names if name not in shared and (name in told or len(values[name] - {NONE}) > 1)]
    columns += dict.fromkeys(name for row in results for name in row)
    rows = [{**one, **two} for one, two in zip(settings, results, strict=True)]
    cells = {name: [visible(row.get(name, NONE)) for row in rows] for name in columns}
    first = [visible(path) for path in paths]
    widths = {name: max(map(cell_len, [name, *cells[name]])) for name in columns}
    left = min(max(map(cell_len, ["run", *first])), max(16, width // 3))
    while columns:
        room = width - left
        shown: list[str] = []
        while columns and (not shown or widths[columns[0]] + GAP <= room):
            shown.append(columns.pop(0))
            room -= widths[shown[-1]] + GAP
        table = Table(box=SIMPLE_HEAD, padding=(0, GAP - 1, 0, 0), pad_edge=False, show_edge=False)
        table.add_column("run", width=left, overflow="fold")
        for name in shown:
            table.add_column(name, justify="right" if _are_numbers(cells[name]) else "left", overflow="fold")
        for number, path in enumerate(first):
            table.add_row(Text(path), *(Text(cells[name][number]) for name in shown))
        yield table
        yield ""


def _are_numbers(cells: Sequence[str]) -> bool:
    return all(cell[0].isdigit() or cell[0] in "-–" or cell == UNFINISHED for cell in cells if cell)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str) and value.startswith("/"):
        return Path(value).name
    return NONE if value is None else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
