"""Shows the report of ``precompute`` in a terminal."""

from rich.console import Group, RenderableType

from adpa.pipeline.precompute import PrecomputeReport
from adpa.pipeline.terminal.probe import show_probe
from adpa.pipeline.terminal.report import show_report


def show_precompute(report: PrecomputeReport) -> RenderableType:
    """The counts, then the results of a probe, or a remark."""
    table = show_report("precompute", report, leave_out="probe")
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
