"""What a part of the benchmark is given, what it is made of, and what it reports."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """A number that was measured.

    Attributes:
        name: what it is; other figures of the part have other names.
        value: the number, the median where there are several.
        unit: its unit; none for ratios and counts.
        low: the smallest of several.
        high: the largest of several.
        note: what the number alone does not say.
    """

    name: str
    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Skipped:
    """A measure that was not taken, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Failure:
    """A measure that failed, and its error in one line."""

    name: str
    error: str


Report = Figure | Skipped | Failure


@dataclass(frozen=True)
class Setting:
    """What a part is given.

    Attributes:
        device: cuda, or cpu for a dry run.
        folder: where checkpoints, caches and runs may lie; all parts share it.
        data: preference pairs as JSONL; default: the repository's own texts.
        deadline: when the part is stopped, in seconds of ``time.monotonic``.
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
    """One thing that a part measures.

    Attributes:
        name: what it is.
        seconds: how long it may take on a GPU; with less time left it is skipped.
        run: measures, and gives figures as it goes.
        obstacle: why it cannot be taken here, if it cannot.
    """

    name: str
    seconds: float
    run: Callable[[], Iterable[Figure]]
    obstacle: str | None = None
