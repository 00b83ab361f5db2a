"""The definition of `adpa.kernels.head`, written to be read: dense, float64, differentiated by autograd.

Source: Gao, Wan, Guo, Quan, Wang, "Advantage-Guided Distillation for Preference Alignment in Small Language
Models", ICLR 2025 (arXiv 2502.17927). One row is one position t of a response, with state s_t. The teacher
π_dpo and its reference π_ref give S, the teacher's top-K tokens, and for k in S

    p_k = π_dpo(k|s_t)    p_T = 1 − Σ_S p_k    A_k = log π_dpo(k|s_t) − log π_ref(k|s_t)

and the student has q = softmax(logits) and the tail q_T = Σ_{j∉S} q_j. The three terms of a row are

    NLL        −log q_y                                               the SFT loss of the label y
    KL         Σ_S p_k(log p_k − log q_k) + p_T(log p_T − log q_T)    the KD and DCKD loss
    advantage  −Σ_S q_k A_k                                           the ADPA loss

Shapes: N rows, M rows that have a nonzero weight, d hidden size, V vocabulary, K teacher ids.
"""

import torch
from torch import Tensor

from adpa.kernels.head import HeadLosses


def distill_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    topk_ids: Tensor,
    teacher_logprobs: Tensor,
    tail_logprob: Tensor,
    advantages: Tensor,
    nll_weight: Tensor,
    kl_weight: Tensor,
    advantage_weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, HeadLosses]:
    """The twin of `adpa.kernels.head.distill_head`: the same arguments, rules and results, in float64."""
    V = len(weight)
    has_label_N = (labels >= 0) & (labels < V)
    weights_N3 = torch.stack([nll_weight * has_label_N, kl_weight, advantage_weight], dim=1).double()
    rows_M = (weights_N3 != 0).any(dim=1).nonzero().squeeze(1)
    has_nll_M, has_kl_M, has_advantage_M = (weights_N3[rows_M] != 0).unbind(dim=1)

    logits_MV = hidden[rows_M].double() @ weight.double().T
    if bias is not None:
        logits_MV = logits_MV + bias.double()
    logits_MV = logit_scale * logits_MV
    if softcap:
        logits_MV = softcap * (logits_MV / softcap).tanh()
    logq_MV = logits_MV.log_softmax(dim=1)

    labels_M = labels.long().where(has_label_N, 0)[rows_M]
    ids_MK = topk_ids[rows_M].long()
    is_id_MK = ids_MK >= 0
    repeated_MK = (ids_MK[:, :, None] == ids_MK[:, None, :]).tril(diagonal=-1).any(dim=2)
    in_s_MK = is_id_MK & (ids_MK < V) & ~repeated_MK
    ids_MK = ids_MK.where(in_s_MK, 0)
    logq_MK = logq_MV.gather(1, ids_MK)
    in_s_MV = torch.zeros_like(logq_MV).scatter_add(1, ids_MK, in_s_MK.double()).bool()
    # Mask the −inf entries too: autograd's derivative of a log-sum-exp over −inf alone is NaN.
    logq_tail_M = logq_MV.masked_fill(in_s_MV | logq_MV.isneginf(), -torch.inf).logsumexp(dim=1)

    p_MK = teacher_logprobs[rows_M].double().exp()
    p_tail_M = tail_logprob[rows_M].double().exp() + p_MK.where(is_id_MK & ~in_s_MK, 0).sum(dim=1)
    p_tail_M = p_tail_M.where(has_kl_M & ~in_s_MV.all(dim=1), 0)
    p_MK = p_MK.where(has_kl_M[:, None] & in_s_MK, 0)
    advantages_MK = advantages[rows_M].double()
    learnable_MK = has_advantage_M[:, None] & in_s_MK & advantages_MK.isfinite()
    advantages_MK = advantages_MK.where(learnable_MK, 0)

    nll_M = -logq_MV.gather(1, labels_M[:, None]).squeeze(1).where(has_nll_M, 0)
    kl_M = _relative_entropy(p_MK, logq_MK).sum(dim=1) + _relative_entropy(p_tail_M, logq_tail_M)
    advantage_M = -(logq_MK.exp() * advantages_MK).sum(dim=1)
    terms_M3 = torch.stack([nll_M, kl_M, advantage_M], dim=1)
    terms_N3 = torch.zeros_like(weights_N3).index_copy(0, rows_M, terms_M3)
    return (weights_N3 * terms_N3).sum(), HeadLosses(*terms_N3.detach().unbind(dim=1))


def _relative_entropy(p: Tensor, logq: Tensor) -> Tensor:
    """p(log p − log q), elementwise; 0 where p = 0, whatever q is."""
    return torch.special.xlogy(p, p) - p * logq.where(p > 0, 0)
