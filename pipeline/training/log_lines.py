"""A run in lines for people: a line for each log and each evaluation, on standard error.

The lines are the same in a terminal, where a progress bar stays below them, and in a file. They are a table of at most
80 columns; its head stands once above them.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adpa.pipeline.training.validation import LOSS, best_of, evaluations_of

NUMBER = 7  # columns of a number, such as -12.345
GAP = "  "


class LogLines(TrainerCallback):
    """Prints the lines.

    Args:
        terms: the terms of the loss, by their keys in a log.
        opening: a line above all others; empty for none.
    """

    def __init__(self, terms: Sequence[str], opening: str) -> None:
        self._terms = terms
        self._opening = opening
        self._widths: list[int] = []
        self._since: tuple[float, int] | None = None  # the time and the step at the first step of this process

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Starts the clock: what a run does before its first step says nothing about the others."""
        self._since = self._since or (time.perf_counter(), state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Prints the line of a log, if it is one of training or of an evaluation."""
        if logs is None or not state.is_world_process_zero or not ("loss" in logs or LOSS in logs):
            return
        if not self._widths:
            self._print_head(state.max_steps)
        prefix = "" if "loss" in logs else "eval_"
        cells = [f"{state.global_step}/{state.max_steps}", _number(logs[f"{prefix}loss"])]
        cells += [_number(logs[f"{prefix}{term}"]) for term in self._terms]
        if prefix:
            before = best_of(evaluations_of(state.log_history[:-1]))
            lower = before is not None and logs[LOSS] < before[LOSS]
            self._print(cells, GAP + ("held out, lowest so far" if lower else "held out"))
        else:
            rate, speed = logs["learning_rate"], logs["tokens_per_second"]
            self._print([*cells, f"{rate:.1e}", f"{speed:,.0f}", self._time_left(state)])

    def _print_head(self, max_steps: int) -> None:
        terms = [term.split("/") for term in self._terms]
        above = ["", "", *(term for term, _ in terms)]
        below = ["step", "loss", *(name for _, name in terms), "rate", "tokens/s", "left"]
        least = [2 * len(str(max_steps)) + 1, *(NUMBER for _ in self._terms), NUMBER, NUMBER, 8, NUMBER]
        words = [max(len(word), len(top)) for word, top in zip(below, [*above, "", "", ""], strict=True)]
        self._widths = list(map(max, least, words))
        if self._opening:
            _write(self._opening)
        self._print(above)
        self._print(below)

    def _print(self, cells: Sequence[str], end: str = "") -> None:
        columns = (cell.rjust(width) for cell, width in zip(cells, self._widths, strict=False))
        _write((GAP.join(columns) + end).rstrip())

    def _time_left(self, state: TrainerState) -> str:
        assert self._since is not None
        began, first = self._since
        per_step = (time.perf_counter() - began) / (state.global_step - first)
        return _duration(round(per_step * (state.max_steps - state.global_step)))


class Bar(ProgressCallback):
    """Trainer's progress bar, without its log."""

    def on_log(self, *_: Any, **__: Any) -> None:
        """Prints nothing."""


def _write(line: str) -> None:
    tqdm.write(line, file=sys.stderr)  # above the bar


def _number(value: float) -> str:
    return f"{value:z.3f}" if abs(value) < 1000 else f"{value:.3g}"


def _duration(seconds: int) -> str:
    minutes, hours = seconds // 60, seconds // 3600
    if hours >= 100:
        return f"{hours // 24} days"
    return f"{hours}:{minutes % 60:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"
