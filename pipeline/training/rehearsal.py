"""The rehearsal before the first step: computes the largest micro-batch, so that a run that does not fit fails early.

Memory is also taken for numbers that later steps keep: AdamW's moments, and DDP's copy of the gradient.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from adpa.data.batches import TrainingExamples, computed_tokens
from adpa.data.sequences import Packing
from adpa.data.steps import StepSampler
from adpa.errors import OptionError


def largest_micro_batch(sampler: StepSampler, examples: TrainingExamples, epochs: int, packing: Packing) -> list[int]:
    """The micro-batch of a rank, over all epochs, with the most tokens to compute; as the numbers of its examples."""
    largest, most = list[int](), 0
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for numbers in filter(None, sampler):
            if (tokens := computed_tokens(_lengths(examples, numbers), packing)) > most:
                largest, most = numbers, tokens
    return largest


def copies_to_come(optimizer: object, copies_gradient: bool) -> int:
    """Numbers that training will keep for each trained one, beside its gradient, and does not keep yet.

    Args:
        optimizer: torch's optimizer, or accelerate's wrapper of it; None before it exists.
        copies_gradient: whether DDP keeps a copy of the gradient.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    moments = 2 if isinstance(optimizer, torch.optim.AdamW) and not optimizer.state else 0
    return moments + copies_gradient


def fits_in_memory(
    model: nn.Module, compute_loss: Callable[[], Tensor], passes: int, copies: int, device: torch.device
) -> bool:
    """Computes the gradient of a loss several times, with dropout; restores the random state, and leaves the gradient.

    Args:
        model: the student.
        compute_loss: the forward pass.
        passes: 2 where a step has several micro-batches: the first one's gradient takes memory during the second.
        copies: see ``copies_to_come``.
        device: the device of the student.

    Returns:
        False if the device ran out of memory. Then no tensor of the attempt is left.
    """
    try:
        _compute_gradient(model, compute_loss, passes, copies, device)
    except torch.OutOfMemoryError:
        return False
    return True


def _compute_gradient(
    model: nn.Module, compute_loss: Callable[[], Tensor], passes: int, copies: int, device: torch.device
) -> None:
    trained = [each for each in model.parameters() if each.requires_grad]
    held = [torch.empty_like(each) for each in trained for _ in range(copies)]
    model.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for _ in range(passes):
            compute_loss().backward()
    del held


def no_memory(examples: TrainingExamples, numbers: Sequence[int], micro_batch_size: int, device: object) -> OptionError:
    """The error for a micro-batch that does not fit."""
    lengths = _lengths(examples, numbers)
    return OptionError(
        f"--micro-batch-size {micro_batch_size}: {device} has no memory for {len(lengths)} sequences of up to "
        f"{max(lengths)} tokens",
        "lower it, or use --packing, --gradient-checkpointing or --lora-rank",
    )


def _lengths(examples: TrainingExamples, numbers: Sequence[int]) -> list[int]:
    return [length for number in numbers for length in examples.lengths(number)]
