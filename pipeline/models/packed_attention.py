"""Runs a decoder on packed sequences: only attention has to tell the sequences of a row apart.

If the layer's mask is causal or a sliding window, and torch has a kernel for it, one call of variable-length attention
computes all sequences (``varlen_attention``). Otherwise the layer's own attention function (sdpa or eager, from
transformers) computes each piece: its queries, the keys and values of its whole sequence, and the part of the layer's
own mask between them. So a piece has the same attention as in its sequence alone: grouped queries, scaling, softcaps,
sinks and sliding windows are the model's, and no mask is larger than the longest sequence.

A layer that carries other information from token to token (a convolution, a state) would mix the sequences. So a model
is compared with itself on padded sequences first.

Shapes: T tokens of the row, M tokens of all sequences, L tokens of the longest sequence, S sequences, Q queries and K
keys of a piece, H heads, G heads of keys, D width of one.
"""

import inspect
import sys
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adpa.data.batches import pad_sequences
from adpa.data.packing import HostLengths, pack_sequences
from adpa.errors import ModelError
from adpa.pipeline.models.attention import EAGER, SDPA
from adpa.pipeline.models.attention_mask import TRIAL, same_hidden_states
from adpa.pipeline.models.lm_head import hidden_states
from adpa.pipeline.models.varlen_attention import CAUSAL, Varlen, compared_varlen


@dataclass(frozen=True)
class Piece:
    """Some queries of the row, and the keys that they see.

    Attributes:
        queries: the places of the piece in the row.
        keys: int64 [K], the places of its whole sequence if it shares its first keys with another piece; None: as
            ``queries``.
        shared: the number of shared keys.
        end: K.
        causal: bool [Q, K], for layers without their own mask; None if it shares no keys.
    """

    queries: slice
    keys: Tensor | None
    shared: int
    end: int
    causal: Tensor | None


@dataclass(frozen=True)
class Row:
    """The places of the sequences in a row: see ``PackedSequences``."""

    query_starts: Tensor
    key_starts: Tensor
    key_places: Tensor
    lengths: HostLengths

    @cached_property
    def pieces(self) -> list[Piece]:
        """The row cut into pieces."""
        pieces = []
        start = 0
        for queries, keys_K in zip(self.lengths.queries, self.key_places.split(self.lengths.keys), strict=True):
            own, end = slice(start, start + queries), len(keys_K)
            shared = end - queries
            causal_QK = keys_K.new_ones(queries, end, dtype=torch.bool).tril(shared) if shared else None
            pieces.append(Piece(own, keys_K if shared else None, shared, end, causal_QK))
            start = own.stop
        return pieces


@dataclass(frozen=True)
class Mask:
    """The model's mask of a layer, for a single sequence of L tokens.

    Attributes:
        dense: [1, 1, L, L] for the model's own attention function; None if that needs no mask.
        sees: transformers' mask function of the places of queries and keys.
        window: the size of the layer's local window; None without one.
        plain: whether the mask depends on the places alone and is causal.
    """

    dense: Tensor | None
    sees: Any
    window: int | None
    plain: bool

    def varlen_window(self, sliding_window: int | None) -> tuple[int, int] | None:
        """The ``window_size`` of ``varlen_attn`` for this mask; None if it is neither causal nor a sliding window.

        Args:
            sliding_window: the number of tokens that the layer sees, its own included, according to the layer.
        """
        if not self.plain:
            return None
        if self.dense is None:
            return CAUSAL
        if self.window is None or self.window != sliding_window or not self.slides:
            return None
        return self.window - 1, 0

    @cached_property
    def slides(self) -> bool:
        """Whether the window slides: it is not a chunk, and not wider or narrower by one.

        This is checked on the host, at the places where these would differ.
        """
        assert self.window is not None
        query_Q1 = torch.tensor([self.window - 1, self.window, self.window + 1, 2 * self.window])[:, None]
        key_K = torch.cat([torch.arange(3), self.window + torch.arange(-1, 3), 2 * self.window + torch.arange(-1, 2)])
        expected_QK = (key_K <= query_Q1) & (key_K > query_Q1 - self.window)
        return torch.equal(self.sees(torch.tensor(0), torch.tensor(0), query_Q1, key_K), expected_QK)


def packed_hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    key_places: Tensor,
    lengths: HostLengths,
) -> Tensor:
    """The decoder's output after its final norm, [1, T, d], of a model that ``allow_packing`` prepared.

    The other arguments are those of ``PackedSequences``.
    """
    output = model.base_model(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=input_ids.new_ones(1, max(lengths.keys)),  # the width that the masks need
        row=Row(query_starts, key_starts, key_places, lengths),
        use_cache=False,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def allow_packing(model: PreTrainedModel) -> None:
    """Prepares a decoder for packed sequences; from now on it takes only these, through ``packed_hidden_states``.

    The model may still be moved to a GPU: variable-length attention is compared with its reference on a device when a
    layer first uses it there.

    Raises:
        ModelError: the model cannot run them, or its hidden states differ from those of padded sequences.
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
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise _refusal(model, f"it fails on them: {error}") from error
    model.train(training)
    if not same_hidden_states(model, found_Nd, expected_Nd) and expected_Nd.isfinite().all():
        raise _refusal(model, "its hidden states are not those of padded ones")


def _refusal(model: PreTrainedModel, reason: str) -> ModelError:
    return ModelError(f"{type(model).__name__} cannot be given packed sequences: {reason}", "leave out --packing")


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | None,
    *,
    row: Row,
    own: str,
    position_ids: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers: one call for all sequences, or the model's own function for each piece.

    Args:
        module: the layer.
        query: [1, H, T, D].
        key: [1, G, T, D], where G divides H.
        value: like key.
        attention_mask: the result of ``packed_mask``; None if the model makes no masks.
        row: the places of the sequences.
        own: the name of the model's attention function.
        position_ids: of the row; not passed on, as a piece has other positions.
        options: options of the model's attention function.

    Returns:
        [1, T, H, D], and None for the weights.
    """
    window = None
    if own == SDPA and attention_mask is not None and sdpa_is_plain(module, options):
        window = attention_mask.varlen_window(options.get("sliding_window"))
    if window is not None and (attend := _varlen(query, key, value)) is not None:
        return attend_at_once(attend, query, key, value, row, window, options.get("scaling")), None
    dense = None if attention_mask is None else attention_mask.dense
    return attend_by_pieces(module, query, key, value, dense, row.pieces, own, options), None


def sdpa_is_plain(module: nn.Module, options: dict[str, Any]) -> bool:
    """Whether ``varlen_attn`` supports all of a layer's options for transformers' sdpa."""
    causal = options.get("is_causal")
    return (
        options.get("dropout", 0.0) == 0
        and all(options.get(name) is None for name in ("softcap", "s_aux", "position_bias"))
        and (getattr(module, "is_causal", True) if causal is None else causal)
    )


def _varlen(query: Tensor, key: Tensor, value: Tensor) -> Varlen | None:
    """``varlen_attn`` if it computes such a layer correctly here; else None."""
    (_, heads, _, width), groups = query.shape, key.shape[1]
    return compared_varlen(query.device, _dtype(query), heads, groups, width) if value.shape[3] == width else None


def _dtype(query: Tensor) -> torch.dtype:
    """The dtype that sdpa computes in: autocast casts the inputs of sdpa, but not those of ``varlen_attn``."""
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


def attend_at_once(
    attend: Varlen,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: Row,
    window: tuple[int, int],
    scale: float | None,
) -> Tensor:
    """Computes all sequences by one call of ``varlen_attn``, [1, T, H, D]."""
    query_THD, key_MGD, value_MGD = (each[0].transpose(0, 1).to(_dtype(query)) for each in (query, key, value))
    if len(row.key_places) != len(query_THD):  # else the keys are already in the order of the row
        key_MGD, value_MGD = (each.index_select(0, row.key_places) for each in (key_MGD, value_MGD))
    output_THD = attend(
        query_THD,
        key_MGD,
        value_MGD,
        row.query_starts,
        row.key_starts,
        max(row.lengths.queries),
        max(row.lengths.keys),
        scale=scale,
        window_size=window,
        enable_gqa=query_THD.shape[1] != key_MGD.shape[1],
    )
    return output_THD[None].contiguous()


def attend_by_pieces(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dense: Tensor | None,
    pieces: list[Piece],
    own: str,
    options: dict[str, Any],
) -> Tensor:
    """Computes each piece by the model's own attention function, [1, T, H, D]."""
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)  # from the model's file
    function = ALL_ATTENTION_FUNCTIONS.get_interface(own, eager)
    outputs = []
    for piece in pieces:
        mask = piece.causal if dense is None else dense[:, :, piece.shared : piece.end, : piece.end]
        keys, values = (
            each[:, :, piece.queries] if piece.keys is None else each.index_select(2, piece.keys)
            for each in (key, value)
        )
        outputs.append(function(module, query[:, :, piece.queries], keys, values, mask, **options)[0])
    return torch.cat(outputs, dim=1)


def packed_mask(
    *,
    own: str,
    batch_size: int,
    q_length: int,
    attention_mask: Tensor,
    mask_function: Any,
    allow_is_causal_skip: bool,
    local_size: int | None = None,
    **options: Any,
) -> Mask:
    """A mask function for transformers: calls the model's own mask function for a single sequence of L tokens.

    transformers allows the causal skip only for a causal mask without additions other than ``local_size``.
    """
    dense = ALL_MASK_ATTENTION_FUNCTIONS[own](
        batch_size=1,
        q_length=attention_mask.shape[1],
        attention_mask=None,
        mask_function=mask_function,
        allow_is_causal_skip=allow_is_causal_skip,
        local_size=local_size,
        **options,
    )
    return Mask(dense, mask_function, local_size, allow_is_causal_skip)
