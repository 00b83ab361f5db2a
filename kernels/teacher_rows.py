"""What scoring keeps of a teacher's logits: exact log-probabilities of a few tokens, from one pass over each row.

A row of logits z [V] is cut into groups of 64 neighbours. The pass (`kernels/group_rows.py` in Triton, a few lines
of torch here) keeps of each group its largest logit m and log Σ exp(z_j − m). All that follows works on these V/64
pairs and on the 64·K logits of K groups.

    top K   The K tokens of the largest logits lie in the K groups of the largest m. For if a token's group is not
            among them, each of these K groups has a token that goes before it: one with a larger logit, or with
            the same logit and a smaller id, since groups are ranked by (m, then position), and a group's position
            orders its ids. So the groups are sorted, the K best are read again, 2 % of the row, and their logits
            sorted. Both sorts are stable: among equal logits, the smaller id goes first.
    tail    Every token that is not in the top K is in a group that was not read again, or was read again and sorted
            behind: the log of the probability of the rest is the log-sum-exp over these two kinds. Nothing is
            subtracted, where 1 − Σ_S p_k has no digits left at p_T ~ 1e-7.
    total   The log-sum-exp over the tail and the top K.

All logits are taken relative to the row's largest, so that logits of ±1e4 lose no digits. Sums run in float32.

Shapes: C rows of a chunk, V vocabulary, K top tokens, J tokens asked for, W = 64 tokens of a group, G groups, S groups
that are read again.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from adpa.errors import OptionError
from adpa.kernels.checks import Backend, check_ids, check_logits, takes_triton

GROUP = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TeacherRows(NamedTuple):
    """The signal of C positions; all float32 but the ids.

    Attributes:
        own_logprobs: [C] log-probability of the position's own token.
        topk_ids: [C, K] int32, by falling logit; among equal logits, the smaller id goes first.
        topk_logprobs: [C, K] their log-probabilities.
        tail_logprob: [C] log of the probability of all other tokens; −inf if there are none.
    """

    own_logprobs: Tensor
    topk_ids: Tensor
    topk_logprobs: Tensor
    tail_logprob: Tensor


def teacher_rows(logits: Tensor, labels: Tensor, top_k: int, backend: Backend = "auto") -> TeacherRows:
    """The label's log-probability, the top K, and the rest's mass of each row of logits.

    A logit of −inf is a token of probability 0. A row with NaN or +inf, or of nothing but −inf, has no
    probabilities: its numbers are NaN, and its ids mean nothing. A label outside [0, V) has NaN.

    Args:
        logits: [C, V] float32, bfloat16 or float16; not changed.
        labels: [C] int32 or int64, on any device.
        top_k: K, from 1 to V. Beside the logits, a row takes about 2 kB · K.
        backend: what reads the logits: "torch" runs anywhere, and needs as much memory again, in float32; "triton"
            runs on CUDA; "auto" takes Triton on CUDA and torch elsewhere.

    Raises:
        OptionError: shapes, dtypes or a K that do not fit together, or a backend that is not there.
    """
    with_triton = takes_triton(backend, "logits", logits)
    check_logits(logits, *DTYPES)
    check_ids("labels", labels, len(logits))
    if not 1 <= top_k <= logits.shape[1]:
        raise OptionError(f"top_k is {top_k}, expected 1 to {logits.shape[1]}, the columns of logits")
    with torch.no_grad():
        peaks_CG, logmass_CG = _groups(logits, with_triton)

        peaks_CG, order_CG = peaks_CG.sort(dim=1, descending=True, stable=True)
        read_CS, unread_CG = order_CG.tensor_split([top_k], dim=1)
        # In the order of their ids, so that equal logits stay in it.
        columns_CSW = read_CS.sort(dim=1).values[:, :, None] * GROUP + torch.arange(GROUP, device=logits.device)
        columns_CI = columns_CSW.flatten(1)
        ranked_CI, rank_CI = _logits_at(logits, columns_CI, -torch.inf).sort(dim=1, descending=True, stable=True)
        top_CK, behind_CI = ranked_CI.tensor_split([top_k], dim=1)

        peak_C1 = peaks_CG[:, :1]
        unread_logmass_CG = peaks_CG[:, top_k:] - peak_C1 + logmass_CG.gather(1, unread_CG)
        tail_C1 = torch.cat([behind_CI - peak_C1, unread_logmass_CG], dim=1).logsumexp(dim=1, keepdim=True)
        total_C1 = torch.cat([top_CK - peak_C1, tail_C1], dim=1).logsumexp(dim=1, keepdim=True)
        own_C1 = _logits_at(logits, labels[:, None].to(logits.device), torch.nan)
        return TeacherRows(
            own_logprobs=(own_C1 - peak_C1 - total_C1).squeeze(1),
            topk_ids=columns_CI.gather(1, rank_CI[:, :top_k]).to(torch.int32),
            topk_logprobs=top_CK - peak_C1 - total_C1,
            tail_logprob=(tail_C1 - total_C1).squeeze(1),
        )


def logprobs_at(logits: Tensor, ids: Tensor, backend: Backend = "auto") -> Tensor:
    """The log-probabilities [C, J] of some tokens of each row, float32; NaN where `teacher_rows` says so.

    Args:
        logits: [C, V] float32, bfloat16 or float16; not changed.
        ids: [C, J] int32 or int64, on any device; one outside [0, V) has NaN.
        backend: as in `teacher_rows`.

    Raises:
        OptionError: shapes or dtypes that do not fit together, or a backend that is not there.
    """
    with_triton = takes_triton(backend, "logits", logits)
    check_logits(logits, *DTYPES)
    check_ids("ids", ids, len(logits), None)
    with torch.no_grad():
        peaks_CG, logmass_CG = _groups(logits, with_triton)
        peak_C1 = peaks_CG.amax(dim=1, keepdim=True)
        total_C1 = (peaks_CG - peak_C1 + logmass_CG).logsumexp(dim=1, keepdim=True)
        return _logits_at(logits, ids.to(logits.device), torch.nan) - peak_C1 - total_C1


def _groups(logits_CV: Tensor, with_triton: bool) -> tuple[Tensor, Tensor]:
    """Of every group its largest logit, and the log of its mass relative to that, [C, G] float32.

    The one pass over the row. Of a group of nothing but −inf both are −inf; NaN and +inf make the mass NaN.
    """
    if with_triton:
        from adpa.kernels.group_rows import group_rows

        return group_rows(logits_CV, GROUP)
    missing = -logits_CV.shape[1] % GROUP
    if missing:
        logits_CV = torch.nn.functional.pad(logits_CV, (0, missing), value=-torch.inf)
    logits_CGW = logits_CV.unflatten(1, (-1, GROUP))
    peaks_CG = logits_CGW.amax(dim=2).float()
    finite_peaks_CG = peaks_CG.masked_fill(peaks_CG == -torch.inf, 0)
    return peaks_CG, (logits_CGW - finite_peaks_CG[:, :, None]).exp_().sum(dim=2).log_()


def _logits_at(logits_CV: Tensor, ids_CJ: Tensor, missing: float) -> Tensor:
    """The logits of some columns, [C, J] float32; `missing` where there is no such column."""
    outside_CJ = (ids_CJ < 0) | (ids_CJ >= logits_CV.shape[1])
    return logits_CV.gather(1, ids_CJ.long().masked_fill(outside_CJ, 0)).float().masked_fill_(outside_CJ, missing)
