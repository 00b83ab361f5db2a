"""What a K keeps of the teacher's signals and what it loses, measured on rows of a much larger K.

A scoring with K keeps K + 1 outcomes of each token: the teacher's top K and the rest. Against the M + 1 outcomes of a
larger M, what a loss over the K + 1 no longer sees is

    KL lost         Σ_{k beyond K} p_k·log(p_k/q_k) − P·log(P/Q), where P and Q are the sums of p and q beyond K: the KL
                    over M + 1 outcomes minus the KL over K + 1. It is P times the KL within the rest, hence never
                    negative (the log-sum inequality).
    advantage lost  Σ_{k beyond K} p_k·|A_k| over Σ_k p_k·|A_k|.

"Beyond K" are the ids from K to M and, in the KL, what lies beyond M as one outcome. p is the teacher. q should be the
student, which is not there yet: the reference stands in, so that log(p_k/q_k) = A_k.

Shapes: T response tokens, M ids of the rows, Q values of K.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adpa.data.signals import Scoring, SignalRow, encoded_bytes

SMALLEST_TAIL = 1e-7  # 1 − Σq of float32 log-probabilities has no digits below
SMALLEST = np.finfo(np.float64).tiny


@dataclass(frozen=True)
class Fidelity:
    """What a K keeps, over all tokens of some rows.

    Attributes:
        top_k: K.
        captured_mass: the teacher's probability of its top K, mean.
        captured_mass_5: its 5 % quantile: all but one in twenty tokens have at least this.
        tail: the teacher's probability of everything else, mean.
        kl_lost: nats a token, mean; none without a reference, as what follows.
        kl_lost_95: its 95 % quantile.
        advantage_lost: share of Σ p·|A| that lies beyond K.
        bytes: what rows of so many tokens as was asked for take in the cache.
    """

    top_k: int
    captured_mass: float
    captured_mass_5: float
    tail: float
    kl_lost: float | None
    kl_lost_95: float | None
    advantage_lost: float | None
    bytes: int


def measure_fidelity(
    shards: Sequence[Sequence[SignalRow]], scoring: Scoring, top_ks: Sequence[int], tokens: int
) -> list[Fidelity]:
    """What each K would keep of some rows.

    Args:
        shards: rows of a large K, grouped as they would be written.
        scoring: who judged them.
        top_ks: the values of K, none above that of the rows.
        tokens: the number of tokens to predict bytes for.
    """
    rows = [row for shard in shards for row in shard]
    # The first column is of K = 0: everything.
    parts = zip(*(_beyond(row, [0, *top_ks]) for row in rows), strict=True)
    mass_NQ, *of_reference = (np.concatenate(part) for part in parts)
    measured = len(mass_NQ)
    found = []
    for place, top_k in enumerate(top_ks, start=1):
        tail_N = mass_NQ[:, place]
        kl_lost = kl_lost_95 = advantage_lost = None
        if of_reference:
            kl_NQ, advantage_NQ = of_reference
            kl_lost, kl_lost_95 = float(kl_NQ[:, place].mean()), _quantile(kl_NQ[:, place], 0.95)
            whole = float(advantage_NQ[:, 0].sum())
            advantage_lost = float(advantage_NQ[:, place].sum()) / whole if whole else 0.0
        narrow = replace(scoring, top_k=top_k)
        size = sum(encoded_bytes([cut_row(row, top_k) for row in shard], narrow) for shard in shards)
        found.append(
            Fidelity(
                top_k=top_k,
                captured_mass=float(1 - tail_N.mean()),
                captured_mass_5=_quantile(1 - tail_N, 0.05),
                tail=float(tail_N.mean()),
                kl_lost=kl_lost,
                kl_lost_95=kl_lost_95,
                advantage_lost=advantage_lost,
                bytes=round(size * tokens / measured),
            )
        )
    return found


def cut_row(row: SignalRow, top_k: int) -> SignalRow:
    """The row that a scoring with a smaller K gives."""
    tail_T = _sums_beyond(_outcomes(row), [top_k])[:, 0]
    with np.errstate(divide="ignore"):
        tail_logprob = np.log(tail_T).astype(np.float32)
    return replace(
        row,
        topk_ids=row.topk_ids[:, :top_k],
        topk_logprobs=row.topk_logprobs[:, :top_k],
        tail_logprob=tail_logprob,
        topk_advantages=None if row.topk_advantages is None else row.topk_advantages[:, :top_k],
    )


def _beyond(row: SignalRow, top_ks: Sequence[int]) -> list[NDArray[np.float64]]:
    """Beyond each K the teacher's mass and, with a reference, the KL lost and Σ p·|A|; float64 [T, Q] each."""
    p_TM = _outcomes(row)
    mass_TQ = _sums_beyond(p_TM, top_ks)
    if row.topk_advantages is None:
        return [mass_TQ]
    possible = p_TM[:, :-1] > 0
    advantages = np.where(possible, row.topk_advantages.astype(np.float64), 0)
    q_ids = np.where(possible, np.exp(row.topk_logprobs.astype(np.float64) - advantages), 0)
    least = np.where(p_TM[:, -1] > 0, SMALLEST_TAIL, 0)
    q_tail = np.maximum(1 - q_ids.sum(axis=1), least)
    ratios = np.column_stack([advantages, _log(p_TM[:, -1]) - _log(q_tail)])
    student_mass_TQ = _sums_beyond(np.column_stack([q_ids, q_tail]), top_ks)
    kl_TQ = _sums_beyond(p_TM * ratios, top_ks) - mass_TQ * (_log(mass_TQ) - _log(student_mass_TQ))
    size = p_TM[:, :-1] * np.abs(advantages)
    advantage_TQ = _sums_beyond(np.column_stack([size, np.zeros(len(size))]), top_ks)
    return [mass_TQ, np.maximum(kl_TQ, 0), advantage_TQ]


def _outcomes(row: SignalRow) -> NDArray[np.float64]:
    """The teacher's probabilities of the ids and of the rest, [T, M + 1]."""
    return np.exp(np.column_stack([row.topk_logprobs, row.tail_logprob]).astype(np.float64))


def _sums_beyond(values: NDArray[np.float64], top_ks: Sequence[int]) -> NDArray[np.float64]:
    """The sum of all columns from K on, for each K; smallest probabilities first."""
    return np.cumsum(values[:, ::-1], axis=1)[:, ::-1][:, top_ks]


def _log(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.log(np.maximum(values, SMALLEST))


def _quantile(values: NDArray[Any], share: float) -> float:
    return float(np.quantile(values, share, method="inverted_cdf"))
