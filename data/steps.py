"""Which examples make an optimizer step, and which of them each rank takes at a time.

A step has the same examples on one rank and on many, with small micro-batches and large ones. So a run computes the
same on any number of ranks, and can resume on another number.
"""

import math
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class StepSampler(Sampler[list[int]]):
    """Yields the micro-batches of one rank for one epoch, each as the numbers of its examples.

    Every epoch has an order of its own. A step takes its next ``micro_batch_size · micro_batches · ranks`` examples;
    the last step of an epoch takes the rest. All ranks get the same number of micro-batches, because a sharded model
    needs every rank for each call. If the examples run out, a micro-batch is empty.

    Args:
        examples: number of examples.
        micro_batch_size: examples of a micro-batch.
        micro_batches: micro-batches of a rank in a step.
        ranks: number of ranks.
        rank: number of this rank.
        seed: seed of the orders.
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
        """Sets the epoch whose order comes next."""
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
