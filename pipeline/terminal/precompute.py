"""Shows the report of ``precompute`` in a terminal."""

from rich.console import Console, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from adpa.data.pieces import visible
from adpa.pipeline.precompute import FirstExample, PrecomputeReport
from adpa.pipeline.terminal.probe import show_probe
from adpa.pipeline.terminal.report import show_report

MOST_CHARACTERS = 600  # of a text


def print_example(example: FirstExample) -> None:
    """Prints the first example, so that a user sees what the models read before they run."""
    title = "First example, as the models read it"
    table = Table("", Column(overflow="fold"), title=title, title_justify="left", show_header=False)
    end = "none: the response was cut" if example.end is None else f"{example.end} (id {example.end_id})"
    for name, text in (
        ("prompt", _cut_beginning(example.prompt)),
        ("chosen", _cut_middle(example.chosen)),
        ("end token", end),
    ):
        table.add_row(name, Text(visible(text, newline="\n")))
    Console().print(table)


def _cut_beginning(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"… {text[-MOST_CHARACTERS:]}"


def _cut_middle(text: str) -> str:
    half = MOST_CHARACTERS // 2
    return text if len(text) <= MOST_CHARACTERS else f"{text[:half]} … {text[-half:]}"


def show_precompute(report: PrecomputeReport) -> RenderableType:
    """The counts, then the results of a probe, or a remark."""
    not_resumed = [name for name in ("resumed", "resumed_halves", "resumed_samples") if not getattr(report, name)]
    table = show_report("precompute", report, leave_out=("probe", *not_resumed))
    below: list[RenderableType] = []
    if report.probe is not None:
        below = ["", show_probe(report.probe, report.sampled)]
    elif report.dry_run:
        below = ["", "Bytes: at most these, before encoding; --probe 64 predicts them."]
    elif report.awaited:
        below = [
            "",
            f"No sampled set yet: other parts have to sample {report.awaited:,} of its responses. The last part to "
            "finish makes the set; so does any part that runs again.",
        ]
    return Group(table, *below)
