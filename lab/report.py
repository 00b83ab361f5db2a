"""Reports the results of a study: tables with intervals, and every reward in a Parquet file.

Intervals are 95 % bootstrap intervals over seeds and over the prompts of each seed. Differences and wins compare the
responses of two students to the same prompt.

Shapes: S seeds, P prompts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from adpa.data.bootstrap import Interval, bootstrap_interval, win_share
from adpa.data.cache.files import write_file
from adpa.lab.methods import Method
from adpa.lab.runs import STUDENT, TEACHER, Result


@dataclass(frozen=True)
class MethodResult:
    """The results of a method over all seeds.

    Attributes:
        name: the method's name.
        options: its training options.
        swept: see ``Method``.
        reward: mean reward of responses sampled at temperature 1.
        greedy_reward: mean reward of greedy responses.
        wins: share of prompts on which the sampled response is better than the SFT student's; a tie counts one half.
        greedy_wins: the same for greedy responses.
        control: the method to which ``gain`` compares, if any.
        gain: sampled reward minus the control's.
        worse_seeds: the seeds on which the mean sampled reward is below the SFT student's.
        implausible_mass: probability that the student gives to tokens with low teacher probability, at the last log of
            training, mean over seeds; None if it was not logged.
    """

    name: str
    options: Mapping[str, object]
    swept: Mapping[str, float]
    reward: Interval
    greedy_reward: Interval
    wins: Interval
    greedy_wins: Interval
    control: str | None
    gain: Interval | None
    worse_seeds: list[int]
    implausible_mass: float | None


@dataclass(frozen=True)
class StudyReport:
    """The report of ``adpa lab``.

    Attributes:
        output: the study's directory.
        seeds: the reported seeds.
        prompts: held-out prompts of each seed.
        methods: the SFT student, the teacher and the tuned methods.
        variants: the other methods.
        versions: the versions of adpa that ran the study.
        seconds: wall-clock time of this run of the command.
    """

    output: str
    seeds: list[int]
    prompts: int
    methods: list[MethodResult]
    variants: list[MethodResult]
    versions: list[str]
    seconds: float


def report_study(
    output: Path,
    methods: Mapping[str, Method],
    variants: Mapping[str, Method],
    results: Sequence[Result],
    seconds: float,
) -> StudyReport:
    """Summarises the results of all seeds, and writes ``results.parquet`` and ``tables.md``."""
    by_name: dict[str, list[Result]] = {}
    for result in results:
        by_name.setdefault(result.name, []).append(result)
    everything = {STUDENT.name: None, TEACHER.name: None, **methods, **variants}
    summaries = {name: summarize(name, method, by_name) for name, method in everything.items()}
    first = by_name[STUDENT.name]
    report = StudyReport(
        output=str(output),
        seeds=[result.seed for result in first],
        prompts=len(first[0].evaluation.sampled),
        methods=[summary for name, summary in summaries.items() if name not in variants],
        variants=[summary for name, summary in summaries.items() if name in variants],
        versions=sorted({result.version for result in results}),
        seconds=seconds,
    )
    write_rewards(output / "results.parquet", everything, results)
    write_file(output / "tables.md", markdown_tables(report).encode())
    return report


def summarize(name: str, method: Method | None, by_name: Mapping[str, Sequence[Result]]) -> MethodResult:
    """The means and intervals of one method."""
    sampled_SP, greedy_SP = _rewards(by_name[name])
    student_sampled_SP, student_greedy_SP = _rewards(by_name[STUDENT.name])
    control = method.control if method else None
    masses = [result.last_log.get("student/implausible_mass") for result in by_name[name]]
    known = [mass for mass in masses if mass is not None]
    worse = sampled_SP.mean(1) < student_sampled_SP.mean(1)
    return MethodResult(
        name=name,
        options=method.options if method else {},
        swept=method.swept if method else {},
        reward=bootstrap_interval(sampled_SP),
        greedy_reward=bootstrap_interval(greedy_SP),
        wins=bootstrap_interval(win_share(sampled_SP, student_sampled_SP)),
        greedy_wins=bootstrap_interval(win_share(greedy_SP, student_greedy_SP)),
        control=control,
        gain=bootstrap_interval(sampled_SP - _rewards(by_name[control])[0]) if control else None,
        worse_seeds=[result.seed for result, is_worse in zip(by_name[name], worse, strict=True) if is_worse],
        implausible_mass=float(np.mean(known)) if known else None,
    )


def _rewards(results: Sequence[Result]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    evaluations = [result.evaluation for result in results]
    return np.array([one.sampled for one in evaluations]), np.array([one.greedy for one in evaluations])


def write_rewards(path: Path, methods: Mapping[str, Method | None], results: Sequence[Result]) -> None:
    """Writes a row for each student, with the rewards of all its responses in the order of the prompts."""
    rows = [
        {
            "seed": result.seed,
            "method": result.name,
            "options": json.dumps(getattr(methods[result.name], "options", {})),
            "sampled": result.evaluation.sampled,
            "greedy": result.evaluation.greedy,
            "seconds": result.seconds,
            "last_log": json.dumps(result.last_log),
            "version": result.version,
        }
        for result in results
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


HEADINGS = (
    "method",
    "sampled reward",
    "greedy reward",
    "sampled wins",
    "greedy wins",
    "gain over control",
    "implausible",
    "seeds below",
)
SHOWN = 4  # columns in a terminal


def table_cells(result: MethodResult) -> tuple[str, ...]:
    """A line of the table: means with their intervals."""
    return (
        result.name,
        _interval(result.reward),
        _interval(result.greedy_reward),
        _interval(result.wins),
        _interval(result.greedy_wins),
        f"{_interval(result.gain, sign='+')} ({result.control})" if result.gain else "",
        "" if result.implausible_mass is None else f"{result.implausible_mass:.3f}",
        ", ".join(map(str, result.worse_seeds)) or "none",
    )


def markdown_tables(report: StudyReport) -> str:
    """Both tables, and the options that tuning chose."""
    seeds, versions = ", ".join(map(str, report.seeds)), ", ".join(report.versions)
    parts = [f"{len(report.seeds)} seeds ({seeds}), {report.prompts} prompts each, by adpa {versions}\n"]
    for results in (report.methods, report.variants):
        lines = [HEADINGS, ("---",) * len(HEADINGS), *map(table_cells, results)]
        parts.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
    chosen = [f"- {one.name}: {json.dumps(dict(one.options))}\n" for one in report.methods if one.options]
    return "\n".join([*parts, "".join(chosen)])


def show_study(report: StudyReport) -> RenderableType:
    """The first columns of both tables, which fit a terminal, and the directory of the other results."""
    tables: list[RenderableType] = []
    for title, results in (("methods", report.methods), ("variants", report.variants)):
        heading = f"{title}: {len(report.seeds)} seeds, {report.prompts:,} prompts each"
        table = Table(HEADINGS[0], title=heading, box=SIMPLE_HEAD, padding=0, show_edge=False)
        for heading in HEADINGS[1:SHOWN]:
            table.add_column(heading, justify="right", overflow="fold")
        for result in results:
            name, *numbers = table_cells(result)[:SHOWN]
            table.add_row(name, *(number.replace(" ", "\n", 1) for number in numbers))  # each interval below its mean
        tables += [table, ""]
    return Group(*tables, Text(f"all columns, every reward and the plots: {report.output}", overflow="fold"))


def _interval(interval: Interval, sign: str = "") -> str:
    return f"{interval.mean:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"
