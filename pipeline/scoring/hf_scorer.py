"""Scores with transformers. It runs anywhere, and all other engines are tested against it.

Shapes: N response rows of the batch, d hidden width.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adpa.pipeline.models.attention_mask import leave_out_padding_mask, response_hidden
from adpa.pipeline.models.checkpoint import Checkpoint
from adpa.pipeline.models.lm_head import check_head, read_head
from adpa.pipeline.models.padding import Grouping, choose_grouping, in_groups, response_rows, trial_sequences
from adpa.pipeline.scoring.score import Batch
from adpa.pipeline.scoring.scorer_head import HeadScorer


def open_hf_scorer(checkpoint: Checkpoint, dtype: str, device: torch.device) -> HeadScorer:
    """Loads a model and checks that adpa knows its head, and whether it takes padded batches."""
    return hf_scorer(checkpoint.name, checkpoint.load(dtype, device).eval())


def hf_scorer(name: str, model: PreTrainedModel) -> HeadScorer:
    """A scorer of a loaded model."""
    check_head(model)
    leave_out_padding_mask(model)
    grouping = choose_grouping(model, trial_sequences(model), len, partial(response_rows, model))
    return HeadScorer(name, HfDecoder(model, grouping), read_head(model))


class HfDecoder:
    """A ``Decoder`` of a transformers model."""

    def __init__(self, model: PreTrainedModel, grouping: Grouping = "padded") -> None:
        self._model = model
        self._grouping = grouping

    def response_hidden(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """See ``Decoder.response_hidden``."""
        return map(self._hidden, batches)

    def close(self) -> None:
        """See ``Decoder.close``."""
        del self._model

    @torch.inference_mode()
    def _hidden(self, batch: Batch) -> Tensor:
        if self._grouping == "padded":
            return response_hidden(self._model, batch)
        return torch.cat(in_groups(self._grouping, batch, len, partial(response_rows, self._model)))
