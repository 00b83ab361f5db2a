"""Turns a teacher's logits into signals: exact log-probabilities of a few tokens, from one pass over each row.

A row of logits z [V] is cut into groups of 64 neighbours. The pass (`kernels/group_rows.py` in Triton, a few lines
of torch here) keeps two numbers of each group: its largest logit m and log Σ exp(z_j − m). Everything else works on
these V/64 pairs and on the 64·K logits of K groups.

    top K   The K tokens with the largest logits lie in the K groups with the largest m. Proof: if the group of a token
            is not among them, each of these K groups has a token that ranks before it, with a larger logit, or with
            the same logit and a smaller id. (Groups are ranked by m, then by position, which orders their ids.) So the
            K best groups are selected, their logits are read again (2 % of the row), and the K best of these are
            selected. Both selections rank by value, then by position: among equal logits, the smaller id is first.
    tail    A token outside the top K is in a group that was not read again, or was read again and not selected. The
            log of the tail's probability is the log-sum-exp over these two kinds. Nothing is subtracted: 1 − Σ_S p_k
            has no digits left at p_T ~ 1e-7.
    total   The log-sum-exp over the tail and the top K.

All logits are taken relative to the row's largest, so that logits of ±1e4 lose no digits. Sums run in float32.

Rows are independent. They are computed in blocks, which bounds the memory beside the logits.

Shapes: C rows of a chunk or of a block of it, V vocabulary, K top tokens, J requested tokens, W = 64 tokens of a group,
G groups, S groups that are read again, I = 64·S logits in them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from adpa.errors import OptionError
from adpa.kernels.checks import Backend, check_ids, check_logits, takes_triton

GROUP = 64
BLOCK_BYTES = 1 << 28
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TeacherRows(NamedTuple):
    """The signal of C positions; all float32 but the ids.

    Attributes:
        own_logprobs: [C] log-probability of the position's own token.
        topk_ids: [C, K] int32, by falling logit; among equal logits, the smaller id is first.
        topk_logprobs: [C, K] their log-probabilities.
        tail_logprob: [C] log of the probability of all other tokens; −inf if there are none.
    """

    own_logprobs: Tensor
    topk_ids: Tensor
    topk_logprobs: Tensor
    tail_logprob: Tensor


def teacher_rows(logits: Tensor, labels: Tensor, top_k: int, backend: Backend = "auto") -> TeacherRows:
    """The label's log-probability, the top K, and the rest's mass of each row of logits.

    A logit of −inf is a token of probability 0. A row with NaN or +inf, or with −inf alone, has no probabilities: its
    numbers are NaN, and its ids mean nothing. A label outside [0, V) has NaN.

    Args:
        logits: [C, V] float32, bfloat16 or float16; not changed.
        labels: [C] int32 or int64, on any device.
        top_k: K, from 1 to V. For any K, the call takes at most `BLOCK_BYTES` beside the logits and the result.
        backend: reads the logits: "torch" runs anywhere; "triton" runs on CUDA; "auto" uses Triton on CUDA and
            torch elsewhere.

    Raises:
        OptionError: shapes, dtypes or K do not fit together, or the backend is not available.
    """
    with_triton = takes_triton(backend, "logits", logits)
    check_logits(logits, *DTYPES)
    check_ids("labels", labels, len(logits))
    if not 1 <= top_k <= logits.shape[1]:
        raise OptionError(f"top_k is {top_k}, expected 1 to {logits.shape[1]}, the columns of logits")
    rows = _block_rows(logits, GROUP * top_k, with_triton)
    labels = labels.to(logits.device)
    with torch.no_grad():
        blocks = [
            _teacher_rows(logits_CV, labels_C, top_k, with_triton)
            for logits_CV, labels_C in zip(logits.split(rows), labels.split(rows), strict=True)
        ]
        return TeacherRows(*map(torch.cat, zip(*blocks, strict=True)))


def logprobs_at(logits: Tensor, ids: Tensor, backend: Backend = "auto") -> Tensor:
    """The log-probabilities [C, J] of some tokens of each row, float32; NaN in the cases of `teacher_rows`.

    Args:
        logits: [C, V] float32, bfloat16 or float16; not changed.
        ids: [C, J] int32 or int64, on any device; one outside [0, V) has NaN.
        backend: as in `teacher_rows`.

    Raises:
        OptionError: shapes or dtypes do not fit together, or the backend is not available.
    """
    with_triton = takes_triton(backend, "logits", logits)
    check_logits(logits, *DTYPES)
    check_ids("ids", ids, len(logits), None)
    rows = _block_rows(logits, ids.shape[1], with_triton)
    ids = ids.to(logits.device)
    with torch.no_grad():
        return torch.cat(
            [
                _logprobs_at(logits_CV, ids_CJ, with_triton)
                for logits_CV, ids_CJ in zip(logits.split(rows), ids.split(rows), strict=True)
            ]
        )


def _block_rows(logits_CV: Tensor, read: int, with_triton: bool) -> int:
    """The number of rows that take `BLOCK_BYTES` beside their logits, if `read` of each are read again; at least 1."""
    width = -(-logits_CV.shape[1] // GROUP) * GROUP
    bytes_of_row = (1 if with_triton else 11) * width + 40 * min(read, width)
    return max(1, BLOCK_BYTES // bytes_of_row)


def _teacher_rows(logits_CV: Tensor, labels_C: Tensor, top_k: int, with_triton: bool) -> TeacherRows:
    peaks_CG, logmass_CG = _groups(logits_CV, with_triton)
    peak_C1 = peaks_CG.amax(dim=1, keepdim=True)
    # Sorted, so that the positions of the logits are in the order of their ids.
    read_CS = _largest(peaks_CG, min(top_k, peaks_CG.shape[1])).sort(dim=1).values
    columns_CI = (read_CS[:, :, None] * GROUP + torch.arange(GROUP, device=logits_CV.device)).flatten(1)
    logits_CI = _logits_at(logits_CV, columns_CI, -torch.inf)
    places_CK = _largest(logits_CI, top_k)
    ids_CK = columns_CI.gather(1, places_CK).clamp_(max=logits_CV.shape[1] - 1)  # NaN may select padding

    logits_CI -= peak_C1
    top_CK = logits_CI.gather(1, places_CK)
    left_C1 = logits_CI.scatter_(1, places_CK, -torch.inf).logsumexp(dim=1, keepdim=True)
    logmass_CG += peaks_CG - peak_C1
    unread_C1 = logmass_CG.scatter_(1, read_CS, -torch.inf).logsumexp(dim=1, keepdim=True)
    tail_C1 = torch.logaddexp(left_C1, unread_C1)
    total_C1 = torch.logaddexp(tail_C1, top_CK.logsumexp(dim=1, keepdim=True))
    own_C1 = _logits_at(logits_CV, labels_C[:, None], torch.nan)
    return TeacherRows(
        own_logprobs=(own_C1 - peak_C1 - total_C1).squeeze(1),
        topk_ids=ids_CK.to(torch.int32),
        topk_logprobs=top_CK - total_C1,
        tail_logprob=(tail_C1 - total_C1).squeeze(1),
    )


def _logprobs_at(logits_CV: Tensor, ids_CJ: Tensor, with_triton: bool) -> Tensor:
    peaks_CG, logmass_CG = _groups(logits_CV, with_triton)
    peak_C1 = peaks_CG.amax(dim=1, keepdim=True)
    total_C1 = (peaks_CG - peak_C1 + logmass_CG).logsumexp(dim=1, keepdim=True)
    return _logits_at(logits_CV, ids_CJ, torch.nan) - peak_C1 - total_C1


def _groups(logits_CV: Tensor, with_triton: bool) -> tuple[Tensor, Tensor]:
    """For each group: its largest logit, and the log of its mass relative to that; [C, G] float32.

    This is the one pass over the row. In a group of −inf alone both are −inf; NaN and +inf make the mass NaN.
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


def _largest(values_CI: Tensor, count: int) -> Tensor:
    """Positions of the largest float32 values of each row, int64 [C, count], by falling value, then by position.

    Value and position form one integer, unique in its row: so the result does not depend on how `topk` treats ties.
    """
    bits_CI = (values_CI + 0.0).view(torch.int32)  # the sum turns −0 into 0
    keys_CI = torch.where(bits_CI < 0, bits_CI ^ 0x7FFFFFFF, bits_CI).long()  # in the order of the values
    del bits_CI
    last = values_CI.shape[1] - 1
    keys_CI <<= 32
    keys_CI |= torch.arange(last, -1, -1, device=values_CI.device)
    return last - (keys_CI.topk(count, dim=1).values & 0xFFFFFFFF)


def _logits_at(logits_CV: Tensor, ids_CJ: Tensor, missing: float) -> Tensor:
    """The logits of some columns, [C, J] float32; `missing` for a column that does not exist."""
    outside_CJ = (ids_CJ < 0) | (ids_CJ >= logits_CV.shape[1])
    return logits_CV.gather(1, ids_CJ.long().masked_fill(outside_CJ, 0)).float().masked_fill_(outside_CJ, missing)
