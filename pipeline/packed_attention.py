"""A decoder on packed sequences: whatever acts on each token alone runs on the row as it is, attention piece by piece.

The layer's own attention function (sdpa or eager, of transformers) computes each piece: its queries, the keys and
values at the places of its whole sequence, and the part of the layer's own mask that lies between them. So a piece gets
what its sequence gets alone: grouped queries, scaling, softcaps, sinks and sliding windows are the model's, and no mask
is larger than the longest sequence. A layer that carries something from token to token beside attention (a convolution,
a state) would mix the sequences; so a model is compared with itself on padded sequences before it is trusted.

Shapes: T tokens of the row, L tokens of the longest sequence, Q queries and K keys of a piece, H heads, D width of one.
"""

import inspect
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adpa.data.batches import pad_sequences
from adpa.data.packing import pack_sequences
from adpa.data.sequences import TokenSequence
from adpa.errors import ModelError
from adpa.pipeline.lm_head import hidden_states

SDPA, EAGER = "sdpa", "eager"
# Two responses of different lengths to one prompt, and one to another.
TRIAL = [
    TokenSequence(b"", np.array(prompt, dtype=np.int32), np.array(response, dtype=np.int32))
    for prompt, response in (([3, 4, 5], [6, 7, 8, 9]), ([3, 4, 5], [7, 6]), ([9, 3], [4, 8, 5]))
]


@dataclass(frozen=True)
class Piece:
    """Queries of the row and what they see.

    Attributes:
        queries: the places of the piece.
        keys: int64 [K], the places of its sequence, where another piece has the first of them; or None: the same.
        shared: how many another piece has.
        end: K.
        causal: bool [Q, K] where another piece has some, for layers without a mask of their own.
    """

    queries: slice
    keys: Tensor | None
    shared: int
    end: int
    causal: Tensor | None


def make_pieces(query_lengths: Tensor, key_lengths: Tensor, key_places: Tensor) -> list[Piece]:
    """The pieces of ``PackedSequences``."""
    pieces = []
    start = 0
    for queries, keys_K in zip(query_lengths.tolist(), key_places.split(key_lengths.tolist()), strict=True):
        own, end = slice(start, start + queries), len(keys_K)
        shared = end - queries
        causal_QK = keys_K.new_ones(queries, end, dtype=torch.bool).tril(shared) if shared else None
        pieces.append(Piece(own, keys_K if shared else None, shared, end, causal_QK))
        start = own.stop
    return pieces


def packed_hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    query_lengths: Tensor,
    key_lengths: Tensor,
    key_places: Tensor,
) -> Tensor:
    """The decoder's output after its final norm, [1, T, d], of a model that ``allow_packing`` prepared.

    The other arguments are those of ``PackedSequences``.
    """
    output = model.base_model(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=input_ids.new_ones(1, int(key_lengths.max())),  # as wide as the masks have to be
        pieces=make_pieces(query_lengths, key_lengths, key_places),
        use_cache=False,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def allow_packing(model: PreTrainedModel) -> None:
    """Makes a decoder take packed sequences, and those alone, through ``packed_hidden_states``.

    Raises:
        ModelError: it cannot, or it gives other hidden states than on padded sequences.
    """
    own = model.config._attn_implementation
    if own not in (SDPA, EAGER):
        raise _refusal(model, f"its attention is {own}; expected {SDPA} or {EAGER}")
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise _refusal(model, "it takes no positions")
    training = model.training
    model.eval()
    padded = pad_sequences(TRIAL).to(model.device)
    packed = dict(vars(pack_sequences(TRIAL, share_prompts=True).to(model.device)))
    predicts, _ = packed.pop("predicts"), packed.pop("labels")
    with torch.no_grad():
        expected_Nd = hidden_states(model, padded.input_ids, padded.attention_mask).flatten(0, 1)[padded.predicts]
        name = f"adpa_packed_{own}"
        AttentionInterface.register(name, partial(packed_attention, own=own))
        AttentionMaskInterface.register(name, partial(packed_mask, own=own))
        model.set_attn_implementation(name)
        try:
            found_Nd = packed_hidden_states(model, **packed)[0, predicts]
        except (RuntimeError, TypeError, ValueError) as error:
            raise _refusal(model, f"it fails on them: {error}") from error
    model.train(training)
    # The order of sums differs, which costs some of the last digits.
    tolerance = torch.finfo(model.dtype).eps ** (2 / 3) * expected_Nd.abs().amax()
    if not ((found_Nd - expected_Nd).abs() <= tolerance).all() and expected_Nd.isfinite().all():
        raise _refusal(model, "its hidden states are not those of padded ones")


def _refusal(model: PreTrainedModel, reason: str) -> ModelError:
    return ModelError(f"{type(model).__name__} cannot be given packed sequences: {reason}", "leave out --packing")


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    pieces: list[Piece],
    own: str,
    position_ids: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: the model's own one, piece by piece.

    Args:
        module: the layer.
        query: [1, H, T, D].
        key: [1, G, T, D], where G divides H.
        value: like key.
        attention_mask: what ``packed_mask`` gave: [1, 1, L, L], or None for a plain causal mask.
        pieces: of the row.
        own: the name of the model's attention function.
        position_ids: those of the row, which are no piece's.
        options: for that function.

    Returns:
        [1, T, H, D], and no weights.
    """
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)  # as the file has it
    function = ALL_ATTENTION_FUNCTIONS.get_interface(own, eager)
    outputs = []
    for piece in pieces:
        mask = piece.causal if attention_mask is None else attention_mask[:, :, piece.shared : piece.end, : piece.end]
        keys, values = (
            each[:, :, piece.queries] if piece.keys is None else each.index_select(2, piece.keys)
            for each in (key, value)
        )
        outputs.append(function(module, query[:, :, piece.queries], keys, values, mask, **options)[0])
    return torch.cat(outputs, dim=1), None


def packed_mask(*, own: str, batch_size: int, q_length: int, attention_mask: Tensor, **options: Any) -> Tensor | None:
    """A mask function of transformers: the model's own one for a single sequence of L tokens."""
    function = ALL_MASK_ATTENTION_FUNCTIONS[own]
    mask: Tensor | None = function(batch_size=1, q_length=attention_mask.shape[1], attention_mask=None, **options)
    return mask
