"""Which examples make an optimizer step, and which of them a rank takes at a time.

The step is the unit: it has the same examples on one rank and on many, however few fit in memory at a time. So a run on
other ranks computes the same, and can go on where one on these ranks was stopped.
"""

import math
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class StepSampler(Sampler[list[int]]):
    """Gives one rank its micro-batches, the numbers of their examples, through one epoch after the other.

    Every epoch has an order of its own. A step takes the next ``micro_batch_size · micro_batches · ranks`` examples of
    it, the last one of an epoch what is left. All ranks get as many micro-batches, because calling a model that is
    spread over ranks takes all of them; where the examples do not reach, a micro-batch is empty.

    Args:
        examples: how many there are.
        micro_batch_size: examples of a micro-batch.
        micro_batches: micro-batches that a rank has in a step.
        ranks: how many there are.
        rank: which of them this is.
        seed: of the orders.
    """

    def __init__(
        self, examples: int, micro_batch_size: int, micro_batches: int, ranks: int = 1, rank: int = 0, seed: int = 0
    ) -> None:
        self._examples = examples
        self._micro_batch_size = micro_batch_size
        self._step_examples = micro_batch_size * micro_batches * ranks
        self._ranks = ranks
        self._rank = rank
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        starts = range(0, self._examples, self._step_examples)
        return sum(self._micro_batches(min(self._step_examples, self._examples - start)) for start in starts)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(
            self._examples, generator=torch.Generator().manual_seed(self._seed + self._epoch)
        ).tolist()
        for start in range(0, self._examples, self._step_examples):
            step = order[start : start + self._step_examples]
            per_rank = math.ceil(len(step) / self._ranks)
            mine = step[self._rank * per_rank : (self._rank + 1) * per_rank]
            for number in range(self._micro_batches(len(step))):
                yield mine[number * self._micro_batch_size : (number + 1) * self._micro_batch_size]

    def _micro_batches(self, step_examples: int) -> int:
        return math.ceil(math.ceil(step_examples / self._ranks) / self._micro_batch_size)
