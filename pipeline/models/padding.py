"""Models whose padded batches have other numbers than single sequences.

Some architectures ignore the padding mask, or only in a part of their layers. So a model is compared with itself on a
few tokens before it is used: padded batches against single sequences.

Shapes: N response tokens of a batch, T of a sequence, d hidden width.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from adpa.data.sequences import TokenSequence
from adpa.errors import ModelError
from adpa.pipeline.models.attention_mask import relative_rounding, response_hidden, same_hidden_states

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

# Tokens of prompt and response. Two prompts have the same length, and so have two of the sequences.
TRIAL_LENGTHS = ((5, 2), (2, 3), (3, 2), (3, 1))


def trial_sequences(model: PreTrainedModel) -> list[TokenSequence]:
    """Sequences to compare a model on; their tokens are spread over the vocabulary."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    count = sum(map(sum, TRIAL_LENGTHS))
    ids = iter(np.arange(1, count + 1) * vocabulary // (count + 1))
    return [
        TokenSequence(b"", *(np.array([next(ids) for _ in range(length)], dtype=np.int32) for length in lengths))
        for lengths in TRIAL_LENGTHS
    ]


@torch.no_grad()
def takes_padding(
    model: PreTrainedModel,
    trial: Sequence[Item],
    length: Callable[[Item], int],
    compute: Callable[[Sequence[Item]], Sequence[Tensor]],
    alone: Sequence[Tensor],
) -> bool:
    """Whether a padded batch has the numbers of single sequences. If not, logs a warning.

    Args:
        model: the model, in eval mode.
        trial: the items to compare it on.
        length: of an item, without padding.
        compute: the numbers of each item of a batch.
        alone: the expected numbers of each item.

    Raises:
        ModelError: not even batches of equal length have them.
    """
    name, expected = type(model).__name__, torch.cat(list(alone)).nan_to_num()
    if same_hidden_states(model, torch.cat(list(compute(trial))).nan_to_num(), expected):
        return True
    found = torch.cat(in_equal_lengths(trial, length, compute)).nan_to_num()
    if not _nearly_same(model, found, expected):
        raise ModelError(
            f"{name}: its numbers for a sequence in a batch, or token by token, are not those for the sequence alone",
            "use --engine vllm if it runs the model, or another model",
        )
    logger.warning(
        "%s has other numbers for a sequence in a padded batch than for the sequence alone; its batches are divided "
        "into smaller ones of equal length, which takes longer",
        name,
    )
    return False


def takes_right_padding(model: PreTrainedModel) -> bool:
    """``takes_padding`` for the hidden states of response tokens, as scoring reads them."""
    trial = trial_sequences(model)
    alone = [response_hidden(model, [sequence]) for sequence in trial]
    return takes_padding(model, trial, len, lambda batch: split_rows(response_hidden(model, batch), batch), alone)


@torch.no_grad()
def check_padding(model: PreTrainedModel) -> None:
    """Checks that the hidden states of a padded batch are those of single sequences.

    Raises:
        ModelError: they are not.
    """
    trial = trial_sequences(model)
    training = model.training
    model.eval()
    found_Nd = response_hidden(model, trial).nan_to_num()
    expected_Nd = torch.cat([response_hidden(model, [sequence]) for sequence in trial]).nan_to_num()
    model.train(training)
    if not _nearly_same(model, found_Nd, expected_Nd):
        raise ModelError(
            f"{type(model).__name__} cannot be trained: its hidden states of a sequence in a padded batch are not those "
            "of the sequence alone",
            "use a student of another architecture",
        )


def split_rows(rows_Nd: Tensor, batch: Sequence[TokenSequence]) -> list[Tensor]:
    """The rows of each sequence of a batch, [T, d]."""
    return list(rows_Nd.split([len(sequence.response_ids) for sequence in batch]))


def in_equal_lengths(
    items: Sequence[Item], length: Callable[[Item], int], compute: Callable[[Sequence[Item]], Sequence[Result]]
) -> list[Result]:
    """Computes batches of equal length; the results are in the order of the items."""
    places_of = defaultdict(list)
    for place, item in enumerate(items):
        places_of[length(item)].append(place)
    results: dict[int, Result] = {}
    for places in places_of.values():
        results |= zip(places, compute([items[place] for place in places]), strict=True)
    return [results[place] for place in range(len(items))]


def _nearly_same(model: PreTrainedModel, actual: Tensor, expected: Tensor) -> bool:
    """Whether two tensors agree on the whole, which is how a model is judged before it is refused.

    In 16 bits the order of sums can send a token to another expert, and a single row differs by more than rounding.
    """
    error = (actual.float() - expected.float()).norm()
    return bool(error <= relative_rounding(model, expected.dtype) ** (1 / 3) * expected.float().norm())
