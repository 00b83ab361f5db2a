"""The losses on held-out examples, with the weights of training and without dropout.

A mean is over all held-out response tokens of a set: it does not depend on batches and ranks. Beside the terms of the
loss, KL(teacher‖student) is measured wherever there are signals.

Shapes: N response tokens of a batch; S training sets, and one more for tokens that do not count; 3 terms.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments

from adpa.pipeline.training.objectives import TermWeights
from adpa.pipeline.training.plausibility import plausible_advantages

LOSS = "eval_loss"


class HeldOutLosses:
    """Computes the losses on held-out examples.

    Args:
        names: the names of the sets.
        weights_S3: the weights of the terms in training.
        with_signals: whether each set has signals.
        plausibility: see ``plausible_advantages``.
        accelerator: of the run.
    """

    def __init__(
        self,
        names: Sequence[str],
        weights_S3: Tensor,
        with_signals: Sequence[bool],
        plausibility: float,
        accelerator: Accelerator,
    ) -> None:
        self._names = names
        self._weights_S3 = weights_S3.double()
        measured_S3 = weights_S3 != 0
        kl, has_signals = TermWeights._fields.index("kl"), torch.tensor(with_signals, dtype=torch.bool)
        measured_S3[: len(has_signals), kl] |= has_signals.to(weights_S3.device)
        self._measured_S3 = measured_S3
        self.counts_S = measured_S3.any(dim=1).cpu()  # the sets whose tokens count
        self._plausibility = plausibility
        self._accelerator = accelerator

    def measure(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
        """The loss and its terms, by their keys in a log. Every rank must call it.

        Args:
            model: the student after ``attach_distill_head``, in evaluation mode, with the wrapper that it has in
                training.
            batches: this rank's batches, with the rows that count.
        """
        sums_S3 = torch.zeros_like(self._weights_S3)
        tokens_S = torch.zeros_like(self._weights_S3[:, 0])
        for held_out in batches:
            batch = dict(held_out)
            set_N = batch.pop("set_number")
            nll_N, kl_N, advantage_N = self._measured_S3[set_N].float().unbind(1)
            batch["advantages"] = plausible_advantages(
                batch["advantages"], batch["teacher_logprobs"], self._plausibility
            )
            with torch.no_grad(), self._accelerator.autocast():
                _, terms = model(**batch, nll_weight=nll_N, kl_weight=kl_N, advantage_weight=advantage_N)
            sums_S3.index_add_(0, set_N, torch.stack(terms, dim=1).double())
            tokens_S += set_N.bincount(minlength=len(tokens_S))
        sums_S4 = self._accelerator.reduce(torch.cat([sums_S3, tokens_S[:, None]], dim=1), reduction="sum")
        means_S3 = sums_S4[:, :3] / sums_S4[:, 3:].clamp(min=1)
        losses = {LOSS: float((self._weights_S3 * means_S3).sum())}
        table = zip(self._names, means_S3.tolist(), self._measured_S3.tolist(), strict=False)  # the last has no name
        for name, means, measured in table:
            terms_of_set = zip(TermWeights._fields, means, measured, strict=True)
            losses |= {f"eval_{term}/{name}": mean for term, mean, is_measured in terms_of_set if is_measured}
        return losses


def evaluations_of(history: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The evaluations of a run among its logs, in order."""
    return [entry for entry in history if LOSS in entry]


def best_of(evaluations: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The evaluation with the lowest loss, the first of several; none if there was none after a step."""
    return min((entry for entry in evaluations if entry["step"] > 0), key=lambda entry: entry[LOSS], default=None)


def losses_of(evaluation: Mapping[str, Any] | None) -> dict[str, float]:
    """The loss and its terms in an evaluation, without what Trainer adds to it; empty for none."""
    return {key: value for key, value in (evaluation or {}).items() if key == LOSS or "/" in key}


def step_kept(args: TrainingArguments, state: TrainerState) -> int:
    """The step of the student that a finished run saves."""
    best = state.best_model_checkpoint if args.load_best_model_at_end else None
    return state.global_step if best is None else int(best.rpartition("-")[2])


def lost_best(args: TrainingArguments, state: TrainerState) -> str:
    """A warning if the best student was to be kept, and its checkpoint is not there; else empty."""
    best, kept = best_of(evaluations_of(state.log_history)), step_kept(args, state)
    if not args.load_best_model_at_end or best is None or kept == best["step"]:
        return ""
    return (
        f"--load-best-model-at-end: no checkpoint of step {best['step']}, the best one, in {args.output_dir}: the "
        f"student is that of step {kept}"
    )


def describe_evaluations(examples: int, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    """What the report of a finished run says about its held-out examples."""
    if not examples:
        return {}
    evaluations = evaluations_of(state.log_history)
    best, kept = best_of(evaluations), step_kept(args, state)
    return {
        "validation_examples": examples,
        "validation": losses_of(next((entry for entry in evaluations[::-1] if entry["step"] == kept), None)),
        "best_step": best and best["step"],
        "stopped_early": state.global_step < state.max_steps,
    }
