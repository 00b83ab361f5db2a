"""Causal attention without a padding mask.

Padding is on the right, and no token attends to a later one. So no token attends to padding, with or without a padding
mask. But the mask costs time: it rules out flash attention, it repeats the keys and values of grouped queries, and the
host waits to learn whether anything is masked. A model is compared with itself before its mask is left out.

Shapes: N response tokens of a batch, d hidden width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from adpa.data.batches import pad_sequences
from adpa.data.sequences import TokenSequence
from adpa.pipeline.models.attention import SDPA
from adpa.pipeline.models.lm_head import hidden_states

WITHOUT_PADDING = "adpa_sdpa_without_padding"
# Two responses of different lengths to one prompt, and one to another.
TRIAL = [
    TokenSequence(b"", np.array(prompt, dtype=np.int32), np.array(response, dtype=np.int32))
    for prompt, response in (([3, 4, 5], [6, 7, 8, 9]), ([3, 4, 5], [7, 6]), ([9, 3], [4, 8, 5]))
]


@torch.no_grad()
def leave_out_padding_mask(model: PreTrainedModel) -> None:
    """Makes a decoder compute right-padded sequences without a padding mask.

    The rest of a layer's own mask stays, sliding windows for example. A model keeps its mask if its attention is not
    sdpa, or if its hidden states differ without the mask.
    """
    if model.config._attn_implementation != SDPA:
        return
    training = model.training
    model.eval()
    expected_Nd = response_hidden(model, TRIAL)
    model.set_attn_implementation(WITHOUT_PADDING)
    if not same_hidden_states(model, response_hidden(model, TRIAL), expected_Nd):
        model.set_attn_implementation(SDPA)
    model.train(training)


def response_hidden(model: PreTrainedModel, sequences: Sequence[TokenSequence]) -> Tensor:
    """The hidden states of a padded batch that predict its response tokens, [N, d]."""
    padded = pad_sequences(sequences).to(model.device)
    return hidden_states(model, padded.input_ids, padded.attention_mask).flatten(0, 1)[padded.predicts]


def same_hidden_states(model: PreTrainedModel, actual: Tensor, expected: Tensor) -> bool:
    """Whether two tensors of hidden states agree up to the order of sums, which changes the last digits."""
    limit = relative_rounding(model, expected.dtype) ** (2 / 3) * expected.abs().amax()
    return bool(((actual - expected).abs() <= limit).all())


def relative_rounding(model: PreTrainedModel, dtype: torch.dtype) -> float:
    """The relative error of one number in a dtype.

    4-bit layers multiply in their own dtype, which may have fewer digits than the hidden states.
    """
    quantization = getattr(model.config, "quantization_config", None)
    product = getattr(quantization, "bnb_4bit_compute_dtype", dtype)
    return max(torch.finfo(product).eps, torch.finfo(dtype).eps)


def _mask(*, attention_mask: Tensor | None, **options: Any) -> Tensor | None:
    """A mask function for transformers: sdpa's mask of sequences without padding."""
    mask: Tensor | None = sdpa_mask(attention_mask=None, **options)
    return mask


AttentionInterface.register(WITHOUT_PADDING, sdpa_attention_forward)
AttentionMaskInterface.register(WITHOUT_PADDING, _mask)
