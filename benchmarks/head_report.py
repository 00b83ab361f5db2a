"""Reports the results of `benchmarks.head`: tables, goals, a plot and JSON.

A ratio of times is the median of the rounds' ratios. Each compares two times of the same round.
"""

import importlib.util
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.head_ways import EAGER, LIGER, OURS, PRODUCTS, Case
from rich.table import Table

# Goals at 16,384 rows and K = 50, by hidden size. The worst vocabulary counts.
GOAL_ROWS, GOAL_IDS = 16384, 50
MOST_TIME = {PRODUCTS: {896: 1.45, 2048: 1.12}, EAGER: {896: 0.55, 2048: 0.70}}
MOST_TIME_OF_BEST_LIGER = 1.05
MOST_MEMORY, MOST_MEMORY_GROWTH, MOST_TIME_OF_HALF, MOST_ERROR = 0.10, 1.05, 0.58, 2.0
MOST_TIME_ON_CPU, MOST_MEMORY_ON_CPU = 1.1, 0.15


@dataclass(frozen=True)
class Measurement:
    """One head on one case: seconds of each round (empty if memory ran out), and extra peak memory in bytes."""

    case: Case
    way: str
    seconds: list[float]
    memory: int


@dataclass(frozen=True)
class Error:
    """Relative error of each gradient: norm of its difference from float64, divided by the norm in float64."""

    case: Case
    way: str
    dX: float  # noqa: N815
    dW: float  # noqa: N815


@dataclass(frozen=True)
class Findings:
    """All results of one run. ``missing`` names the peers that could not run, with the reason."""

    device: str
    versions: dict[str, str]
    missing: dict[str, str]
    errors: list[Error] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)


@dataclass(frozen=True)
class Goal:
    """A ratio with its upper limit ``must``. ``found`` is the measured ratio, or None."""

    ratio: str
    must: float
    found: float | None

    @property
    def verdict(self) -> str:
        """Whether the goal was met."""
        if self.found is None:
            return "not measured"
        return "met" if self.found <= self.must else "missed"


def ratios(mine: Measurement, theirs: Measurement) -> list[float]:
    """Ratios of the times, round by round; empty if memory ran out."""
    if not (mine.seconds and theirs.seconds):
        return []
    return [one / other for one, other in zip(mine.seconds, theirs.seconds, strict=True)]


def groups(measurements: Sequence[Measurement]) -> dict[Case, dict[str, Measurement]]:
    """The measurements of each case, by the name of the head."""
    by_case: dict[Case, dict[str, Measurement]] = {}
    for one in measurements:
        by_case.setdefault(one.case, {})[one.way] = one
    return by_case


def shape_of(case: Case) -> tuple[str, ...]:
    """The cells of a case in a table."""
    rows = f"{case.share:.0%}" + ("" if case.with_dX else ", no dX")
    return (*map(str, (case.N, case.V, case.d, case.K)), rows)


def time_table(measurements: Sequence[Measurement]) -> Table:
    """One line for each case and head: time against eager losses in the same round, and memory against theirs."""
    table = Table("N", "V", "d", "K", "rows", "way", "ms", "time / eager", "extra MB", "memory / eager")
    for case, ways in groups(measurements).items():
        base = ways.get(EAGER)
        for name, one in ways.items():
            times = ratios(one, base) if base else []
            table.add_row(
                *shape_of(case),
                name,
                f"{1e3 * statistics.median(one.seconds):,.1f}" if one.seconds else "out of memory",
                f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})" if times else "",
                f"{one.memory / 1e6:,.0f}" if one.seconds else "",
                f"{one.memory / base.memory:.3f}" if times and base and base.memory else "",
            )
    return table


def error_table(errors: Sequence[Error]) -> Table:
    """One line for each case and head: the gradients' errors, also as multiples of those of eager losses."""
    table = Table("N", "V", "d", "K", "rows", "way", "dX error", "dW error", "dX / eager", "dW / eager")
    for one in errors:
        dX, dW = error_ratio(one, errors)
        numbers = (f"{one.dX:.2e}", f"{one.dW:.2e}", f"{dX:.2f}", f"{dW:.2f}")
        table.add_row(*shape_of(one.case), one.way, *numbers)
    return table


def error_ratio(one: Error, errors: Sequence[Error]) -> tuple[float, float]:
    """The errors of dX and dW as multiples of those of eager losses on the same case."""
    (base,) = (other for other in errors if other.way == EAGER and other.case == one.case)
    return one.dX / base.dX, one.dW / base.dW


def goals_of(findings: Findings, on_gpu: bool) -> list[Goal]:
    """The goals of the head, with the measured ratios."""
    by_case = groups(findings.measurements)
    errors = [max(error_ratio(one, findings.errors)) for one in findings.errors if one.way == OURS]
    error = Goal("error of dX and dW / that of eager", MOST_ERROR, _worst(errors))
    if not on_gpu:
        cases = [ways for ways in by_case.values() if EAGER in ways]
        return [
            Goal(f"time / {EAGER}", MOST_TIME_ON_CPU, _worst([_time(ways, EAGER) for ways in cases])),
            Goal(f"extra peak memory / {EAGER}", MOST_MEMORY_ON_CPU, _worst([_memory(ways) for ways in cases])),
            error,
        ]
    plain = [
        (case, ways)
        for case, ways in by_case.items()
        if (case.N, case.K, case.share, case.with_dX) == (GOAL_ROWS, GOAL_IDS, 1.0, True)
    ]
    by_d = {d: [ways for case, ways in plain if case.d == d] for d in (896, 2048)}
    times = [
        Goal(f"time / {other}, d = {d}", musts[d], _worst([_time(ways, other) for ways in by_d[d]]))
        for other, musts in MOST_TIME.items()
        for d in by_d
    ]
    best = [
        Goal(f"time / best chunk of {LIGER}, d = {d}", MOST_TIME_OF_BEST_LIGER, _worst(list(map(_best_liger, cases))))
        for d, cases in by_d.items()
    ]
    dX_free = sorted((case.N, ways[OURS].memory) for case, ways in by_case.items() if not case.with_dX)
    growth = dX_free[-1][1] / dX_free[0][1] if len(dX_free) > 1 and dX_free[0][1] else None
    halves = [
        statistics.median(ways[OURS].seconds) / statistics.median(whole[OURS].seconds)
        for case, ways in by_case.items()
        for other, whole in plain
        if case == Case(other.N, other.V, other.d, other.K, 0.5) and ways[OURS].seconds and whole[OURS].seconds
    ]
    return [
        *times,
        *best,
        Goal(f"extra peak memory / {EAGER}", MOST_MEMORY, _worst([_memory(ways) for _, ways in plain])),
        Goal("extra peak memory at N = 32768 / 4096, no dX", MOST_MEMORY_GROWTH, growth),
        Goal("time with half of the rows masked / none", MOST_TIME_OF_HALF, _worst(halves)),
        error,
    ]


def _worst(ratios: Sequence[float | None]) -> float | None:
    """The largest ratio; None unless all were measured."""
    measured = [ratio for ratio in ratios if ratio is not None]
    return max(measured) if measured and len(measured) == len(ratios) else None


def _time(ways: dict[str, Measurement], other: str) -> float | None:
    times = ratios(ways[OURS], ways[other]) if other in ways else []
    return statistics.median(times) if times else None


def _best_liger(ways: dict[str, Measurement]) -> float | None:
    """Our time against the shortest of Liger's."""
    times = [_time(ways, name) for name in ways if name.startswith(LIGER)]
    return max((one for one in times if one is not None), default=None)


def _memory(ways: dict[str, Measurement]) -> float | None:
    is_measured = EAGER in ways and ways[EAGER].memory and ways[OURS].seconds
    return ways[OURS].memory / ways[EAGER].memory if is_measured else None


def goal_table(goals: Sequence[Goal]) -> Table:
    """One line for each goal."""
    table = Table("goal: the ratio of our head's", "found", "must", "")
    for goal in goals:
        table.add_row(goal.ratio, "" if goal.found is None else f"{goal.found:.3f}", f"{goal.must:.2f}", goal.verdict)
    return table


def path_of(findings: Findings, output: Path, suffix: str) -> Path:
    """The output file for the device."""
    slug = re.sub("[^a-z0-9]+", "-", findings.device.lower()).strip("-")
    return output / f"head-{slug}{suffix}"


def write_numbers(findings: Findings, on_gpu: bool, output: Path) -> Path:
    """Writes all results as JSON."""
    path = path_of(findings, output, ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    goals = [asdict(goal) | {"verdict": goal.verdict} for goal in goals_of(findings, on_gpu)]
    path.write_text(json.dumps(asdict(findings) | {"goals": goals}, indent=1) + "\n")
    return path


def draw(findings: Findings, output: Path) -> Path | None:
    """Plots time and memory of all heads, for the cases that measured all of them; None without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    cases = {
        case: ways
        for case, ways in groups(findings.measurements).items()
        if case.K == GOAL_IDS and case.share == 1 and len(ways) > 1
    }
    names = list(dict.fromkeys(name for ways in cases.values() for name in ways))
    figure = Figure(figsize=(12, 4 + 0.6 * len(cases)), layout="constrained")
    height = 0.85 / len(names)
    units = {"milliseconds": lambda one: 1e3 * statistics.median(one.seconds), "extra GB": lambda one: one.memory / 1e9}
    for axes, (label, value) in zip(figure.subplots(1, 2, sharey=True), units.items(), strict=True):
        for place, name in enumerate(names):
            bars = [(row, ways[name]) for row, ways in enumerate(cases.values()) if name in ways and ways[name].seconds]
            rows = [row + place * height for row, _ in bars]
            axes.barh(rows, [value(one) for _, one in bars], height, label=name)
        axes.set(xlabel=label)
        axes.set_yticks([row + 0.4 for row in range(len(cases))], [f"N {c.N}\nV {c.V}\nd {c.d}" for c in cases])
        axes.grid(axis="x", alpha=0.3)
    axes.invert_yaxis()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"The loss head, forward and backward: {findings.device}")
    path = path_of(findings, output, ".png")
    figure.savefig(path, dpi=120)
    return path
