"""The curves of a run as a picture: losses, held-out losses, and the student's statistics, against the step."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours: they differ for colour-blind eyes, and in grey.
BLUE, ORANGE, GREEN, BLACK, GREY = "#0072b2", "#d55e00", "#009e73", "#222222", "#666666"
COLORS = {"chosen": BLUE, "rejected": ORANGE, "sampled": GREEN}

TERMS = {"nll": "NLL of the responses", "kl": "KL from teacher to student", "advantage": "advantage term"}
NATS = "nats per token"
MOST_POINTS = 150  # of a line; more logs are averaged
MARKED_POINTS = 25  # a line of so few has a marker at each
COLUMNS, WIDTH, ROW_HEIGHT = 2, 8.0, 2.3  # of the picture; inches
MARGINS = {"left": 0.85, "right": 0.15, "bottom": 0.5, "top": 0.65}  # inches
GAPS = {"wspace": 0.32, "hspace": 0.42}  # shares of a panel
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "adpa",  # the same names in every picture
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 9,
}

Points = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Line:
    """One line of a panel."""

    label: str
    color: str
    points: Points
    style: Literal["-", "--"] = "-"


@dataclass(frozen=True)
class Panel:
    """One panel of the picture. ``limits`` are those of the y axis; None: those of the values."""

    title: str
    unit: str
    lines: list[Line]
    limits: tuple[float, float] | None = None


def draw_curves(record: Mapping[str, Any]) -> str:
    """Draws the curves of a run; the same record gives the same text.

    Args:
        record: adpa.json of a run with at least one log, also of one that has not finished. Of it are drawn
            ``losses``, ``student_before`` and, if there are any, ``held_out``.

    Returns:
        An SVG element, to be a file or a part of a page. It has a white background.
    """
    shown = panels(record)
    rows = -(-len(shown) // COLUMNS)
    height = rows * ROW_HEIGHT
    figure = Figure(figsize=(WIDTH, height))
    with matplotlib.rc_context(STYLE):
        # Margins by hand: a layout engine would draw everything twice.
        figure.subplots_adjust(
            MARGINS["left"] / WIDTH,
            MARGINS["bottom"] / height,
            1 - MARGINS["right"] / WIDTH,
            1 - MARGINS["top"] / height,
            **GAPS,
        )
        for number, panel in enumerate(shown):
            axes = figure.add_subplot(rows, COLUMNS, number + 1)
            _draw(axes, panel)
            last = record["losses"][-1]["step"]
            axes.set_xlim(-0.02 * last, 1.03 * last)
            if number >= len(shown) - COLUMNS:
                axes.set_xlabel("optimizer step")
        figure.text(MARGINS["left"] / WIDTH, 1 - 0.22 / height, _title(record), size=10, weight="bold")
        text = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing | {"Title": _title(record)})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def panels(record: Mapping[str, Any]) -> list[Panel]:
    """What is drawn of a run: a panel for each quantity that its logs have."""
    losses, held_out = record["losses"], record.get("held_out", [])
    before = [record["student_before"]] if record.get("student_before") else []
    keys = {key.removeprefix("eval_") for log in (*losses, *held_out) for key in log}
    terms = [(term, name) for term in TERMS for name in COLORS if f"{term}/{name}" in keys]
    drawn = [Panel("loss", NATS, _trained_and_held_out(losses, held_out, "loss", "trained on", BLACK))]
    for term, title in TERMS.items():
        lines = [
            line
            for name in (name for each, name in terms if each == term)
            for line in _trained_and_held_out(losses, held_out, f"{term}/{name}", name, COLORS[name])
        ]
        if len(terms) > 1:  # a single term is the loss
            drawn.append(Panel(title, NATS, lines))
    watched = [*before, *losses]
    advantage = Line("", BLACK, _points(watched, "student/advantage"))
    entropy = Line("", BLACK, _points(watched, "student/entropy"))
    mass = [
        Line("on the teacher's top K", BLUE, _points(watched, "student/mass_on_topk")),
        Line("on unlikely tokens", ORANGE, _points(watched, "student/implausible_mass")),
    ]
    rate = Line("", GREY, _points(losses, "learning_rate"))
    drawn += [
        Panel("student's mean advantage", NATS, [advantage]),
        Panel("student's entropy", NATS, [entropy]),
        Panel("student's probability mass", "share", mass, limits=(0, 1.05)),
        Panel("learning rate", "", [rate]),
    ]
    return [panel for panel in drawn if any(line.points[0] for line in panel.lines)]


def tidy(axes: Axes) -> None:
    """A light grid, and no frame at the top and at the right."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _trained_and_held_out(
    losses: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]], key: str, label: str, color: str
) -> list[Line]:
    lines = [Line(label, color, points)] if (points := _points(losses, key))[0] else []
    if (points := _points(held_out, f"eval_{key}"))[0]:
        lines.append(Line(f"{label}, held out" if label in COLORS else "held out", color, points, "--"))
    return lines


def _points(logs: Sequence[Mapping[str, Any]], key: str) -> Points:
    """Steps and values of a key; of many logs the means of neighbours, so that peaks still raise the line."""
    found = [(log["step"], log[key]) for log in logs if log.get(key) is not None]
    bounds = [round(place * len(found) / MOST_POINTS) for place in range(MOST_POINTS + 1)]
    groups = [found[start:end] for start, end in pairwise(bounds)] if len(found) > MOST_POINTS else [[p] for p in found]
    means = [[sum(column) / len(group) for column in zip(*group, strict=True)] for group in groups]
    return [step for step, _ in means], [value for _, value in means]


def _draw(axes: Axes, panel: Panel) -> None:
    for line in panel.lines:
        marker = "o" if len(line.points[0]) <= MARKED_POINTS else ""
        axes.plot(
            *line.points,
            linestyle=line.style,
            linewidth=1.3,
            color=line.color,
            marker=marker,
            markersize=3,
            markerfacecolor="white" if line.style == "--" else line.color,
            label=line.label,
        )
    tidy(axes)
    axes.set_title(panel.title, loc="left", y=1)  # placed by hand: matplotlib would measure all labels
    axes.set_ylabel(panel.unit)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:.10g}")  # enough to tell ticks of a flat line apart
    axes.margins(y=0.1)
    if panel.limits:
        axes.set_ylim(*panel.limits)
    if len(panel.lines) > 1 or panel.lines[0].label.partition(",")[0] in COLORS:
        axes.legend(frameon=True, framealpha=0.8, edgecolor="none")


def _title(record: Mapping[str, Any]) -> str:
    last = record["losses"][-1]["step"]
    title = f"{record['objective']}: {last:,} step{'s' * (last != 1)}"
    return f"{title} on {record['examples']:,} examples" if "examples" in record else title
