"""Scores with transformers. It runs anywhere, and all other engines are tested against it.

Shapes: B sequences, L tokens, N response rows of the batch, d hidden width.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adpa.data.batches import pad_sequences
from adpa.pipeline.models.attention_mask import leave_out_padding_mask
from adpa.pipeline.models.checkpoint import Checkpoint
from adpa.pipeline.models.lm_head import check_head, hidden_states, read_head
from adpa.pipeline.scoring.score import Batch
from adpa.pipeline.scoring.scorer_head import HeadScorer


def open_hf_scorer(checkpoint: Checkpoint, dtype: str, device: torch.device) -> HeadScorer:
    """Loads a model and checks that adpa knows its head."""
    model = checkpoint.load(dtype, device).eval()
    check_head(model)
    leave_out_padding_mask(model)
    return HeadScorer(checkpoint.name, HfDecoder(model), read_head(model))


class HfDecoder:
    """A ``Decoder`` of a transformers model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def response_hidden(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """See ``Decoder.response_hidden``."""
        return map(self._hidden, batches)

    def close(self) -> None:
        """See ``Decoder.close``."""
        del self._model

    @torch.inference_mode()
    def _hidden(self, batch: Batch) -> Tensor:
        padded = pad_sequences(batch).to(self._model.device)
        hidden_BLd = hidden_states(self._model, padded.input_ids, padded.attention_mask)
        return hidden_BLd.flatten(0, 1)[padded.predicts]
