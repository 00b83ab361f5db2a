"""Bootstrap intervals of a mean, by percentiles (Efron and Tibshirani, An Introduction to the Bootstrap).

To compare two models prompt by prompt, pass their differences or their ``win_share`` on the same prompts.

Shapes: S groups, such as training seeds; P prompts per group; R resamples.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adpa.errors import DataError

CHUNK_VALUES = 1 << 20  # values resampled at a time


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(values_SP: ArrayLike, resamples: int = 2000, level: float = 0.95, seed: int = 0) -> Interval:
    """The mean of all values, and the interval that contains it with the probability ``level``.

    It resamples groups with replacement, and in each group its prompts; with one group, the prompts alone. With few
    groups, or few prompts in a single group, the interval is too narrow. The same arguments give the same interval.

    Args:
        values_SP: [S, P], finite; computed in float64.
        resamples: the number of resamples.
        level: the probability.
        seed: the seed of the resampling.

    Raises:
        DataError: the array is empty, is not [S, P], or has a value that is not finite.
    """
    assert resamples > 0
    assert 0 < level < 1
    values = _finite(values_SP)
    if values.ndim != 2:
        raise DataError(f"values of shape {list(values.shape)}; expected [groups, prompts]")
    groups, prompts = values.shape
    generator = np.random.default_rng(seed)
    means_R = np.empty(resamples)
    step = max(1, CHUNK_VALUES // values.size)
    for start in range(0, resamples, step):
        means = means_R[start : start + step]
        group_ids = generator.integers(groups, size=(len(means), groups, 1))
        prompt_ids = generator.integers(prompts, size=(len(means), groups, prompts))
        means[:] = values[group_ids, prompt_ids].reshape(len(means), -1).mean(axis=1)
    low, high = np.quantile(means_R, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def win_share(mine: ArrayLike, theirs: ArrayLike) -> NDArray[np.float64]:
    """1 where ``mine`` is greater than ``theirs``, 0.5 where they are equal, 0 elsewhere; float64, of the same shape.

    Raises:
        DataError: the arrays are empty, their shapes differ, or a value is not finite.
    """
    mine, theirs = _finite(mine), _finite(theirs)
    if mine.shape != theirs.shape:
        raise DataError(f"values of shape {list(mine.shape)} against {list(theirs.shape)}; expected the same prompts")
    return (mine > theirs) + 0.5 * (mine == theirs)


def _finite(raw: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(raw, dtype=np.float64)
    if not values.size:
        raise DataError("no values; expected at least one")
    if not np.isfinite(values).all():
        raise DataError(f"{np.count_nonzero(~np.isfinite(values))} of {values.size} values are not finite")
    return values
