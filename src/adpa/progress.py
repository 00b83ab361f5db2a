"""On standard error: progress bars with rate and remaining time, in a terminal alone; warnings, a line each."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows a bar, and yields the function that advances it by a number of units; the description names the unit."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(description, total=total)
        yield lambda units: bar.advance(task, units)


class WarningLines(logging.Handler):
    """Prints a warning as one line, above the progress bars of other packages."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a warning."""
        line = f"adpa: warning: {' '.join(record.getMessage().split())}"
        if tqdm := sys.modules.get("tqdm"):
            tqdm.tqdm.write(line, file=sys.stderr)
        else:
            sys.stderr.write(f"{line}\n")
