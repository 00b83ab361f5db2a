"""Shows the report of ``adpa distill`` in a terminal."""

from rich.console import Group, RenderableType
from rich.text import Text

from adpa.pipeline.distill import DistillReport
from adpa.pipeline.terminal.report import show_report
from adpa.pipeline.training.serving import serving_lines


def show_distill(report: DistillReport) -> RenderableType:
    """The report's fields, then the lines that serve the student and chat with it; these are never broken."""
    lines = "".join(f"\n  {line}" for line in serving_lines(report.output))
    below = Text(f"\nTo serve this student, and to chat with it in another terminal:{lines}")
    below.no_wrap, below.overflow = True, "ignore"
    leave_out = [] if report.validation_examples else ["validation_examples", "stopped_early"]
    return Group(show_report("distill", report, leave_out), below)
