"""Statistics of a student's distribution against its teacher's, to watch in training; without gradients.

Shapes: N rows; C rows of a chunk; d hidden size; V vocabulary; K teacher ids.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.special import entr

from adpa.kernels.torch_head import CHUNK_ROWS, scale_and_cap_, select_targets

# A token is unlikely if the teacher's probability of it is less than this: at temperature 1 the teacher samples it at
# fewer than one in a hundred positions. --plausibility, of the loss, is another bound.
UNLIKELY = 0.01


class StudentStatistics(NamedTuple):
    """Of each row, [N] each, with q the student's probabilities over the vocabulary and S the teacher's top K.

    Attributes:
        entropy: −Σ_V q log q, in nats.
        mass_on_topk: Σ_S q.
        unlikely_mass: Σ q over the tokens whose teacher probability is less than ``UNLIKELY``. Tokens outside S count
            as unlikely; the cache says only that each is less probable than every token of S. One exception: S is a
            nucleus of fewer than K ids, none of them unlikely, and leaves ``UNLIKELY`` or more to the others. Then the
            others may be likely, and do not count.
        advantage: Σ_S q·A, which the advantage term of ADPA raises.
    """

    entropy: Tensor
    mass_on_topk: Tensor
    unlikely_mass: Tensor
    advantage: Tensor


@torch.no_grad()
def student_statistics(
    hidden: Tensor,
    weight: Tensor,
    topk_ids: Tensor,
    teacher_logprobs: Tensor,
    advantages: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> StudentStatistics:
    """The statistics of each row, computed in chunks of rows, so that [N, V] is never in memory.

    Arguments are read as ``adpa.kernels.head.distill_head`` reads them: an id that is negative, at least V or a
    repetition is not in S, and an advantage that is not finite is 0.

    Args:
        hidden: [N, d] float32, bfloat16, float16 or float64; the matrix product runs in this dtype, all else in float32
            (float64 for float64).
        weight: [V, d], the dtype of hidden.
        topk_ids: [N, K] int32 or int64.
        teacher_logprobs: [N, K] log p_k.
        advantages: [N, K] A_k.
        bias: [V] or None.
        softcap: bound of the logits; None or 0 for no bound.
        logit_scale: factor of the logits.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    rows_N = torch.arange(len(hidden), device=hidden.device)
    zeros_N = torch.zeros_like(rows_N)
    all_terms_N3 = torch.ones(len(hidden), 3, dtype=dtype, device=hidden.device)
    _, targets = select_targets(
        len(weight), zeros_N, topk_ids, teacher_logprobs, zeros_N, advantages, all_terms_N3, rows_N
    )  # labels and tail do not matter here
    likely_NK = targets.logprobs[:, :-1] >= math.log(UNLIKELY)
    outside_N = 1 - targets.logprobs[:, :-1].exp().sum(dim=1)
    unknown_N = (topk_ids < 0).any(dim=1) & (outside_N >= UNLIKELY) & (likely_NK == targets.counts).all(dim=1)
    table = (hidden, targets.ids, targets.counts, likely_NK, unknown_N, targets.advantages[:, :-1])
    with torch.autocast(hidden.device.type, enabled=False):
        chunks = []
        for hidden_Cd, ids_CK, counts_CK, likely_CK, unknown_C, advantages_CK in zip(
            *(rows.split(CHUNK_ROWS) for rows in table), strict=True
        ):
            logits_CV = (hidden_Cd @ weight.T).to(dtype)
            if bias is not None:
                logits_CV += bias
            scale_and_cap_(logits_CV, logit_scale, softcap, with_slope=False)
            q_CV = logits_CV.softmax(dim=1)
            q_CK = q_CV.gather(1, ids_CK).masked_fill_(~counts_CK, 0)
            known_C = torch.where(unknown_C, q_CK.sum(dim=1), 1)
            unlikely_C = known_C - (q_CK * likely_CK).sum(dim=1)
            columns = (entr(q_CV).sum(dim=1), q_CK.sum(dim=1), unlikely_C, (q_CK * advantages_CK).sum(dim=1))
            chunks.append(torch.stack(columns))
    return StudentStatistics(*torch.cat(chunks, dim=1))
