"""What a training run does at moments that Trainer tells of: at its start, at its last step, at an evaluation."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from transformers import (
    EarlyStoppingCallback,
    GenerationConfig,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from adpa.errors import OptionError
from adpa.pipeline.training.validation import best_of, evaluations_of


class AtStart(TrainerCallback):
    """Calls a function before this process's first step."""

    def __init__(self, begin: Callable[[], None]) -> None:
        self._begin = begin

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Calls the function."""
        self._begin()


class LogOften(TrainerCallback):
    """Logs the last step, whatever the interval, so that no loss goes unchecked, and each step that is evaluated."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Asks for a log."""
        control.should_log |= control.should_evaluate or state.global_step >= state.max_steps
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Asks for a log."""
        control.should_log |= control.should_evaluate
        return control


class EarlyStop(EarlyStoppingCallback):
    """Trainer's early stopping. A resumed run counts the evaluations before it, too, and may have stopped by then."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Counts the evaluations since the best one."""
        evaluations = evaluations_of(state.log_history)
        best = best_of(evaluations)
        since = [entry for entry in evaluations if best is not None and entry["step"] > best["step"]]
        self.early_stopping_patience_counter = len(since)
        control.should_training_stop |= len(since) >= self.early_stopping_patience


class KeepEnds(TrainerCallback):
    """Saves a student that ends its answers at the end of a turn, or at what ended them before training."""

    def __init__(self, turn_end: int, before: Sequence[int], settings: GenerationConfig) -> None:
        self._ends = list(dict.fromkeys([turn_end, *before]))
        self._settings = settings

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Sets them: Trainer has just added the tokenizer's end of text."""
        self._settings.eos_token_id = self._ends if len(self._ends) > 1 else self._ends[0]


def name_failing_trackers(callbacks: Sequence[TrainerCallback]) -> None:
    """Makes a tracker that does not start, such as one without a login, an error of one line."""
    names = {kind: name for name, kind in INTEGRATION_TO_CALLBACK.items()}
    for callback in callbacks:
        if name := names.get(type(callback)):
            callback.on_train_begin = partial(_start_tracker, name, callback.on_train_begin)  # type: ignore[method-assign]


def _start_tracker(name: str, begin: Callable[..., None], *arguments: Any, **options: Any) -> None:
    try:
        begin(*arguments, **options)
    except Exception as error:  # each tracker has errors of its own, and none of their classes is known here
        problem = " ".join(str(error).split()) or type(error).__name__
        raise OptionError(f"--report-to {name}: it does not start: {problem}", "log in, or leave it out") from error
