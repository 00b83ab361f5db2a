"""Shows the results of a probe in a terminal."""

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from adpa.pipeline.scoring.probe import ProbeReport


def show_probe(report: "ProbeReport", unsampled: int) -> RenderableType:
    """A line for each K, the run's own in bold, then notes on the numbers; ``unsampled``: responses not sampled yet."""
    table = Table("K", box=SIMPLE_HEAD, padding=0, show_edge=False)  # the box has a space between columns
    losses = ["KL lost\nmean", "KL lost\n95%"] if report.kl_against else []
    losses += ["A lost"] if report.reference_hours is not None else []
    for name in ("mass\nmean", "mass\n5%", "tail\nmean", *losses, "bytes/\ntoken", "bytes"):
        table.add_column(name, justify="right", overflow="fold")
    for kept in report.by_top_k:
        cells = [f"{kept.captured_mass:.4f}", f"{kept.captured_mass_5:.4f}", f"{kept.tail:.4f}"]
        if kept.kl_lost is not None:
            cells += [f"{kept.kl_lost:.2g}", f"{kept.kl_lost_95:.2g}"]
        if kept.advantage_lost is not None:
            cells.append(f"{kept.advantage_lost:.2%}")
        cells += [f"{kept.bytes / report.data_tokens:,.0f}", f"{kept.bytes:,}"]
        table.add_row(str(kept.top_k), *cells, style=Style(bold=kept.top_k == report.own_top_k))

    lines = [
        f"Probed: {report.responses:,} of {report.data_responses:,} responses, {report.tokens:,} tokens, with "
        f"K = {report.top_k:,}; {report.tail:.2g} of the teacher's probability lies beyond and counts as one outcome."
    ]
    if report.stand_ins:
        lines.append(
            f"No response is sampled yet: chosen ones were probed in their place, and {unsampled:,} are counted with "
            "--max-new-tokens tokens each."
        )
    elif unsampled:
        lines.append(
            f"{unsampled:,} responses are not sampled yet: none of them was probed, and they are counted with "
            "--max-new-tokens tokens each."
        )
    if report.rewards is not None:
        lines.append(f"Probed pairs: {report.rewards.describe()}.")
    lines.append(_losses(report))
    lines += [
        f"Bytes: for the {report.data_tokens:,} response tokens, scored already or not.",
        f"Hours: {_hours(report)} for {report.input_tokens:,} tokens of prompts and responses, in one process, "
        "without loading and sampling.",
    ]
    return Group(table, "", *map(Text, lines))


def _losses(report: "ProbeReport") -> str:
    if report.kl_against is None:
        return "Without a student and without a reference, the lost KL and advantages are unknown."
    text = "KL lost: nats a token that the student's KL over K + 1 outcomes does not see"
    if report.kl_against == "reference":
        text += (
            "; the reference stands in, which may be far closer to the teacher than a student is: give --student, with "
            "sampled among --responses, to measure its own"
        )
    if report.reference_hours is not None:
        text += ". A lost: share of Σ p·|A|"
    return f"{text}."


def _hours(report: "ProbeReport") -> str:
    hours = {"teacher": report.teacher_hours, "reference": report.reference_hours or 0.0}
    whole, missing = _number(sum(hours.values())), _number(report.missing_hours)
    parts = [f"{model} {_number(share)}" for model, share in hours.items() if report.reference_hours is not None]
    if missing != whole:
        parts.append(f"{missing} for what the cache lacks")
    return f"{whole} ({', '.join(parts)})" if parts else whole


def _number(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
