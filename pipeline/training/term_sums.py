"""The means of the terms of the loss between two logs.

Shapes: N response tokens of a micro-batch; S training sets, and one more for tokens that do not count; 3 terms.
"""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from adpa.pipeline.training.divergence import BEFORE, positive_loss
from adpa.pipeline.training.objectives import TermWeights


class TermSums:
    """Sums every term over the steps since the last log.

    Args:
        names: the names of the sets.
        weights_S3: the weights of the terms in the loss.
        accelerator: of the run.

    Attributes:
        weights: the weight of every term in the loss, by its key in a log.
    """

    def __init__(self, names: Sequence[str], weights_S3: Tensor, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._keys = [f"{term}/{name}" for name in names for term in TermWeights._fields]
        weights = [weight for row in weights_S3.tolist() for weight in row]
        table = zip(self._keys, weights, strict=False)  # the last set has no name
        self.weights = {key: weight for key, weight in table if weight != 0}
        self._sums_S3 = torch.zeros_like(weights_S3)
        self._first_sums_S3: Tensor | None = None  # of the run's first step
        self._steps = 0

    def begin_step(self, step: int) -> None:
        """Counts the step that begins after ``step`` steps of the run."""
        if step == 1 and self._steps == 1:
            self._first_sums_S3 = self._sums_S3.clone()
        self._steps += 1

    def add(self, set_N: Tensor, terms_N3: Tensor) -> None:
        """Adds the terms of a micro-batch, each token's share of the mean of its step.

        Args:
            set_N: int64 [N], the number of each token's set.
            terms_N3: float32 [N, 3].
        """
        self._sums_S3.index_add_(0, set_N, terms_N3)

    def clear(self) -> None:
        """Forgets what was added, as after a rehearsal."""
        self._first_sums_S3 = None
        self._sums_S3.zero_()
        self._steps = 0

    def take(self, step: int) -> dict[str, float]:
        """The mean of every term since the last log; in the first log also the loss at the first step.

        Every rank must call it.

        Args:
            step: optimizer steps of the run so far.
        """
        terms = self._means(self._sums_S3, self._steps)
        if step <= 1:
            terms |= {BEFORE: positive_loss(terms, self.weights)}
        elif self._first_sums_S3 is not None:
            terms |= {BEFORE: positive_loss(self._means(self._first_sums_S3, 1), self.weights)}
        self.clear()
        return terms

    def _means(self, sums_S3: Tensor, steps: int) -> dict[str, float]:
        means_S3 = self._accelerator.reduce(sums_S3, reduction="sum") / max(steps, 1)
        means = (mean for row in means_S3.tolist() for mean in row)
        return {key: mean for key, mean in zip(self._keys, means, strict=False) if key in self.weights}
