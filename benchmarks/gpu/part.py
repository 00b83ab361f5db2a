"""The types of the GPU benchmark: a part's setting, its measures, and their reports."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """A measured number.

    Attributes:
        name: its name, unique in the part.
        value: the number, or the median of several.
        unit: its unit; empty for ratios and counts.
        low: the smallest of several.
        high: the largest of several.
        note: an explanation, if it needs one.
    """

    name: str
    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Skipped:
    """A measure that was not taken, with the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class Failure:
    """A measure that failed, with its error in one line."""

    name: str
    error: str


Report = Figure | Skipped | Failure


@dataclass(frozen=True)
class Setting:
    """The input of a part.

    Attributes:
        device: cuda, or cpu for a dry run.
        folder: directory for checkpoints, caches and runs; all parts share it.
        data: preference pairs as JSONL; default: the repository's own texts.
        deadline: time at which the part is stopped, in seconds of ``time.monotonic``.
    """

    device: str
    folder: Path
    data: Path | None
    deadline: float

    @property
    def dry(self) -> bool:
        """Whether this is a dry run: tiny shapes on the CPU."""
        return self.device == "cpu"

    @property
    def left(self) -> float:
        """Seconds until the part is stopped."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Measure:
    """One measure of a part.

    Attributes:
        name: its name.
        seconds: its longest time on a GPU; with less time left it is skipped.
        run: measures, and yields each figure at once.
        obstacle: the reason why it cannot be taken here, if any.
    """

    name: str
    seconds: float
    run: Callable[[], Iterable[Figure]]
    obstacle: str | None = None
