"""The lossy form of signals: rounds log-probabilities and advantages to grids that are fine where the teacher is sure.

An error ε of log p_k changes KL(p‖q) by about p_k·ε·log(p_k/q_k). So the steps of the grid of log-probabilities are
LOGPROB_STEP / p nats, and COARSEST at most: p·ε is then the same for every token that matters. The loss weights
advantages by the student's probabilities; here the teacher's stand in for them. So the step of an advantage is
ADVANTAGE_STEP / √p, and COARSEST at most. The numbers that are not per id (the response's own tokens and the tail) are
float16.

Shapes: T response tokens, K ids. Steps in nats.
"""

import numpy as np
from numpy.typing import NDArray

from adpa.data.cache.signal_rows import PADDING, SignalRow

LOGPROB_STEP = 2.0**-12
ADVANTAGE_STEP = 2.0**-5
COARSEST = 0.5
DEEPEST = 128.0  # in nats; the grid ends here, and smaller probabilities are rounded up to it


def _grid() -> NDArray[np.float64]:
    depths = [0.0]
    while depths[-1] < DEEPEST:
        depths.append(depths[-1] + min(COARSEST, LOGPROB_STEP * float(np.exp(depths[-1]))))
    return -np.array(depths)


GRID = _grid()
MIDDLES = -(GRID[1:] + GRID[:-1]) / 2
IMPOSSIBLE = len(GRID)  # the code of −inf
LOGPROBS = np.append(GRID, -np.inf).astype(np.float32)
STEPS = np.append(np.minimum(COARSEST, ADVANTAGE_STEP * np.exp(-GRID / 2)), 0).astype(np.float32)


def round_logprobs(logprobs: NDArray[np.floating]) -> NDArray[np.uint16]:
    """The codes of log-probabilities; ``LOGPROBS[code]`` is the nearest value of the grid."""
    codes = np.searchsorted(MIDDLES, -logprobs.astype(np.float64))
    return np.where(np.isneginf(logprobs), IMPOSSIBLE, codes).astype(np.uint16)


def round_advantages(advantages: NDArray[np.floating], codes: NDArray[np.uint16]) -> NDArray[np.uint32]:
    """Advantages in steps of ``STEPS[code]``, as 0, −1, 1, −2, … ↦ 0, 1, 2, 3, …; 0 where the teacher's p is 0."""
    assert np.isfinite(advantages[codes != IMPOSSIBLE]).all(), "an advantage that is not a finite number"
    steps = np.where(codes == IMPOSSIBLE, np.inf, STEPS[codes].astype(np.float64))
    counts = np.rint(np.where(codes == IMPOSSIBLE, 0, advantages) / steps).astype(np.int64)
    return np.where(counts < 0, -2 * counts - 1, 2 * counts).astype(np.uint32)


def restore_advantages(numbers: NDArray[np.uint32], codes: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The values that ``round_advantages`` rounded to; −inf where the teacher's p is 0."""
    counts = (numbers >> 1).astype(np.int32) ^ -(numbers & 1).astype(np.int32)
    return np.where(codes == IMPOSSIBLE, np.float32(-np.inf), counts.astype(np.float32) * STEPS[codes])


def kl_errors(exact: SignalRow, rounded: SignalRow) -> NDArray[np.float64]:
    """The change of KL(p‖q) over the K + 1 outcomes by rounding, in nats; float64 [T].

    q is the reference, in place of a student. Without a reference, q is uniform over the outcomes.
    """
    possible_TK = (exact.topk_ids != PADDING) & np.isfinite(exact.topk_logprobs)
    exact_TK, rounded_TK = (np.where(possible_TK, row.topk_logprobs.astype(np.float64), 0) for row in (exact, rounded))
    if exact.topk_advantages is None:
        outcomes_T1 = possible_TK.sum(axis=1, keepdims=True) + 1
        other_TK = np.broadcast_to(-np.log(outcomes_T1), exact_TK.shape)
        other_T = -np.log(outcomes_T1[:, 0])
    else:
        other_TK = exact_TK - np.where(possible_TK, exact.topk_advantages.astype(np.float64), 0)
        mass_T = np.where(possible_TK, np.exp(other_TK), 0).sum(axis=1)
        other_T = np.log(np.maximum(1 - mass_T, np.finfo(np.float32).eps))
    change_TK = np.exp(rounded_TK) * (rounded_TK - other_TK) - np.exp(exact_TK) * (exact_TK - other_TK)
    tails = [row.tail_logprob.astype(np.float64) for row in (rounded, exact)]
    rounded_T, exact_T = (np.exp(tail) * (np.where(np.isfinite(tail), tail, 0) - other_T) for tail in tails)
    return np.where(possible_TK, change_TK, 0).sum(axis=1) + rounded_T - exact_T


def advantage_errors(exact: SignalRow, rounded: SignalRow) -> NDArray[np.float64]:
    """Σ_k p_k·|change of A_k| by rounding, in nats; float64 [T], 0 without a reference."""
    if exact.topk_advantages is None or rounded.topk_advantages is None:
        return np.zeros(len(exact.topk_ids))
    possible_TK = (exact.topk_ids != PADDING) & np.isfinite(exact.topk_logprobs)
    exact_TK, rounded_TK = (
        np.where(possible_TK, values.astype(np.float64), 0)
        for values in (exact.topk_advantages, rounded.topk_advantages)
    )
    weights_TK = np.where(possible_TK, np.exp(exact.topk_logprobs.astype(np.float64)), 0)
    return (weights_TK * np.abs(rounded_TK - exact_TK)).sum(axis=1)
