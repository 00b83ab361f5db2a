"""Models whose padded batches have other numbers than single sequences.

Some architectures ignore the padding mask, and a few mix the sequences of a batch. So a model is compared with itself
on a few tokens before it is used: a padded batch against single sequences.

Shapes: N response tokens of a batch, T of a sequence, d hidden width.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

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

# A batch as it is, divided into batches of equal length, or one item at a time.
Grouping = Literal["padded", "equal lengths", "single"]
# Tokens of prompt and response. Two prompts have the same length, and so have two of the sequences. One prompt is a
# single token after other prompts: RecurrentGemma takes it for the next token of the prompt before.
TRIAL_LENGTHS = ((5, 2), (3, 1), (3, 2), (1, 4))


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
def choose_grouping(
    model: PreTrainedModel,
    trial: Sequence[Item],
    length: Callable[[Item], int],
    compute: Callable[[Sequence[Item]], Sequence[Tensor]],
) -> Grouping:
    """The largest groups in which a model computes what it computes for each item alone. Warns if none may be padded.

    Args:
        model: the model, in eval mode.
        trial: the items to compare it on.
        length: of an item, without padding.
        compute: the numbers of each item of a batch.
    """
    alone = finite_rows([compute([item])[0] for item in trial])
    if same_hidden_states(model, finite_rows(compute(trial)), alone):
        return "padded"
    grouping: Grouping = "equal lengths"
    if not same_hidden_states(model, finite_rows(in_groups(grouping, trial, length, compute)), alone):
        grouping = "single"
    logger.warning(
        "%s has other numbers for a sequence in a padded batch than for the sequence alone; it takes %s, and more time",
        type(model).__name__,
        {"equal lengths": "batches of equal length", "single": "one sequence at a time"}[grouping],
    )
    return grouping


def in_groups(
    grouping: Grouping,
    items: Sequence[Item],
    length: Callable[[Item], int],
    compute: Callable[[Sequence[Item]], Sequence[Result]],
) -> list[Result]:
    """Computes a batch group by group; the results are in the order of the items."""
    if grouping == "padded":
        return list(compute(items))
    places_of = defaultdict(list)
    for place, item in enumerate(items):
        places_of[length(item) if grouping == "equal lengths" else place].append(place)
    results: dict[int, Result] = {}
    for places in places_of.values():
        results |= zip(places, compute([items[place] for place in places]), strict=True)
    return [results[place] for place in range(len(items))]


def response_rows(model: PreTrainedModel, batch: Sequence[TokenSequence]) -> list[Tensor]:
    """The hidden states that predict the response tokens of each sequence of a batch, [T, d]."""
    return list(response_hidden(model, batch).split([len(sequence.response_ids) for sequence in batch]))


@torch.no_grad()
def check_padding(model: PreTrainedModel) -> None:
    """Checks that the hidden states of a padded batch are those of single sequences.

    Raises:
        ModelError: they are not.
    """
    trial = trial_sequences(model)
    training = model.training
    model.eval()
    found_Nd = finite_rows(response_rows(model, trial))
    expected_Nd = finite_rows([response_hidden(model, [sequence]) for sequence in trial])
    model.train(training)
    if not nearly_same(model, found_Nd, expected_Nd):
        raise ModelError(
            f"{type(model).__name__} cannot be trained: sequences have other hidden states in a padded batch",
            "use a student of another architecture",
        )


def nearly_same(model: PreTrainedModel, actual: Tensor, expected: Tensor) -> bool:
    """Whether two tensors agree on the whole.

    In 16 bits the order of sums can send a token to another expert, and then a single row differs by more than
    rounding. So a model is judged like this before it is refused.
    """
    error = (actual.float() - expected.float()).norm()
    return bool(error <= relative_rounding(model, expected.dtype) ** (1 / 4) * expected.float().norm())


def finite_rows(rows: Sequence[Tensor]) -> Tensor:
    """All rows, with 0 for numbers that are not finite: a model may have −∞ for a token, and others refuse NaN."""
    return torch.cat(list(rows)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
