"""The targets of the loss head: the rows that count, and the teacher's numbers for them, cleaned.

Shapes: N rows; M rows that have a nonzero weight; K teacher ids; J = K + 1 outcomes, the K ids and then the tail;
3 terms: NLL, KL, advantage.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Targets(NamedTuple):
    """The targets of M rows, cleaned: a term whose weight is 0 is 0, and never NaN.

    labels [M] and ids [M, K] are int64, and 0 where they do not count; counts [M, K] is true for the ids in S. For an
    outcome that does not count, the teacher's logprobs [M, J] are −inf and the advantages [M, J] are 0. The tail's
    advantage is 0. weights [M, 3] are those of NLL, KL and advantage.
    """

    labels: Tensor
    ids: Tensor
    counts: Tensor
    logprobs: Tensor
    advantages: Tensor
    weights: Tensor


def select_targets(
    vocabulary: int,
    labels_N: Tensor,
    topk_ids_NK: Tensor,
    teacher_logprobs_NK: Tensor,
    tail_logprob_N: Tensor,
    advantages_NK: Tensor,
    weights_N3: Tensor,
    rows_M: Tensor | None = None,
) -> tuple[Tensor, Targets]:
    """The rows that count (default: those with a nonzero weight), and their targets in the dtype of the weights."""
    dtype = weights_N3.dtype
    has_label_N = (labels_N >= 0) & (labels_N < vocabulary)
    weights_N3 = weights_N3.clone()
    weights_N3[:, 0].masked_fill_(~has_label_N, 0)
    if rows_M is None:
        rows_M = (weights_N3 != 0).any(dim=1).nonzero().squeeze(1)  # the host waits for the number of rows
    weights_M3 = weights_N3[rows_M]
    _, has_kl_M1, has_advantage_M1 = (weights_M3 != 0).split(1, dim=1)

    ids_MK = topk_ids_NK[rows_M].long()
    is_id_MK = ids_MK >= 0
    counts_MK = is_id_MK & (ids_MK < vocabulary) & ~_repeats(ids_MK)
    has_tail_M1 = counts_MK.sum(dim=1, keepdim=True) < vocabulary

    logprobs_MK = teacher_logprobs_NK[rows_M].to(dtype)
    moved_MK = logprobs_MK.masked_fill(~is_id_MK | counts_MK, -torch.inf)
    tail_M1 = tail_logprob_N[rows_M, None].to(dtype)
    tail_M1 = torch.cat([tail_M1, moved_MK], dim=1).logsumexp(dim=1, keepdim=True)
    logprobs_MJ = torch.cat([logprobs_MK, tail_M1], dim=1)
    outcome_MJ = torch.cat([counts_MK, has_tail_M1], dim=1)

    advantages_MK = advantages_NK[rows_M].to(dtype)
    learnable_MK = counts_MK & has_advantage_M1 & advantages_MK.isfinite()
    advantages_MK = advantages_MK.masked_fill(~learnable_MK, 0)
    return rows_M, Targets(
        labels=labels_N[rows_M].long().masked_fill(~has_label_N[rows_M], 0),
        ids=ids_MK.masked_fill(~counts_MK, 0),
        counts=counts_MK,
        logprobs=logprobs_MJ.masked_fill(~(outcome_MJ & has_kl_M1), -torch.inf),
        advantages=torch.nn.functional.pad(advantages_MK, (0, 1)),
        weights=weights_M3,
    )


def _repeats(ids_MK: Tensor) -> Tensor:
    """True for the second and later occurrences of an id in its row."""
    sorted_MK, order_MK = ids_MK.sort(dim=1, stable=True)
    same_MK = sorted_MK[:, 1:] == sorted_MK[:, :-1]
    return torch.zeros_like(ids_MK, dtype=torch.bool).scatter_(1, order_MK[:, 1:], same_MK)
