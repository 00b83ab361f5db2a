"""Scores with transformers. It runs anywhere, and all other engines are tested against it.

Shapes: N response rows of the batch, d hidden width.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adpa.pipeline.models.attention_mask import leave_out_padding_mask, response_hidden
from adpa.pipeline.models.checkpoint import Checkpoint
from adpa.pipeline.models.lm_head import check_head, read_head
from adpa.pipeline.models.padding import in_equal_lengths, split_rows, takes_right_padding
from adpa.pipeline.scoring.score import Batch
from adpa.pipeline.scoring.scorer_head import HeadScorer


def open_hf_scorer(checkpoint: Checkpoint, dtype: str, device: torch.device) -> HeadScorer:
    """Loads a model and checks that adpa knows its head, and whether it takes padded batches."""
    model = checkpoint.load(dtype, device).eval()
    check_head(model)
    leave_out_padding_mask(model)
    return HeadScorer(checkpoint.name, HfDecoder(model, takes_right_padding(model)), read_head(model))


class HfDecoder:
    """A ``Decoder`` of a transformers model.

    Args:
        model: the model.
        pads: whether it takes padded batches; else a batch is divided into batches of equal length.
    """

    def __init__(self, model: PreTrainedModel, pads: bool = True) -> None:
        self._model = model
        self._pads = pads

    def response_hidden(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """See ``Decoder.response_hidden``."""
        return map(self._hidden, batches)

    def close(self) -> None:
        """See ``Decoder.close``."""
        del self._model

    @torch.inference_mode()
    def _hidden(self, batch: Batch) -> Tensor:
        if self._pads:
            return response_hidden(self._model, batch)
        return torch.cat(
            in_equal_lengths(batch, len, lambda part: split_rows(response_hidden(self._model, part), part))
        )
