"""Measures how much of the teacher's signals a value of K keeps and loses, on rows of a much larger K.

A scoring with K keeps K + 1 outcomes of each token: the teacher's top K and the rest. Rows of a larger M have M + 1
outcomes. A loss over the K + 1 outcomes does not see:

    KL lost         Σ_{k beyond K} p_k·log(p_k/q_k) − P·log(P/Q), where P and Q are the sums of p and q beyond K: the KL
                    over M + 1 outcomes minus the KL over K + 1. It is P times the KL within the rest, hence never
                    negative (the log-sum inequality).
    advantage lost  Σ_{k beyond K} p_k·|A_k| over Σ_k p_k·|A_k|.

"Beyond K" are the ids from K to M and, in the KL, the rest beyond M as one outcome. With ``top_p`` each token has its
own K, where ``keep_nucleus`` cuts it. p is the teacher, q the student.
Without a student the reference stands in, and log(p_k/q_k) = A_k. The reference is usually closer to the teacher than a
student is. The losses are then too small, and only good for comparing values of K.

Shapes: T response tokens, M ids of the rows, Q values of K.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adpa.data.cache.signal_rows import PADDING, SignalRow, keep_nucleus
from adpa.data.cache.signals import Scoring, encoded_bytes

SMALLEST_TAIL = 1e-7  # below it, 1 − Σq of float32 log-probabilities has no correct digits
SMALLEST = np.finfo(np.float64).tiny


@dataclass(frozen=True)
class Fidelity:
    """The part of the signals that a value of K keeps, over all tokens of some rows.

    Attributes:
        top_k: K.
        captured_mass: the teacher's probability of its top K, mean.
        captured_mass_5: its 5 % quantile: all but one in twenty tokens have at least this.
        tail: the teacher's probability of everything else, mean.
        kl_lost: nats per token, mean; none without student and reference.
        kl_lost_95: its 95 % quantile.
        advantage_lost: share of Σ p·|A| that lies beyond K; none without a reference.
        bytes: predicted size in the cache, for the requested number of tokens.
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
    shards: Sequence[Sequence[SignalRow]],
    scoring: Scoring,
    top_ks: Sequence[int],
    tokens: int,
    student_ratios: Mapping[bytes, NDArray[Any]] | None = None,
) -> list[Fidelity]:
    """Measures what each K would keep of some rows.

    Args:
        shards: rows of a large K, grouped into the shards to write.
        scoring: the scoring of the rows.
        top_ks: the values of K, none above that of the rows.
        tokens: the number of tokens to predict bytes for.
        student_ratios: for each row's key, teacher minus student at its ids, [T, M]; default: the reference's.
    """
    rows = [row for shard in shards for row in shard]
    kept = [_kept(row, top_ks, scoring.top_p) for row in rows]
    tail_NQ = np.concatenate([_sums_beyond(_outcomes(row), kept_TQ) for row, kept_TQ in zip(rows, kept, strict=True)])
    ratios = student_ratios or {row.key: row.topk_advantages for row in rows if row.topk_advantages is not None}
    kl_NQ = None
    if ratios:
        lost = [_kl_beyond(row, ratios[row.key], kept_TQ) for row, kept_TQ in zip(rows, kept, strict=True)]
        kl_NQ = np.concatenate(lost)
    advantages_lost = None if scoring.reference is None else _advantages_lost(rows, kept)
    cut = [[cut_row(row, top_ks) for row in shard] for shard in shards]
    results = []
    for place, top_k in enumerate(top_ks):
        tail_N = tail_NQ[:, place]
        narrow = replace(scoring, top_k=top_k)
        kept_rows = [[keep_nucleus(rows_Q[place], scoring.top_p) for rows_Q in shard] for shard in cut]
        size = sum(encoded_bytes(shard, narrow) for shard in kept_rows)
        results.append(
            Fidelity(
                top_k=top_k,
                captured_mass=float(1 - tail_N.mean()),
                captured_mass_5=_quantile(1 - tail_N, 0.05),
                tail=float(tail_N.mean()),
                kl_lost=None if kl_NQ is None else float(kl_NQ[:, place].mean()),
                kl_lost_95=None if kl_NQ is None else _quantile(kl_NQ[:, place], 0.95),
                advantage_lost=None if advantages_lost is None else advantages_lost[place],
                bytes=round(size * tokens / len(tail_N)),
            )
        )
    return results


def cut_row(row: SignalRow, top_ks: Sequence[int]) -> list[SignalRow]:
    """The row as scorings with smaller values of K would have it."""
    with np.errstate(divide="ignore"):
        tails_TQ = np.log(_sums_beyond(_outcomes(row), _kept(row, top_ks))).astype(np.float32)
    return [
        replace(
            row,
            topk_ids=row.topk_ids[:, :top_k],
            topk_logprobs=row.topk_logprobs[:, :top_k],
            tail_logprob=tail_T,
            topk_advantages=None if row.topk_advantages is None else row.topk_advantages[:, :top_k],
        )
        for top_k, tail_T in zip(top_ks, tails_TQ.T, strict=True)
    ]


def _kl_beyond(row: SignalRow, ratios: NDArray[Any], kept_TQ: NDArray[np.int64]) -> NDArray[np.float64]:
    """The KL lost by each K, [T, Q]; ``ratios`` are log p − log q at the row's ids."""
    p_TM = _outcomes(row)
    possible = p_TM[:, :-1] > 0
    ratios_TM = np.where(possible, ratios.astype(np.float64), 0)
    q_ids = np.where(possible, np.exp(row.topk_logprobs.astype(np.float64) - ratios_TM), 0)
    q_tail = np.maximum(1 - q_ids.sum(axis=1), np.where(p_TM[:, -1] > 0, SMALLEST_TAIL, 0))
    ratios_TM = np.column_stack([ratios_TM, _log(p_TM[:, -1]) - _log(q_tail)])
    p_TQ, q_TQ = _sums_beyond(p_TM, kept_TQ), _sums_beyond(np.column_stack([q_ids, q_tail]), kept_TQ)
    return np.maximum(_sums_beyond(p_TM * ratios_TM, kept_TQ) - p_TQ * (_log(p_TQ) - _log(q_TQ)), 0)


def _advantages_lost(rows: Sequence[SignalRow], kept: Sequence[NDArray[np.int64]]) -> list[float]:
    """The share of Σ p·|A| of all rows that lies beyond each K."""
    sums = np.zeros(1 + kept[0].shape[1])
    for row, kept_TQ in zip(rows, kept, strict=True):
        assert row.topk_advantages is not None
        p_TM = _outcomes(row)[:, :-1]
        sizes_TM = p_TM * np.abs(np.where(p_TM > 0, row.topk_advantages.astype(np.float64), 0))
        sizes_TM = np.column_stack([sizes_TM, np.zeros(len(sizes_TM))])
        sums[0] += sizes_TM.sum()
        sums[1:] += _sums_beyond(sizes_TM, kept_TQ).sum(axis=0)
    whole, *beyond = sums.tolist()
    return [size / whole if whole else 0.0 for size in beyond]


def _outcomes(row: SignalRow) -> NDArray[np.float64]:
    """The teacher's probabilities of the ids and of the rest, [T, M + 1]."""
    return np.exp(np.column_stack([row.topk_logprobs, row.tail_logprob]).astype(np.float64))


def _kept(row: SignalRow, top_ks: Sequence[int], top_p: float = 1.0) -> NDArray[np.int64]:
    """How many ids each token keeps with each K, [T, Q]."""
    counts_T1 = (keep_nucleus(row, top_p).topk_ids != PADDING).sum(axis=1, keepdims=True)
    return np.minimum(np.array(top_ks), counts_T1)


def _sums_beyond(values: NDArray[np.float64], kept_TQ: NDArray[np.int64]) -> NDArray[np.float64]:
    """The sum of all columns from K on, for each K of each token; it adds the smallest probabilities first."""
    return np.take_along_axis(np.cumsum(values[:, ::-1], axis=1)[:, ::-1], kept_TQ, axis=1)


def _log(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.log(np.maximum(values, SMALLEST))


def _quantile(values: NDArray[Any], share: float) -> float:
    return float(np.quantile(values, share, method="inverted_cdf"))
