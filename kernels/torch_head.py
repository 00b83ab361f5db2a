"""The loss head in plain torch: chunks of rows whose logits become their own gradient in place.

`adpa.kernels.head` holds the derivation; this file computes it.

Shapes: N rows; M rows that have a nonzero weight; C rows of a chunk; d hidden size; V vocabulary; K teacher
ids; J = K + 1 outcomes, the K ids and then the tail; 3 terms: NLL, KL, advantage. A function whose name ends
in `_` overwrites its first argument.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from adpa.kernels.targets import Targets

CHUNK_ROWS = 256


class Gradients(NamedTuple):
    """Gradients of the loss in the shapes and dtypes of hidden, weight and bias; None for those not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


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

    `needs_gradient` says whether hidden, weight and bias need theirs. Matrix products run in the dtype of `hidden_Nd`;
    everything else, sums over chunks too, in that of the targets.
    """
    dtype = targets.weights.dtype
    needs_hidden, needs_weight, needs_bias = needs_gradient
    losses_N3 = hidden_Nd.new_zeros(len(hidden_Nd), 3, dtype=dtype)
    dhidden_Nd = torch.zeros_like(hidden_Nd) if needs_hidden else None
    dweight_Vd = torch.zeros_like(weight_Vd, dtype=dtype) if needs_weight else None
    dbias_V = hidden_Nd.new_zeros(len(weight_Vd), dtype=dtype) if needs_bias else None

    for rows_C, *chunk in zip(*(column.split(chunk_rows) for column in (rows_M, *targets)), strict=True):
        hidden_Cd = hidden_Nd[rows_C]
        logits_CV = (hidden_Cd @ weight_Vd.T).to(dtype)
        if bias_V is not None:
            logits_CV += bias_V
        slope_CV = scale_and_cap_(logits_CV, logit_scale, softcap, with_slope=any(needs_gradient))
        losses_N3[rows_C] = loss_rows_(logits_CV, Targets(*chunk), with_gradient=any(needs_gradient))
        if any(needs_gradient):
            gradient_CV = logits_CV if slope_CV is None else logits_CV.mul_(slope_CV)
            if dbias_V is not None:
                dbias_V += gradient_CV.sum(dim=0)
            gradient_CV = gradient_CV.to(hidden_Nd.dtype)
            if dhidden_Nd is not None:
                dhidden_Nd[rows_C] = gradient_CV @ weight_Vd
            if dweight_Vd is not None:
                _add_product_(dweight_Vd, gradient_CV.T, hidden_Cd)
            del gradient_CV
        del logits_CV, slope_CV  # before the next chunk has its own
    return losses_N3, Gradients(
        hidden=dhidden_Nd,
        weight=None if dweight_Vd is None else dweight_Vd.to(weight_Vd.dtype),
        bias=None if dbias_V is None or bias_V is None else dbias_V.to(bias_V.dtype),
    )


def _add_product_(sum_Vd: Tensor, left_VC: Tensor, right_Cd: Tensor) -> None:
    """Add a product, whose factors may have a shorter dtype; without a second [V, d] if the dtypes agree."""
    if sum_Vd.dtype == right_Cd.dtype:
        sum_Vd.addmm_(left_VC, right_Cd)
    else:
        sum_Vd.add_(left_VC @ right_Cd)


def scale_and_cap_(
    products_CV: Tensor, logit_scale: float, softcap: float | None, *, with_slope: bool
) -> Tensor | float | None:
    """Turn products into logits; return the derivative of the logits by the products, or None if it is 1."""
    if not softcap:
        if logit_scale == 1:
            return None
        products_CV.mul_(logit_scale)
        return logit_scale
    tanh_CV = products_CV.mul_(logit_scale / softcap).tanh_()
    slope_CV = tanh_CV.square().neg_().add_(1).mul_(logit_scale) if with_slope else None
    tanh_CV.mul_(softcap)
    return slope_CV


def loss_rows_(logits_CV: Tensor, targets: Targets, *, with_gradient: bool) -> Tensor:
    """The losses [C, 3] of a chunk; its logits become the gradient of the weighted losses, or scratch data.

    Every number is taken relative to the largest logit of its row, so that logits of ±1e4 lose no digits.
    """
    labels_C1 = targets.labels[:, None]
    ids_CK, counts_CK = targets.ids, targets.counts
    label_C1 = logits_CV.gather(1, labels_C1)
    top_CK = logits_CV.gather(1, ids_CK).masked_fill_(~counts_CK, -torch.inf)
    # Add, do not write: ids that do not count all point at column 0, and add 0 there.
    logits_CV.scatter_add_(1, ids_CK, torch.zeros_like(top_CK).masked_fill_(counts_CK, -torch.inf))

    peak_C1 = logits_CV.amax(dim=1, keepdim=True)
    finite_peak_C1 = peak_C1.masked_fill(peak_C1 == -torch.inf, 0)
    tail_CV = logits_CV.sub_(finite_peak_C1).exp_()
    mass_C1 = tail_CV.sum(dim=1, keepdim=True)

    largest_C1 = torch.cat([top_CK, peak_C1], dim=1).amax(dim=1, keepdim=True)
    outcomes_CJ = torch.cat([top_CK - largest_C1, peak_C1 - largest_C1 + mass_C1.log()], dim=1)
    lse_C1 = outcomes_CJ.logsumexp(dim=1, keepdim=True)
    logq_CJ = outcomes_CJ - lse_C1
    q_CJ = logq_CJ.exp()
    p_CJ = targets.logprobs.exp()
    expected_C1 = (q_CJ * targets.advantages).sum(dim=1, keepdim=True)

    nll_weight_C1, kl_weight_C1, advantage_weight_C1 = targets.weights.split(1, dim=1)
    nll_C1 = (lse_C1 - (label_C1 - largest_C1)).masked_fill(nll_weight_C1 == 0, 0)
    kl_CJ = (p_CJ * (targets.logprobs - logq_CJ)).masked_fill(p_CJ == 0, 0)
    losses_C3 = torch.cat([nll_C1, kl_CJ.sum(dim=1, keepdim=True), -expected_C1], dim=1)
    if not with_gradient:
        return losses_C3

    p_sum_C1 = p_CJ.sum(dim=1, keepdim=True)
    dnll_CJ = nll_weight_C1 * q_CJ
    dkl_CJ = kl_weight_C1 * (p_sum_C1 * q_CJ - p_CJ)
    dadvantage_CJ = advantage_weight_C1 * q_CJ * (expected_C1 - targets.advantages)
    gradient_CJ = dnll_CJ + dkl_CJ + dadvantage_CJ
    # The tail's mass is at least 1, from its own peak; it is 0 if the tail is empty.
    tail_CV.mul_(gradient_CJ[:, -1:] / mass_C1.clamp(min=1))
    tail_CV.scatter_add_(1, ids_CK, gradient_CJ[:, :-1])
    tail_CV.scatter_add_(1, labels_C1, -nll_weight_C1)
    return losses_C3
