"""A decoder on packed sequences: whatever acts on each token alone runs on the row as it is, attention does not.

Where the layer's mask is plain causal, or a sliding window, and torch has a kernel for it, one call of
variable-length attention computes all sequences (``varlen_attention``). Everywhere else the layer's own attention
function (sdpa or eager, of transformers) computes each piece: its queries, the keys and values at the places of its
whole sequence, and the part of the layer's own mask that lies between them. So a piece gets what its sequence gets
alone: grouped queries, scaling, softcaps, sinks and sliding windows are the model's, and no mask is larger than the
longest sequence. A layer that carries something from token to token beside attention (a convolution, a state) would mix
the sequences; so a model is compared with itself on padded sequences before it is trusted.

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
from adpa.pipeline.models.attention_mask import SDPA, TRIAL, same_hidden_states
from adpa.pipeline.models.lm_head import hidden_states
from adpa.pipeline.models.varlen_attention import CAUSAL, Varlen, compared_varlen

EAGER = "eager"


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


@dataclass(frozen=True)
class Row:
    """Where the sequences are in a row: see ``PackedSequences``."""

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
    """What a layer sees of a single sequence of L tokens, as the model says.

    Attributes:
        dense: [1, 1, L, L] for the model's own attention function, or None where that needs none.
        sees: transformers' function of the places of queries and keys that says it.
        window: how many tokens back it may be limited to, or None.
        plain: whether it depends on the places alone and lets nothing see what comes after it.
    """

    dense: Tensor | None
    sees: Any
    window: int | None
    plain: bool

    def varlen_window(self, sliding_window: int | None) -> tuple[int, int] | None:
        """What ``varlen_attn`` has to be given for it; None if it is neither causal nor a sliding window.

        Args:
            sliding_window: how many tokens the layer says that it sees, the own one included.
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
        """Whether the window is a sliding one: not a chunk, nor wider or narrower by one.

        Found out on the host, at the places where these would differ.
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
        attention_mask=input_ids.new_ones(1, max(lengths.keys)),  # as wide as the masks have to be
        row=Row(query_starts, key_starts, key_places, lengths),
        use_cache=False,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def allow_packing(model: PreTrainedModel) -> None:
    """Makes a decoder take packed sequences, and those alone, through ``packed_hidden_states``.

    On a GPU, variable-length attention is compared with its reference when a layer first needs it there; the model may
    still be elsewhere now.

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
    """An attention function of transformers: one call for all sequences, or the model's own one, piece by piece.

    Args:
        module: the layer.
        query: [1, H, T, D].
        key: [1, G, T, D], where G divides H.
        value: like key.
        attention_mask: what ``packed_mask`` gave, or None of a model that makes no masks.
        row: where the sequences are.
        own: the name of the model's attention function.
        position_ids: those of the row, which are no piece's.
        options: for that function.

    Returns:
        [1, T, H, D], and no weights.
    """
    window = None
    if own == SDPA and attention_mask is not None and sdpa_is_plain(module, options):
        window = attention_mask.varlen_window(options.get("sliding_window"))
    if window is not None and (attend := _varlen(query, key, value)) is not None:
        return attend_at_once(attend, query, key, value, row, window, options.get("scaling")), None
    dense = None if attention_mask is None else attention_mask.dense
    return attend_by_pieces(module, query, key, value, dense, row.pieces, own, options), None


def sdpa_is_plain(module: nn.Module, options: dict[str, Any]) -> bool:
    """Whether a layer's options for transformers' sdpa ask for nothing that ``varlen_attn`` cannot do."""
    causal = options.get("is_causal")
    return (
        options.get("dropout", 0.0) == 0
        and all(options.get(name) is None for name in ("softcap", "s_aux", "position_bias"))
        and (getattr(module, "is_causal", True) if causal is None else causal)
    )


def _varlen(query: Tensor, key: Tensor, value: Tensor) -> Varlen | None:
    """``varlen_attn``, if it is to be trusted with such a layer."""
    (_, heads, _, width), groups = query.shape, key.shape[1]
    return compared_varlen(query.device, _dtype(query), heads, groups, width) if value.shape[3] == width else None


def _dtype(query: Tensor) -> torch.dtype:
    """The dtype that sdpa computes in: autocast casts for it, but not for ``varlen_attn``."""
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
    """All sequences by one call of ``varlen_attn``, [1, T, H, D]."""
    query_THD, key_MGD, value_MGD = (each[0].transpose(0, 1).to(_dtype(query)) for each in (query, key, value))
    if len(row.key_places) != len(query_THD):  # otherwise the keys are those of the row, in its order
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
    """Each piece by the model's own attention function, [1, T, H, D]."""
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)  # as the file has it
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
    """A mask function of transformers: what the model's own one says of a single sequence of L tokens.

    transformers allows no causal skip where anything is laid over a causal mask but a limit to ``local_size``.
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
