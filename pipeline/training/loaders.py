"""The loaders of a run: micro-batches to train on, and batches of held-out examples."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler
from transformers import TrainingArguments

from adpa.data.batches import TrainingExamples
from adpa.data.steps import StepSampler


class StepLoader(DataLoader[Any]):
    """A loader that passes the epoch from Trainer to its sampler."""

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that comes next."""
        assert isinstance(self.batch_sampler, StepSampler)
        self.batch_sampler.set_epoch(epoch)

    def close(self) -> None:
        """Ends persistent workers. The garbage collector would close their queues first, and wait for seconds."""
        self._iterator = None


class HeldOutBatches(Sampler[list[int]]):
    """The batches of one rank, as the numbers of their examples: long examples first.

    All ranks have the same number of batches, because a sharded model needs every rank for each call. A batch may be
    empty.
    """

    def __init__(self, examples: TrainingExamples, batch_size: int, ranks: int, rank: int) -> None:
        order = sorted(range(len(examples)), key=lambda number: -max(examples.lengths(number)))
        mine = order[rank::ranks]
        count = math.ceil(math.ceil(len(order) / ranks) / batch_size)
        self._batches = [mine[place * batch_size :][:batch_size] for place in range(count)]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)


def loading(args: TrainingArguments) -> dict[str, Any]:
    """What both loaders have in common."""
    return {
        "num_workers": args.dataloader_num_workers,
        # A worker inherits the cache's memory maps and the collator from this process, and touches no GPU.
        "multiprocessing_context": "fork" if args.dataloader_num_workers else None,
        "pin_memory": args.dataloader_pin_memory,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "generator": torch.Generator(),  # its own, so that a loader takes no random number from training
    }
