"""Shows the report of ``precompute`` in a terminal."""

from dataclasses import replace

from rich.console import Console, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from adpa.data.pieces import visible
from adpa.data.reward_accuracy import RewardAccuracy
from adpa.pipeline.precompute import PrecomputeReport
from adpa.pipeline.scoring.first_example import FirstExample
from adpa.pipeline.terminal.probe import show_probe
from adpa.pipeline.terminal.report import describe_engine, show_report

MOST_CHARACTERS = 600  # of a text
PAIR_COUNTS = ("rows", "used", "duplicates", "identical", "contradicting", "dropped", "dropped_by_reason", "prompts")
REWARDS = ("reward_accuracy", "reward_margin", "reward_pairs")
USUAL = {"workers": 1, "part": "1/1"}
RARE_COUNTS = (
    "reused",
    "resumed",
    "resumed_halves",
    "resumed_samples",
    "sampled",
    "awaited",
    "tokens",
    "bytes",
    "truncated_prompts",
    "truncated_responses",
    "thinking_left_out",
)


def print_example(example: FirstExample) -> None:
    """Prints the first example, so that a user sees what the models read before they run."""
    title = "First example, as the models read it"
    table = Table("", Column(overflow="fold"), title=title, title_justify="left", show_header=False)
    end = "none: the response was cut" if example.end is None else f"{example.end} (id {example.end_id})"
    chosen = [] if example.chosen is None else [("chosen", _cut_middle(example.chosen))]
    for name, text in (("prompt", _cut_beginning(example.prompt)), *chosen, ("end token", end)):
        table.add_row(name, Text(visible(text, newline="\n")))
    Console().print(table)


def _cut_beginning(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"… {text[-MOST_CHARACTERS:]}"


def _cut_middle(text: str) -> str:
    half = MOST_CHARACTERS // 2
    return text if len(text) <= MOST_CHARACTERS else f"{text[:half]} … {text[-half:]}"


def show_precompute(report: PrecomputeReport) -> RenderableType:
    """The counts, then the reward accuracy, then the results of a probe, or a remark.

    A count of what is rare is left out where it is zero, and a setting where it is the usual one.
    """
    unsaid = [name for name in RARE_COUNTS if not getattr(report, name)]
    unsaid += [name for name, usual in USUAL.items() if getattr(report, name) == usual]
    leave_out = ("probe", "dry_run", "engine_reason", *REWARDS, *PAIR_COUNTS, *unsaid)
    title = "precompute --dry-run" if report.dry_run else "precompute"
    shown = replace(report, engine=describe_engine(report.engine, report.engine_reason))
    alone = "chosen" not in report.responses
    table = show_report(title, shown, leave_out, first={"prompts alone" if alone else "pairs": _pairs(report)})
    below: list[RenderableType] = []
    if alone:
        below += [
            "",
            "The data has prompts alone. Training needs pairs: every objective has a term on the chosen responses.",
        ]
    if report.reward_accuracy is not None and report.reward_margin is not None and report.probe is None:
        rewards = RewardAccuracy(report.reward_pairs, report.reward_accuracy, report.reward_margin)
        below += ["", Text(f"{rewards.describe()}.")]
    if report.probe is not None:
        below += ["", show_probe(report.probe, report.sampled)]
    elif report.dry_run:
        below += ["", "Bytes: at most these, before encoding; --probe 64 predicts them."]
    elif report.awaited:
        below += [
            "",
            f"No sampled set yet: other parts have to sample {report.awaited:,} of its responses. The last part to "
            "finish makes the set; so does any part that runs again.",
        ]
    return Group(table, *below)


def _pairs(report: PrecomputeReport) -> int | dict[str, int]:
    """The number of pairs; how many were read and used, and what is odd about them, if anything is."""
    reasons = {f"dropped: {reason}": count for reason, count in report.dropped_by_reason.items()}
    told = {
        "duplicates": report.duplicates,
        "identical responses": report.identical,
        "contradicting": report.contradicting,
    }
    odd = reasons | {name: count for name, count in told.items() if count}
    return {"read": report.rows, "used": report.used} | odd if odd else report.rows
