"""The KL and advantage terms of the loss head as functions of existing logits.

They are for programs that have logits anyway, or change them before the loss, so that `distill_head` does not fit. The
code is the same: `adpa.kernels.head` has the derivation and, under "What counts", the rules for irregular ids,
probabilities and advantages.

The gradient of Σ_n u_n·loss_n is that of the head's loss with the row weights u. So the forward pass saves only its
arguments, and the backward pass reads the logits again, with the upstream gradient as weights. Memory holds the logits,
their gradient in the same dtype, and one chunk of rows. A row whose upstream gradient is 0 costs nothing.

Both passes are custom operators: `torch.compile` keeps them whole, without a graph break.

Shapes: N rows; M rows whose upstream gradient is not 0; C rows of a chunk; V vocabulary; K teacher ids; 3 terms: NLL,
KL, advantage.
"""

from typing import Any

import torch
from torch import Tensor

from adpa.kernels.checks import Backend, check_device, check_ids, check_logits, check_shape, takes_triton
from adpa.kernels.targets import Targets, select_targets
from adpa.kernels.torch_head import CHUNK_ROWS, loss_rows_

KL, ADVANTAGE = 1, 2  # the columns of the terms


def topk_kl(logits: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor, backend: Backend = "auto") -> Tensor:
    """Σ_S p_k(log p_k − log q_k) + p_T(log p_T − log q_T) of each row, differentiable by the logits.

    Args:
        logits: [N, V] float32, bfloat16, float16 or float64; not changed.
        ids: [N, K] int32 or int64, the teacher's S; K may be 0, or exceed V through padding.
        logprobs: [N, K] log p_k, natural logarithm; −inf allowed.
        tail: [N] log p_T; −inf for an empty tail.
        backend: "torch" runs anywhere, "triton" on CUDA; "auto" uses Triton on CUDA, unless K > 1,024, and
            torch elsewhere.

    Returns:
        [N] float32 (float64 for float64).

    Raises:
        OptionError: shapes or dtypes do not fit together, or the backend is not available.
    """
    _check(logits, ids, logprobs=logprobs)
    check_shape("tail", tail, len(logits))
    check_device("tail", tail, "logits", logits)
    return _row_losses(logits, ids, logprobs, tail, torch.zeros_like(logprobs), KL, backend)


def advantage_loss(logits: Tensor, ids: Tensor, advantages: Tensor, backend: Backend = "auto") -> Tensor:
    """−Σ_S q_k A_k of each row, differentiable by the logits.

    Args:
        logits: [N, V] float32, bfloat16, float16 or float64; not changed.
        ids: [N, K] int32 or int64, the teacher's S; K may be 0, or exceed V through padding.
        advantages: [N, K] A_k, the teacher's log-probability minus the reference's; one that is not finite counts
            as 0.
        backend: as in `topk_kl`.

    Returns:
        [N] float32 (float64 for float64).

    Raises:
        OptionError: shapes or dtypes do not fit together, or the backend is not available.
    """
    _check(logits, ids, advantages=advantages)
    logprobs, tail = torch.zeros_like(advantages), advantages.new_zeros(len(advantages))
    return _row_losses(logits, ids, logprobs, tail, advantages, ADVANTAGE, backend)


@torch.library.custom_op("adpa::row_losses", mutates_args=())
def _row_losses(
    logits: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor, advantages: Tensor, term: int, backend: str
) -> Tensor:
    """One term of each row, [N]."""
    ones_N = logits.new_ones(len(logits), dtype=_dtype(logits))
    return _run(logits, ids, logprobs, tail, advantages, term, backend, weight_N=ones_N)


@torch.library.custom_op("adpa::row_losses_backward", mutates_args=())
def _row_losses_backward(
    upstream: Tensor,
    logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    tail: Tensor,
    advantages: Tensor,
    term: int,
    backend: str,
) -> Tensor:
    """The gradient [N, V] of Σ_n upstream_n·loss_n by the logits."""
    gradient = torch.zeros_like(logits)
    _run(logits, ids, logprobs, tail, advantages, term, backend, weight_N=upstream, gradient_NV=gradient)
    return gradient


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.term, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    gradient = _row_losses_backward(upstream, *ctx.saved_tensors, ctx.term, ctx.backend)
    return gradient, None, None, None, None, None, None


_row_losses.register_autograd(_differentiate, setup_context=_save)
_row_losses.register_fake(lambda logits, *_: logits.new_empty(logits.shape[0], dtype=_dtype(logits)))
_row_losses_backward.register_fake(lambda _, logits, *__: torch.empty_like(logits))


def _run(
    logits_NV: Tensor,
    ids_NK: Tensor,
    logprobs_NK: Tensor,
    tail_N: Tensor,
    advantages_NK: Tensor,
    term: int,
    backend: str,
    *,
    weight_N: Tensor,
    gradient_NV: Tensor | None = None,
) -> Tensor:
    """One term of each row whose weight is not 0, [N]; fills `gradient_NV` with the gradient of the weighted sum."""
    with_triton = takes_triton(backend, "logits", logits_NV, ("ids", ids_NK))
    turn_rows = _turn_rows_in_triton if with_triton else _turn_rows_in_torch
    no_labels_N = ids_NK.new_full((len(ids_NK),), -100)
    weights_N3 = weight_N.new_zeros(len(weight_N), 3)
    weights_N3[:, term] = weight_N
    rows_M, targets = select_targets(
        logits_NV.shape[1], no_labels_N, ids_NK, logprobs_NK, tail_N, advantages_NK, weights_N3
    )
    losses_N = torch.zeros_like(weight_N)
    for rows_C, *columns in zip(*(column.split(CHUNK_ROWS) for column in (rows_M, *targets)), strict=True):
        losses_C3, gradient_CV = turn_rows(logits_NV[rows_C], Targets(*columns), gradient_NV is not None)
        losses_N[rows_C] = losses_C3[:, term]
        if gradient_NV is not None:
            gradient_NV[rows_C] = gradient_CV.to(gradient_NV.dtype)
    return losses_N


def _turn_rows_in_torch(logits_CV: Tensor, targets: Targets, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """The losses [C, 3] of logits that may be overwritten, and the gradient of the weighted losses (or scratch)."""
    logits_CV = logits_CV.to(targets.weights.dtype)
    return loss_rows_(logits_CV, targets, with_gradient=with_gradient), logits_CV


def _turn_rows_in_triton(logits_CV: Tensor, targets: Targets, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """The twin of `_turn_rows_in_torch`; the gradient is in the dtype of the logits."""
    from adpa.kernels import loss_rows

    V = logits_CV.shape[1]
    missing = -V % loss_rows.ROW_ALIGNMENT
    if missing:
        logits_CV = torch.nn.functional.pad(logits_CV, (0, missing))[:, :V]
    losses_C3 = torch.empty_like(targets.weights)
    with torch.cuda.device_of(logits_CV):
        loss_rows.loss_rows_(
            logits_CV, None, targets, losses_C3, softcap=None, logit_scale=1.0, with_gradient=with_gradient
        )
    return losses_C3, logits_CV


def _dtype(logits: Tensor) -> torch.dtype:
    """The dtype of the losses and of sums over rows."""
    return torch.promote_types(logits.dtype, torch.float32)


def _check(logits: Tensor, ids: Tensor, **values: Tensor) -> None:
    """Raises OptionError unless the logits, the ids and their values fit together."""
    check_logits(logits, torch.float32, torch.bfloat16, torch.float16, torch.float64)
    check_ids("ids", ids, len(logits), None)
    for name, tensor in values.items():
        check_shape(name, tensor, *ids.shape)
    for name, tensor in {"ids": ids, **values}.items():
        check_device(name, tensor, "logits", logits)
