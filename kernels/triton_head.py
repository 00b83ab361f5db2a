"""The loss head on CUDA: matrix products by cuBLAS, and between them one Triton program a row.

It computes the same numbers as `adpa.kernels.torch_head`. All chunks share one buffer for logits, in the dtype of
hidden: the product hidden · weightᵀ is written into it, `loss_rows_` turns it into its own gradient in place, and two
products read the gradient. The gradient of the weight is summed in float32 inside the matrix product, for any dtype of
its factors, and cast once.

This module imports triton, which exists for Linux alone. So `adpa.kernels.head` imports it only when it is needed.

Shapes: N rows; M rows that have a nonzero weight; C rows of a chunk; d hidden size; V vocabulary; 3 terms.
"""

import math

import torch
from torch import Tensor

from adpa.kernels import loss_rows
from adpa.kernels.targets import Targets
from adpa.kernels.torch_head import Gradients

# For any d: beside its logits, a chunk costs the memory traffic of the weight and of its gradient.
CHUNK_ROWS = 4096


def losses_and_gradients(
    hidden_Nd: Tensor,
    weight_Vd: Tensor,
    bias_V: Tensor | None,
    rows_M: Tensor,
    targets: Targets,
    *,
    softcap: float | None,
    logit_scale: float,
    chunk_rows: int,
    needs_gradient: tuple[bool, bool, bool],
) -> tuple[Tensor, Gradients]:
    """The losses [N, 3] of every row, and the gradients of their weighted sum.

    `needs_gradient` says whether hidden, weight and bias need theirs. The rows are cut into equal chunks of at most
    `chunk_rows` rows.
    """
    dtype = targets.weights.dtype
    needs_hidden, needs_weight, needs_bias = needs_gradient
    losses_N3 = hidden_Nd.new_zeros(len(hidden_Nd), 3, dtype=dtype)
    dhidden_Nd = torch.zeros_like(hidden_Nd) if needs_hidden else None
    dweight_Vd = torch.empty_like(weight_Vd, dtype=dtype) if needs_weight else None
    dbias_V = hidden_Nd.new_zeros(len(weight_Vd), dtype=dtype) if needs_bias else None

    chunks = max(1, math.ceil(len(rows_M) / chunk_rows))
    stride = math.ceil(len(weight_Vd) / loss_rows.ROW_ALIGNMENT) * loss_rows.ROW_ALIGNMENT
    buffer_CV = hidden_Nd.new_empty(math.ceil(len(rows_M) / chunks), stride)[:, : len(weight_Vd)]
    pieces = zip(*(column.chunk(chunks) for column in (rows_M, *targets)), strict=True)
    for number, (rows_C, *chunk) in enumerate(pieces):
        hidden_Cd = hidden_Nd[rows_C]
        logits_CV = torch.mm(hidden_Cd, weight_Vd.T, out=buffer_CV[: len(rows_C)])
        losses_C3 = losses_N3.new_empty(len(rows_C), 3)
        with torch.cuda.device_of(logits_CV):
            loss_rows.loss_rows_(
                logits_CV,
                bias_V,
                Targets(*chunk),
                losses_C3,
                softcap=softcap,
                logit_scale=logit_scale,
                with_gradient=any(needs_gradient),
            )
        losses_N3[rows_C] = losses_C3
        gradient_CV = logits_CV
        if dbias_V is not None:
            dbias_V += gradient_CV.sum(dim=0, dtype=dtype)
        if dhidden_Nd is not None:
            dhidden_Nd[rows_C] = gradient_CV @ weight_Vd
        if dweight_Vd is not None:
            _add_product_(dweight_Vd, gradient_CV.T, hidden_Cd, keep=number > 0)
    del buffer_CV, logits_CV, gradient_CV  # before the cast copies the weight's gradient
    return losses_N3, Gradients(
        hidden=dhidden_Nd,
        weight=None if dweight_Vd is None else dweight_Vd.to(weight_Vd.dtype),
        bias=None if dbias_V is None or bias_V is None else dbias_V.to(bias_V.dtype),
    )


def _add_product_(sum_Vd: Tensor, left_VC: Tensor, right_Cd: Tensor, *, keep: bool) -> None:
    """Add a product to the sum, or overwrite the sum if `keep` is false, without rounding to a shorter dtype.

    On a CPU no matrix product adds bfloat16 or float16 into float32: there the factors are cast first.
    """
    if sum_Vd.dtype == right_Cd.dtype:
        sum_Vd.addmm_(left_VC, right_Cd, beta=float(keep))
    elif sum_Vd.is_cuda:
        torch.addmm(sum_Vd, left_VC, right_Cd, beta=float(keep), out_dtype=sum_Vd.dtype, out=sum_Vd)
    else:
        sum_Vd.addmm_(left_VC.to(sum_Vd.dtype), right_Cd.to(sum_Vd.dtype), beta=float(keep))
