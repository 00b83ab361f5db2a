"""The sign of a training that diverges: a loss that has grown fourfold. Imports no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

BEFORE = "loss_before"  # of the first log: the loss at the first step, which the untrained student computes
GROWTH = 4
RISE = 1.0  # nats for each token
IN_A_ROW = 3  # logs


def positive_loss(log: Mapping[str, Any], weights: Mapping[str, float]) -> float:
    """The loss of a log without its advantage term, which may be negative.

    Args:
        log: an entry of Trainer's history, with the mean of every term.
        weights: the weight of each term in the loss, by its key in the log.
    """
    return float(sum(weight * log[key] for key, weight in weights.items() if not key.startswith("advantage/")))


def divergence(log: Sequence[Mapping[str, Any]], weights: Mapping[str, float], last_step: int) -> str | None:
    """A warning if the loss has grown ``GROWTH``-fold since the first step, and by more than ``RISE``; else None.

    The loss is that of the terms that cannot be negative: −log q and KL. A log is a mean over several steps, but with a
    small batch one log may still be an outlier. So ``IN_A_ROW`` logs in a row must be high, or the last one of the run.
    The loss must also rise by ``RISE``, because a student that knows its examples by heart begins near 0.

    Args:
        log: Trainer's history.
        weights: as for ``positive_loss``.
        last_step: the last step of the run.
    """
    logs = [entry for entry in log if "loss" in entry]
    if not logs:
        return None
    before = logs[0].get(BEFORE, positive_loss(logs[0], weights))  # a run that resumed before its first log lacks it
    in_a_row = 0
    for entry in logs:
        loss = positive_loss(entry, weights)
        in_a_row = in_a_row + 1 if loss > GROWTH * before and loss > before + RISE else 0
        if in_a_row == IN_A_ROW or (in_a_row and entry["step"] >= last_step):
            beside = " without its advantage term" if any(key.startswith("advantage/") for key in weights) else ""
            return (
                f"step {entry['step']}: the loss{beside} is {loss:.3g}, {loss / before:.0f} times the {before:.3g} of "
                "the first step: the training diverges; start anew with a lower --learning-rate, or a lower "
                "--max-grad-norm"
            )
    return None
