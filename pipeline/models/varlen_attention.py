"""Attention of packed sequences in one call: torch's ``varlen_attn``, a reference, and their comparison.

Shapes: T queries of all pieces, M keys of all sequences, H heads of queries, G heads of keys (G divides H), D width of
one, S sequences, Q queries and K keys of one of them.
"""

import inspect
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from adpa.errors import ModelError

# The arguments of torch.nn.attention.varlen.varlen_attn that we need; torch 2.13 has them.
Varlen = Callable[..., Any]
OPTIONS = {"scale", "window_size", "enable_gqa"}
CAUSAL = (-1, 0)
WIDE_BACKWARD = ((8, 0), (9, 0))  # the GPUs whose backward pass supports widths above 192


def find_varlen(device: torch.device, dtype: torch.dtype, width: int) -> Varlen | None:
    """torch's ``varlen_attn`` if it supports the device, dtype and width; else None."""
    if dtype not in (torch.bfloat16, torch.float16) or width % 8 or width > 256:
        return None
    if device.type != "cuda" or not torch.backends.cuda.is_flash_attention_available():
        return None
    capability = torch.cuda.get_device_capability(device)
    if torch.version.cuda is None or capability < (8, 0) or (width > 192 and capability not in WIDE_BACKWARD):
        return None
    return varlen_attn if inspect.signature(varlen_attn).parameters.keys() >= OPTIONS else None


@cache
def compared_varlen(device: torch.device, dtype: torch.dtype, heads: int, groups: int, width: int) -> Varlen | None:
    """The result of ``find_varlen``. The first call for a device and such a layer compares it with the reference.

    Raises:
        ModelError: it differs from the reference.
    """
    attend = find_varlen(device, dtype, width)
    if attend is not None:
        compare_varlen(attend, device, dtype, heads, groups, width)
    return attend


@torch.no_grad()  # so that it does not disturb gradient checkpointing
def compare_varlen(
    attend: Varlen, device: torch.device, dtype: torch.dtype, heads: int, groups: int, width: int
) -> None:
    """Compares a function with the reference, with and without a window; some sequences have more keys than queries.

    Raises:
        ModelError: it differs from the reference.
    """
    queries, keys = (1, 3, 130, 2, 5), (1, 3, 130, 200, 9)
    generator = torch.Generator().manual_seed(0)  # its own, so that the random numbers of training stay the same
    query, key, value = (
        torch.randn(sum(lengths), count, width, generator=generator).to(device, dtype)
        for lengths, count in ((queries, heads), (keys, groups), (keys, groups))
    )
    starts_q, starts_k = (
        torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        for lengths in (queries, keys)
    )
    for window in (CAUSAL, (3, 0)):
        arguments = (starts_q, starts_k, max(queries), max(keys))
        options = {"scale": 1.5 * width**-0.5, "window_size": window, "enable_gqa": heads != groups}
        actual = attend(query, key, value, *arguments, **options).double()
        expected = varlen_reference(query.double(), key.double(), value.double(), *arguments, **options)
        tolerance = torch.finfo(dtype).eps ** (2 / 3) * expected.abs().amax()
        if not ((actual - expected).abs() <= tolerance).all():
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else device
            raise ModelError(f"torch {torch.__version__}: varlen_attn is wrong on {name}", "leave out --packing")


def varlen_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """The definition of ``torch.nn.attention.varlen.varlen_attn``, computed in the dtype of the arguments.

    Args:
        query: [T, H, D].
        key: [M, G, D].
        value: like key.
        cu_seq_q: int32 [S + 1], where the queries of each sequence begin.
        cu_seq_k: int32 [S + 1], where its keys begin.
        max_q: the most queries of a sequence.
        max_k: the most keys of one.
        scale: of the scores; default: 1 / √D.
        window_size: the numbers of keys that a query sees before and after its own place; −1: all. The last query has
            the place of the last key.
        enable_gqa: allow G < H.

    Returns:
        [T, H, D].
    """
    assert enable_gqa or query.shape[1] == key.shape[1]
    before, after = window_size
    repeats = query.shape[1] // key.shape[1]
    outputs = []
    for queries, keys in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True):
        query_HQD = query[slice(*queries)].transpose(0, 1)
        key_HKD, value_HKD = (each[slice(*keys)].transpose(0, 1).repeat_interleave(repeats, 0) for each in (key, value))
        key_K = torch.arange(key_HKD.shape[1], device=query.device)
        place_Q1 = key_K[len(key_K) - query_HQD.shape[1] :, None]
        seen_QK = torch.ones(len(place_Q1), len(key_K), dtype=torch.bool, device=query.device)
        if before >= 0:
            seen_QK &= key_K >= place_Q1 - before
        if after >= 0:
            seen_QK &= key_K <= place_Q1 + after
        scores_HQK = query_HQD @ key_HKD.transpose(1, 2) * (query.shape[2] ** -0.5 if scale is None else scale)
        weights_HQK = scores_HQK.masked_fill(~seen_QK, -torch.inf).softmax(2)
        outputs.append((weights_HQK @ value_HKD).transpose(0, 1))
        assert query_HQD.shape[1] <= max_q
        assert len(key_K) <= max_k
    return torch.cat(outputs)
