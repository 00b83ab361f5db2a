"""The row kernel of the loss head: one program turns one row of logits into its three losses and its gradient.

`adpa.kernels.head` has the derivation. Outside S every gradient is the same multiple of the softmax over the tail. So
a program works in place and passes over its row twice:

    1. read the K logits of S and the label's; write −inf in their K places
    2. stream the row once: the tail's largest logit m and its mass Σ exp(z_j − m), the sum running in float32
       under a running maximum
    3. from these and the K logits: log q_k, log q_T, the losses, and the K + 1 gradients of the outcomes
    4. stream the row again, last tile first, because the L2 cache still holds its end: write
       exp(z_j − m) · gradient_T / mass, which is 0 in the places of S
    5. write the K gradients into their places, and the label's if it is not in S

Memory traffic is mostly the row: 2·V numbers are read and V written, and a few K beside them. A tile is a matrix of
lanes, each a vector of 16 bytes that one thread loads at once. Every lane has its own running maximum and mass, so that
no thread waits for another before the row ends. The kernel uses no atomics, so two runs agree bit for bit.

These loads need rows that start and end at multiples of 16 elements. The padding after V is −inf while the row is read,
and 0 in the gradient.

Shapes: C rows of a chunk, V vocabulary, K teacher ids, 3 terms: NLL, KL, advantage.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from adpa.kernels.targets import Targets

ROW_ALIGNMENT = 16  # elements
MAX_TOP_K = 1024
TILE_BYTES = 16384  # one vector of each of 1,024 threads


def loss_rows_(
    products_CV: Tensor,
    bias_V: Tensor | None,
    targets: Targets,
    losses_C3: Tensor,
    *,
    softcap: float | None,
    logit_scale: float,
    with_gradient: bool,
) -> None:
    """Fill `losses_C3`, and overwrite the products with the gradient of the weighted losses (or with scratch data).

    Args:
        products_CV: hidden · weightᵀ. The stride is a multiple of `ROW_ALIGNMENT`, and so is the memory of each row.
        losses_C3: contiguous, in the dtype of the targets: float64 for float64 products, else float32.
    """
    C, V = products_CV.shape
    softcap = float(softcap or 0)
    options = launch_options(products_CV.dtype, targets.ids.shape[1], softcap)
    _loss_rows_kernel[(C,)](
        products_CV,
        None if bias_V is None else pad(bias_V, (0, -V % ROW_ALIGNMENT)),
        *(column.contiguous() for column in targets),
        losses_C3,
        V,
        products_CV.stride(0),
        targets.ids.shape[1],
        SCALE=float(logit_scale),
        SOFTCAP=softcap,
        WITH_GRADIENT=with_gradient,
        **options,
    )


def launch_options(dtype: torch.dtype, top_k: int, softcap: float) -> dict[str, Any]:
    """The block sizes, and the number of warps and registers, for logits of a dtype and K teacher ids.

    Two programs of 32 warps fill a multiprocessor: one streams while the other computes. Few rows are in progress at
    once, so that the L2 cache holds much of them. This leaves 32 registers per thread, which are too few for a softcap
    or float64.
    """
    vector = 16 // dtype.itemsize
    tile_bytes, occupancy = TILE_BYTES, {"num_warps": 32}
    if softcap or dtype == torch.float64:
        tile_bytes, occupancy = TILE_BYTES // 2, {"num_warps": 16, "maxnreg": 128}
    return {
        "BLOCK_K": max(16, triton.next_power_of_2(top_k)),
        "LANES": tile_bytes // 16,
        "VECTOR": vector,
        **occupancy,
    }


@triton.jit
def _load_logits(
    products_ptr,
    bias_ptr,
    columns,
    mask,
    dtype: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """The logits of some columns; −inf where the product is −inf or masked."""
    product = tl.load(products_ptr + columns, mask=mask, other=-float("inf")).to(dtype)
    logit = product
    if bias_ptr is not None:
        logit += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(dtype)
    if SOFTCAP != 0.0:
        logit = SOFTCAP * (2 * tl.sigmoid(logit * (2 * SCALE / SOFTCAP)) - 1)  # softcap · tanh
    elif SCALE != 1.0:
        logit *= SCALE
    if SCALE <= 0.0 or SOFTCAP != 0.0:
        logit = tl.where(product == -float("inf"), -float("inf"), logit)
    return logit


@triton.jit
def _to_products(gradient, logit, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Turn the gradient by the logits into that by the products; 0 where the logit is −inf."""
    if SOFTCAP != 0.0:
        tanh = logit * (1 / SOFTCAP)
        gradient = tl.where(logit == -float("inf"), 0.0, gradient * (1 - tanh * tanh))
    if SCALE != 1.0:
        gradient *= SCALE
    return gradient


@triton.jit
def _loss_rows_kernel(
    products_ptr,  # [C, V] and the padding of each row
    bias_ptr,  # None, or [V] and its padding
    labels_ptr,  # [C]
    ids_ptr,  # [C, K]
    counts_ptr,  # [C, K]
    logprobs_ptr,  # [C, K + 1], the tail last
    advantages_ptr,  # [C, K + 1]
    weights_ptr,  # [C, 3]
    losses_ptr,  # [C, 3]
    V,
    stride,
    K,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    dtype: tl.constexpr = losses_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    products_ptr += row * stride
    end = tl.cdiv(V, 16) * 16

    # 1. The K + 1 logits; −inf in the places of S and in the padding.
    k = tl.arange(0, BLOCK_K)
    ids = tl.load(ids_ptr + row * K + k, mask=k < K, other=0).to(tl.int32)
    in_s = tl.load(counts_ptr + row * K + k, mask=k < K, other=0) != 0
    label = tl.load(labels_ptr + row).to(tl.int32)
    top = _load_logits(products_ptr, bias_ptr, ids, in_s, dtype, SCALE, SOFTCAP)
    label_logit = _load_logits(products_ptr, bias_ptr, label, True, dtype, SCALE, SOFTCAP)
    tl.debug_barrier()
    padding = V + tl.arange(0, 16)
    minus_infinity = tl.full([1], -float("inf"), dtype)
    tl.store(products_ptr + ids, minus_infinity, mask=in_s)
    tl.store(products_ptr + padding, minus_infinity, mask=padding < end)
    tl.debug_barrier()

    # 2. The tail's largest logit and mass. A peak is never −inf, so that no difference is NaN.
    tile = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    peaks = tl.full([LANES], -3.0e38, dtype)
    masses = tl.zeros([LANES], dtype)
    for start in range(0, end, LANES * VECTOR):
        columns = start + tile
        logits = _load_logits(products_ptr, bias_ptr, columns, columns < end, dtype, SCALE, SOFTCAP)
        new_peaks = tl.maximum(peaks, tl.max(logits, axis=1))
        masses = masses * tl.exp(peaks - new_peaks) + tl.sum(tl.exp(logits - new_peaks[:, None]), axis=1)
        peaks = new_peaks
    peak = tl.max(peaks, axis=0)
    mass = tl.sum(masses * tl.exp(peaks - peak), axis=0)

    # 3. The K + 1 outcomes, relative to the row's largest logit.
    nll_weight = tl.load(weights_ptr + row * 3)
    kl_weight = tl.load(weights_ptr + row * 3 + 1)
    advantage_weight = tl.load(weights_ptr + row * 3 + 2)
    logprobs = tl.load(logprobs_ptr + row * (K + 1) + k, mask=in_s, other=-float("inf"))
    tail_logprob = tl.load(logprobs_ptr + row * (K + 1) + K)
    advantages = tl.load(advantages_ptr + row * (K + 1) + k, mask=in_s, other=0.0)
    largest = tl.maximum(tl.max(top, axis=0), peak)
    lse = tl.log(tl.sum(tl.exp(top - largest), axis=0) + tl.exp(peak - largest) * mass)
    logq = top - largest - lse
    tail_logq = peak - largest + tl.log(mass) - lse
    q, tail_q = tl.exp(logq), tl.exp(tail_logq)
    p, tail_p = tl.exp(logprobs), tl.exp(tail_logprob)
    expected = tl.sum(q * advantages, axis=0)
    kl = tl.sum(tl.where(p > 0, p * (logprobs - logq), 0.0), axis=0)
    kl += tl.where(tail_p > 0, tail_p * (tail_logprob - tail_logq), 0.0)
    tl.store(losses_ptr + row * 3, tl.where(nll_weight != 0, lse - (label_logit - largest), 0.0))
    tl.store(losses_ptr + row * 3 + 1, kl)
    tl.store(losses_ptr + row * 3 + 2, -expected)

    if WITH_GRADIENT:
        share = nll_weight + kl_weight * (tl.sum(p, axis=0) + tail_p) + advantage_weight * expected
        gradient = q * (share - advantage_weight * advantages) - kl_weight * p
        gradient = _to_products(gradient - tl.where(ids == label, nll_weight, 0.0), top, SCALE, SOFTCAP)
        # The mass is at least 1, from its own peak; it is 0 if the tail is empty.
        tail_gradient = (tail_q * share - kl_weight * tail_p) / tl.maximum(mass, 1.0)
        label_gradient = tl.exp(label_logit - peak) * tail_gradient - nll_weight
        label_gradient = _to_products(label_gradient, label_logit, SCALE, SOFTCAP)
        label_in_s = tl.sum((in_s & (ids == label)).to(tl.int32), axis=0) > 0
        label_counts = (nll_weight != 0) & (label_in_s == 0)

        # 4. The tail.
        tiles = tl.cdiv(end, LANES * VECTOR)
        for number in range(tiles):
            columns = (tiles - 1 - number) * (LANES * VECTOR) + tile
            logits = _load_logits(products_ptr, bias_ptr, columns, columns < end, dtype, SCALE, SOFTCAP)
            tail = _to_products(tl.exp(logits - peak) * tail_gradient, logits, SCALE, SOFTCAP)
            tl.store(products_ptr + columns, tail, mask=columns < end)
        tl.debug_barrier()

        # 5. S and the label.
        tl.store(products_ptr + ids, gradient, mask=in_s)
        tl.store(products_ptr + label, label_gradient, mask=label_counts)
